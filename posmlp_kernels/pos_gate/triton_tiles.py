"""The tile of a Triton kernel: a pure function of the chip, the window and the dtypes; never of the batch.

A product kernel makes `rows x columns` of the output from tiles `rows x keys` of the mixing matrix and
`keys x columns` of the tokens. Where one key block covers the window (half precision, up to 256 tokens), the
matrix tile is built once and kept while columns stream past it; larger windows rebuild it per key block, and
then compute decides, not memory. The outer-product kernel makes `rows x keys` from runs of `columns`.

Shared memory is estimated from above: operands of the dot, each streamed tensor once per stage, and the
accumulator on its way out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

PROGRAMS = 1024  # wanted per launch: several waves on the largest chips


@dataclass(frozen=True)
class Tile:
    """Block sizes, all powers of two of at least 16, and the launch's settings."""

    rows: int
    keys: int
    columns: int
    warps: int = 4
    stages: int = 2


def product_tile(shared_limit: int, tokens: int, dtype: torch.dtype, stream: int) -> Tile:
    """The tile of `P X1` or `P^T dU`.

    Args: shared_limit in bytes; stream: bytes loaded per element of the streamed operand (x; x and the
    statistics of a norm; x and dz).
    """
    itemsize, whole = dtype.itemsize, _block(tokens)
    rows = min(64, whole)
    if itemsize == 8:
        candidates = [Tile(min(rows, 32), 16, 32)]
    elif itemsize == 4:  # without tensor cores: small tiles that stay in registers
        candidates = [Tile(rows, min(whole, 32), columns) for columns in (64, 32)]
    else:
        warps = 4 if whole <= 128 else 8  # the kept tile lives in the registers of all warps
        kept = [Tile(rows, whole, columns, warps) for columns in (64, 32)] if whole <= 256 else []
        candidates = kept + [Tile(rows, min(whole, keys), columns) for keys, columns in ((64, 64), (32, 32))]

    def shared(t: Tile) -> int:
        return itemsize * t.rows * (t.keys + t.columns) + stream * t.stages * t.keys * t.columns

    return _first_that_fits(candidates, shared, shared_limit)


def outer_tile(shared_limit: int, tokens: int, dtype: torch.dtype, stream: int) -> Tile:
    """The tile of `dU X1^T`; arguments as for `product_tile`."""
    itemsize = dtype.itemsize
    size = min(32 if itemsize == 8 else 64, _block(tokens))
    candidates = [Tile(size, size, columns) for columns in (64, 32, 16) if columns * itemsize <= 128]

    def shared(t: Tile) -> int:
        return t.stages * t.columns * (2 * itemsize * t.rows + stream * t.keys)

    return _first_that_fits(candidates, shared, shared_limit)


def _first_that_fits(candidates: list[Tile], shared: Callable[[Tile], int], limit: int) -> Tile:
    for tile in candidates:
        if shared(tile) <= limit:
            return tile
    return replace(tile, stages=1)


def _block(tokens: int) -> int:
    return max(16, 1 << (tokens - 1).bit_length())
