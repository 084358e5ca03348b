"""What a named model takes at an image size, by the windows one could give it there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cost import complexity, total
from .model import PosMLP
from .registry import create_model, default_cfg
from .tables import aligned, by, short

Window = tuple[int, ...]

# Wang et al., PosMLP (ACM MM 2022).
_PAPER = {("posmlp_tiny", 384): "The paper states 17.7 G and does not name the windows."}


def describe_choices(name: str, size: int, asked: Sequence[Window] | None = None) -> str:
    """A table of a named model's MACs for one image of `size`, by choice of windows.

    The first figure counts the position maps as the paper does, entry by entry of `[S, N, N]`; the second
    leaves them out, which is nearer to what a relative table takes. `asked` is a choice of the user's own.
    """
    model = _on_meta(name)
    maps = [cost.shape[1:] for cost in complexity(model, size) if cost.name.startswith("levels.")]
    own = [level.blocks[0].gate.window for level in model.levels]
    choices = window_choices(own, maps, size / default_cfg(name)["input_size"][-1])
    rows = [("choice", "windows", "MACs", "without position maps")]
    if asked is not None and tuple(asked) not in choices.values():
        choices = {"as asked": tuple(asked), **choices}
    for reason, windows in choices.items():
        cost = total(complexity(_on_meta(name, windows=windows), size))
        sides = " ".join(by(window) if len(set(window)) > 1 else str(window[0]) for window in windows)
        rows.append((reason, sides, short(cost.macs), short(cost.macs - cost.map_macs)))
    lines = [aligned(rows)]
    if (name, size) in _PAPER:
        lines.append(_PAPER[name, size])
    return "\n".join(lines)


def window_choices(
    own: Sequence[Window], maps: Sequence[Window], scale: float
) -> dict[str, tuple[Window, ...]]:
    """Windows of every level by what speaks for them; a choice that comes twice has its first reason.

    Args:
        own: the model's windows.
        maps: the sides of each level's map at the new image size.
        scale: the new image's side over the model's own.
    """
    tiling = [_tiling(window, sides) for window, sides in zip(own, maps, strict=True)]
    choices = {
        "the model's own": own,
        "not larger, tiling the maps": tiling,
        "these, last map whole": [*tiling[:-1], maps[-1]],
        "these, last two maps whole": [*tiling[:-2], *maps[-2:]],
        "grown with the image": [tuple(max(1, round(side * scale)) for side in window) for window in own],
    }
    reasons: dict[tuple[Window, ...], str] = {}
    for reason, windows in choices.items():
        reasons.setdefault(tuple(map(tuple, windows)), reason)
    return {reason: windows for windows, reason in reasons.items()}


def _tiling(window: Window, sides: Window) -> Window:
    """The largest window within `window` that leaves none sticking out of the map."""
    return tuple(
        max(part for part in range(1, min(side, whole) + 1) if whole % part == 0)
        for side, whole in zip(window, sides, strict=True)
    )


def _on_meta(name: str, **options: object) -> PosMLP:
    with torch.device("meta"):
        return create_model(name, **options)
