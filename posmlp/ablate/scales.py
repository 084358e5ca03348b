"""Models that the ablations compare, by scale. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Levels = Sequence[int]  # a number for each level


@dataclass(frozen=True)
class Base:
    """A model of a family, with GGQPE, of which rows are variations.

    Args:
        family: "gMLP" or "PosMLP".
        name: the registered model's, without encoding.
        groups: of GLRPE and GGQPE.
        windows: of every level.
        options: of `create_model`, which make it smaller than the registered one.
        ending: of its registered name for GGQPE.
    """

    family: str
    name: str
    groups: Levels
    windows: Levels
    options: Mapping[str, Any] = field(default_factory=dict)
    ending: str = ""


@dataclass(frozen=True)
class Elsewhere:
    """An image size and windows by level, other than those of the training."""

    side: int
    windows: Levels

    def __str__(self) -> str:
        return f"{self.side}, windows {' '.join(map(str, self.windows))}"


@dataclass(frozen=True)
class Scale:
    """What is compared at a scale.

    Args:
        gmlp, posmlp: a model of each family.
        side: of the images, in pixels.
        recipe: a name of `RECIPES`.
        epochs: of a run.
        groups, windows: what the tables on PosMLP's groups and windows try, its own among them.
        elsewhere: what PosMLP's trained weights are transferred to.
    """

    gmlp: Base
    posmlp: Base
    side: int
    recipe: str
    epochs: int
    groups: Sequence[Levels]
    windows: Sequence[Levels]
    elsewhere: Sequence[Elsewhere]


_SMALL_GMLP = {"dims": (64,), "depths": 4, "ratios": 4, "patch_size": 4}

SCALES = {
    "digits": Scale(
        Base("gMLP", "gmlp_s16", groups=(8,), windows=(8,), options=_SMALL_GMLP, ending="_ggqpe"),
        Base("PosMLP", "posmlp_nano", groups=(8, 16), windows=(8, 4), options={"dims": (32, 64)}),
        side=32,
        recipe="digits",
        epochs=10,
        groups=((1, 1), (2, 4), (4, 8), (8, 16), (16, 32)),
        windows=((2, 2), (4, 2), (4, 4), (8, 4)),
        elsewhere=(
            Elsewhere(32, (5, 4)),
            Elsewhere(32, (10, 5)),
            Elsewhere(48, (12, 6)),
            Elsewhere(64, (16, 8)),
        ),
    ),
    "tiny": Scale(
        Base("gMLP", "gmlp_s16", groups=(32,), windows=(14,), ending="_ggqpe"),
        Base("PosMLP", "posmlp_tiny", groups=(8, 16, 32, 64), windows=(14, 14, 14, 7)),
        side=224,
        recipe="tiny",
        epochs=300,
        groups=((1, 1, 1, 1), (4, 8, 16, 32), (8, 16, 32, 64), (16, 32, 64, 128)),
        windows=((7, 7, 7, 7), (14, 14, 14, 7), (28, 28, 14, 7)),
        elsewhere=(
            Elsewhere(224, (12, 12, 12, 6)),
            Elsewhere(288, (18, 18, 18, 9)),
            Elsewhere(384, (12, 12, 24, 12)),
            Elsewhere(384, (24, 24, 24, 12)),
        ),
    ),
}
