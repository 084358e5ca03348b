"""What is particular to the Triton kernels: how work is cut into programs, and chips that are not here.

Their values are tested as any back end's, interpreted where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support import interpreted, seeds_of

from posmlp_kernels.testing import Case, assert_gate_no_worse, run

KERNELS = {
    "softmax_kernel",
    "rows_kernel",
    "columns_kernel",
    "logits_kernel",
    "table_kernel",
    "statistics_kernel",
    "norm_backward_kernel",
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted_only = pytest.mark.skipif(
    not interpreted("triton"), reason="settles what the interpreter would not"
)

CUTS = (
    Case(
        "norm",
        "all sums over shares, statistics addressed by token",
        *((5, 4), (3, 2), 2, 40, 7),
        shift=(1, 0),
        matrix="shared",
        activation="gelu",
        norm=True,
    ),
    Case("key_blocks", "40 tokens: more than a block of keys in full precision", (40,), (40,), 1, 33, 3),
    Case("no_softmax", "the product is the gradient", (6, 4), (3, 4), 2, 70, softmax=False, table="learned"),
)


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CUTS, ids=lambda case: case.name)
def test_shares_and_wide_indices(case, dtype, monkeypatch):
    """Columns cut into several shares, as on a GPU, and counted in 64 bits, as for huge x."""
    import triton.language as tl

    from posmlp_kernels.pos_gate import triton_launch

    monkeypatch.setattr(triton_launch, "wanted_programs", lambda device: 12)
    monkeypatch.setattr(triton_launch, "index_type", lambda columns: tl.int64)
    shares = []
    grid = triton_launch.Call.grid
    monkeypatch.setattr(
        triton_launch.Call, "grid", lambda *args: shares.append(grid(*args)[1]) or grid(*args)
    )

    gate = partial(run, backend="triton")
    assert_gate_no_worse(gate, case, dtype, parameter_dtype=torch.float32, seeds=seeds_of("triton"))
    assert max(shares) > 1


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tiles(kilobytes, dtype):
    """Powers of two that Triton's dot takes, for any window; a kept tile only where it covers the window."""
    from posmlp_kernels.pos_gate.triton_tiles import outer_tile, product_tile

    for tokens in (1, 7, 49, 64, 196, 256, 257, 1024, 50_000):
        for stream in (dtype.itemsize, 2 * dtype.itemsize, dtype.itemsize + 8):
            for choose in (product_tile, outer_tile):
                tile = choose(kilobytes * 1024, tokens, dtype, stream)
                for size in (tile.rows, tile.keys, tile.columns):
                    assert 16 <= size <= 256
                    assert size & (size - 1) == 0
                operands = tile.rows * tile.columns + tile.keys * tile.columns
                assert operands * dtype.itemsize <= kilobytes * 1024


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_kernels_compile_and_fit(chip, tmp_path):
    script = Path(__file__).with_name("triton_compiles.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), chip], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    too_large = [kernel for kernel in kernels if kernel["shared"] > kernel["limit"]]
    assert not too_large
