"""The tiles of the Triton kernels: one table, and how a row of it is cut to a window.

A tile is a pure function of the architecture, the window and the dtype; never of the batch or the map, and
nothing is timed at run time. `python -m benchmarks.tune` times candidates on the GPU at hand and prints rows
for this table. The rows here were chosen by compiling: no spilled registers where that could be had, and
shared memory within the chip's (docs/gpu.md lists both).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Block sizes, powers of two of at least 16, and the launch's settings.

    A `block` of the output's tokens is cut into pieces of `piece`. `keys` tokens of the other side are
    multiplied at a time; all of a window's if P is kept, as for windows of up to `keep` tokens. `columns`
    (window, channel) go together. `rows` by a block of dP are summed from runs of `run` columns. A launch has
    up to `waves` programs for each multiprocessor.
    """

    block: int
    piece: int
    keys: int
    columns: int
    rows: int = 64
    run: int = 64
    warps: int = 8
    stages: int = 2
    keep: int = 0
    waves: int = 4

    def pieces(self, tokens: int) -> tuple[int, ...]:
        """Powers of two that cover a block of the window: 196 = 64 + 64 + 64 + 4, of 16."""
        block = min(_up(tokens, 16), self.block)
        if tokens > self.block:  # of equal blocks of whole pieces, those that stick out least
            sizes = range(self.block, 0, -self.piece)
            block = min((s for s in sizes if 2 * s >= self.block), key=lambda s: _up(tokens, s))
        pieces = ()
        while block:
            pieces += (min(self.piece, 1 << (block.bit_length() - 1)),)
            block -= pieces[-1]
        return pieces

    def for_window(self, tokens: int) -> Tile:
        """This row of the table, no larger than the window needs."""
        padded = _power_of_two(tokens)
        kept = padded <= self.keep
        return replace(
            self,
            piece=min(self.piece, padded),
            keys=padded if kept else min(self.keys, padded),
            rows=min(self.rows, padded),
            keep=self.keep if kept else 0,
        )

    def side(self, tokens: int) -> int:
        """The side of P in memory: what tiles read without masks, and whole 16-byte pieces."""
        return max(_up(tokens, sum(self.pieces(tokens))), _up(tokens, self.keys))


HALF, TF32, IEEE, DOUBLE = "half", "tf32", "ieee", "double"

WITH_TF32 = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "interpreter")

# Multiprocessors of the largest chip of an architecture.
PROCESSORS = {
    "sm_75": 72,
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 142,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 188,
    "gfx90a": 110,
    "gfx942": 304,
    "gfx1100": 96,
    "interpreter": 1,
}

# (forward, backward) by what is multiplied.
_DOUBLE = Tile(32, 32, 16, 32, rows=32, run=16, warps=4, stages=1)
_COMMON = {
    HALF: (Tile(256, 64, 16, 64), Tile(224, 32, 16, 64, rows=32, run=32)),
    TF32: (Tile(256, 64, 16, 64), Tile(128, 64, 32, 64, run=32)),
    IEEE: (Tile(64, 64, 32, 64, warps=4), Tile(64, 64, 32, 64, run=32, warps=4)),
    DOUBLE: (_DOUBLE, _DOUBLE),
}
_SMALL_HALF = Tile(64, 64, 32, 64, run=32, warps=4, stages=1)
_SMALL_SINGLE = Tile(64, 32, 16, 32, rows=32, run=16, warps=4, stages=1)
_SMALL = {
    HALF: (_SMALL_HALF, _SMALL_HALF),
    TF32: (_SMALL_SINGLE, _SMALL_SINGLE),
    IEEE: (_SMALL_SINGLE, _SMALL_SINGLE),
    DOUBLE: (_DOUBLE, _DOUBLE),
}
_TURING_HALF = Tile(64, 32, 16, 64, rows=32, run=32, stages=1)
# Triton 3.6 fails to pipeline products in tensor memory inside these loops: one stage.
_BLACKWELL_SINGLE = Tile(256, 64, 32, 64, run=32, stages=1)
_INTERPRETED = Tile(256, 64, 64, 64, keep=64, waves=1)
TABLE: dict[str, dict[str, tuple[Tile, Tile]]] = {
    "sm_75": _SMALL | {HALF: (_TURING_HALF, _TURING_HALF)},
    "sm_90": _COMMON | {HALF: (Tile(256, 128, 32, 64, keep=256, waves=1), Tile(256, 64, 32, 64, keep=256))},
    "sm_100": _COMMON
    | {
        HALF: (Tile(256, 64, 32, 128, stages=1), Tile(256, 64, 32, 64, stages=1)),
        TF32: (_BLACKWELL_SINGLE, _BLACKWELL_SINGLE),
    },
    "gfx90a": _SMALL,
    "gfx942": _SMALL,
    "gfx1100": _SMALL,
    "interpreter": dict.fromkeys((HALF, TF32, IEEE, DOUBLE), (_INTERPRETED, _INTERPRETED)),
}


def tile_of(architecture: str, tokens: int, dtype: torch.dtype, tf32: bool, backward: bool) -> Tile:
    """The tile for a window of so many tokens; ones for other chips."""
    kind = {2: HALF, 4: TF32 if tf32 else IEEE, 8: DOUBLE}[dtype.itemsize]
    return TABLE.get(architecture, _COMMON)[kind][backward].for_window(tokens)


def processors(architecture: str) -> int:
    """How many programs run side by side, at least."""
    return PROCESSORS.get(architecture, 132)


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
