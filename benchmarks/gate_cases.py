"""The gates that are measured: those of the PosMLP family, the other encodings and windows, and sweeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import torch

from posmlp_kernels import PosSGU, mixing_matrix

from .structure import multiplied

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward + backward")
PRODUCTS = {FORWARD: 1, BACKWARD: 3, BOTH: 4}  # a backward makes P X1 again, P^T dU and dU X1^T
# Multiplications for a number of X1 and one of X2 besides: scale, bias, X2; in a backward dX2 and dU too.
# The shortest GELU we know of takes 7 for each number, 13 with its slope, as `csrc/pos_gate/cpu_activation.h`
# does with AVX-512; elsewhere that takes 13 and 26.
_AROUND = {FORWARD: 2, BACKWARD: 4, BOTH: 2 + 4}
_AROUND_WITH_GELU = {FORWARD: 2 + 2 * 7, BACKWARD: 6 + 2 * 13, BOTH: 16 + 32}
_ELEMENTS = {FORWARD: 3, BACKWARD: 5, BOTH: 8}  # of C a token: x and z; x, dz and dx


def flops_around(numbers: int, direction: str, gelu: bool) -> float:
    """What a gate of so many outputs takes besides its products, as vectors are multiplied with AVX-512."""
    return 2.0 * numbers * (_AROUND_WITH_GELU if gelu else _AROUND)[direction]


@dataclass(frozen=True)
class Gate:
    """A gate on maps `[batch, map, map, 2 * channels]`, with as many sides `map` as `rank` says.

    Args:
        trained: encodings that have moved from where they start (quadratic ones only).
        against: what it is measured against, by name.
    """

    name: str
    map: int
    window: int
    channels: int
    groups: int
    batch: int = 8
    encoding: str = "gqpe"
    shift: int = 0
    trained: bool = False
    rank: int = 2
    against: tuple[str, ...] = ("plain",)

    @property
    def tiled(self) -> bool:
        """Whether whole windows cover an image: what plain PyTorch can cut without padding."""
        return self.rank == 2 and self.map % self.window == 0 and self.shift == 0

    def flops(self, direction: str) -> float:
        """Those of mixing tokens that share a window."""
        edges = [0, *range(self.window - self.shift, self.map, self.window), self.map]
        pairs = sum((end - start) ** 2 for start, end in pairwise(edges)) ** self.rank
        return 2.0 * self.batch * pairs * self.channels * PRODUCTS[direction]

    def flops_around(self, direction: str) -> float:
        """Those of the way in and out."""
        return flops_around(self.batch * self.map**self.rank * self.channels, direction, gelu=False)

    def multiplied(self) -> float:
        """The part of the products' multiply-adds that is left at best."""
        layer = self.layer()
        if not layer.softmax:
            return 1.0
        with torch.no_grad():
            groups = layer.relative_table().double().split(1)  # one after the other: P of all may be large
        return fmean(
            multiplied(mixing_matrix(table, layer.window, softmax=True), layer.window) for table in groups
        )

    def elements(self, direction: str) -> int:
        """What must at least be read or written."""
        return self.batch * self.map**self.rank * self.channels * _ELEMENTS[direction]

    def layer(self, activation: str = "none", backend: str | None = None) -> PosSGU:
        """The layer in eval mode, with the same parameters on every call."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        torch.manual_seed(0)
        layer = PosSGU(
            2 * self.channels,
            (self.window,) * self.rank,
            groups=self.groups,
            encoding=self.encoding,
            shift=self.shift,
            activation=activation,
            backend=backend,
        )
        with torch.no_grad():
            layer.bias.copy_(normal(self.window**self.rank))
            if self.trained and self.encoding == "gqpe":
                # Stands for training, after which groups look at different places, sharply or widely, along
                # directions of their own: the demo's gates end at centres 1 to 2 tokens away and singular
                # values of the factor from 0.01 to 3. These are wider on the whole (median 0.6), so that
                # fewer weights are negligible: the harder case.
                layer.center.copy_(1.5 * normal(self.groups, self.rank))
                layer.factor.copy_(
                    0.6 * (torch.eye(self.rank) + 0.5 * normal(self.groups, self.rank, self.rank))
                )
        return layer.eval()


_EAGER = ("ours, gelu", "plain", "plain, P given", "original")
_ALL = (*_EAGER, "original, compiled")
STAGES = (
    Gate("stage 1", 56, 14, 192, 8, against=_ALL),
    Gate("stage 2", 28, 14, 384, 16, against=_ALL),
    Gate("stage 3", 14, 14, 768, 32, against=_ALL),
    Gate("stage 4", 7, 7, 768, 64, against=_ALL),
)
TRAINED = tuple(replace(s, name=f"{s.name}, trained", trained=True, against=_EAGER) for s in STAGES)
_STAGE_2 = replace(TRAINED[1], against=("plain",))
_ENCODINGS_AND_WINDOWS = (
    replace(_STAGE_2, name="GLRPE", encoding="lrpe"),
    replace(_STAGE_2, name="LRPE-M", encoding="lrpe_m", groups=1),
    replace(_STAGE_2, name="shifted windows", shift=7),
    replace(_STAGE_2, name="partial windows, 30²", map=30),
    replace(_STAGE_2, name="partial, shifted, 30²", map=30, shift=7),
    replace(_STAGE_2, name="window 7, 56²", map=56, window=7, channels=192, groups=8),
    replace(_STAGE_2, name="window 12, 48²", map=48, window=12),
    replace(_STAGE_2, name="window 24, 24²", map=24, window=24, channels=768, groups=32),
)
_SIZES = tuple(
    replace(stage, name=f"{size}, {stage.name}", channels=stage.channels * d // 96, against=("plain",))
    for size, d in (("PosMLP-S", 128), ("PosMLP-B", 192))
    for stage in TRAINED[:3]
)
_LRPE = replace(_STAGE_2, name="LRPE", encoding="lrpe", groups=1)
CASES = (*STAGES, *TRAINED, _LRPE, *_ENCODINGS_AND_WINDOWS, *_SIZES)


def _large(*cases: Gate, against: tuple[str, ...] = ("ours, gelu", "plain", "reference")) -> tuple[Gate, ...]:
    return tuple(replace(case, batch=128, against=against) for case in cases)


# On a GPU, where P is dense whatever the parameters are: what "trained" would change is left out.
_ON_GPU = ("ours, gelu", "plain", "plain, compiled", "original", "original, compiled", "reference")
_GPU_STAGES = _large(*STAGES, against=_ON_GPU) + _large(*_SIZES, against=_ON_GPU[:4])
_GPU_VARIANTS = (
    *_large(*(replace(s, name=f"LRPE, {s.name}", encoding="lrpe", groups=1) for s in STAGES[:3])),
    *_large(*_ENCODINGS_AND_WINDOWS),
    *_large(
        replace(_STAGE_2, name="window 32, 32²", map=32, window=32),
        replace(_STAGE_2, name="1-D, window 196, 3136", rank=1, map=3136, window=196, channels=192, groups=8),
        replace(_STAGE_2, name="3-D, window 4³, 16³", rank=3, map=16, window=4, channels=192, groups=8),
    ),
)
SUITES = {"cpu": CASES, "gpu stages": _GPU_STAGES, "gpu variants": _GPU_VARIANTS}

# Forward time against one size, the others fixed: by the axis's label, a gate for every size.
_SWEPT = [replace(stage, against=("plain", "original")) for stage in TRAINED]
SWEEPS: dict[str, dict[int, Gate]] = {
    "batch (14² map, window 14, C = 768, S = 32)": {
        batch: replace(_SWEPT[2], batch=batch) for batch in (1, 2, 4, 8, 16, 32, 64)
    },
    "side of the map (batch 4, window 14, C = 192, S = 8)": {
        side: replace(_SWEPT[0], batch=4, map=side) for side in (14, 28, 42, 56, 84, 112)
    },
    "side of the window (batch 2, 96² map, C = 96, S = 8)": {
        side: replace(_SWEPT[0], batch=2, map=96, channels=96, window=side)
        for side in (4, 6, 8, 12, 16, 24, 32)
    },
}
