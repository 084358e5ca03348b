"""What is particular to the Triton kernels: how work is cut into programs, and chips that are not here.

Their values are tested as any back end's, interpreted where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from support import interpreted

from posmlp_kernels import pos_gate
from posmlp_kernels.pos_gate.triton_tiles import TABLE, Tile, tile_of
from posmlp_kernels.testing import Case, assert_gate_no_worse, run

KERNELS = {
    "mixing_kernel",
    "gate_kernel",
    "backward_kernel",
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


@dataclass(frozen=True)
class Cut:
    """A tile of which windows of 6 to 40 tokens take several."""

    name: str
    tile: Tile
    dtype: torch.dtype


TILES = (
    Cut("kept", Tile(64, 32, 16, 32, rows=16, run=16, keep=64), torch.float16),  # in pieces of 32 and less
    Cut("streamed", Tile(16, 16, 16, 16, rows=16, run=32), torch.float32),  # several blocks of the window
)


@interpreted_only
@pytest.mark.parametrize("cut", TILES, ids=lambda cut: cut.name)
@pytest.mark.parametrize("case", CUTS, ids=lambda case: case.name)
def test_shares_pieces_and_wide_indices(case, cut, monkeypatch):
    """Columns cut into several shares, as on a GPU, and counted in 64 bits, as for huge x."""
    import triton.language as tl

    from posmlp_kernels.pos_gate import triton_launch

    monkeypatch.setattr(triton_launch, "wanted_programs", lambda *args: 48)
    monkeypatch.setattr(triton_launch, "index_type", lambda *args: tl.int64)
    monkeypatch.setattr(
        triton_launch.triton_tiles, "tile_of", lambda name, tokens, *args: cut.tile.for_window(tokens)
    )
    shares = []
    cut_into = triton_launch.Call.shares
    monkeypatch.setattr(
        triton_launch.Call, "shares", lambda *args: shares.append(cut_into(*args)) or shares[-1]
    )

    gate = partial(run, backend="triton")
    assert_gate_no_worse(gate, case, cut.dtype, parameter_dtype=torch.float32, seeds=range(4))
    assert max(shares) > 1


@pytest.mark.parametrize("architecture", [*TABLE, "an unknown chip"])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tiles(architecture, tf32, dtype):
    """Powers of two that Triton's dot takes, for any window; little of a block is wasted."""
    for tokens in (1, 7, 49, 64, 196, 225, 256, 257, 576, 1024, 50_000):
        for backward in (False, True):
            tile = tile_of(architecture, tokens, dtype, tf32, backward)
            pieces = tile.pieces(tokens)
            for size in (*pieces, tile.keys, tile.columns, tile.rows, tile.run):
                assert 16 <= size <= 256
                assert size & (size - 1) == 0
            blocks = -(-tokens // sum(pieces))
            assert blocks * sum(pieces) < max(16, 1.5 * tokens + 16)
            side = tile.side(tokens)
            assert side >= blocks * sum(pieces)
            assert side >= -(-tokens // tile.keys) * tile.keys
            assert side % 16 == 0
            assert not tile.keep or tile.keys >= tokens


@interpreted_only
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_float32_operands_are_rounded_only_if_torch_says_so(setting, request):
    from posmlp_kernels.pos_gate import triton_launch
    from posmlp_kernels.problem import check

    before = torch.backends.cuda.matmul.fp32_precision
    request.addfinalizer(lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", before))
    torch.backends.cuda.matmul.fp32_precision = setting
    for dtype in (torch.float64, torch.float32, torch.float16):
        x, table = torch.zeros(1, 4, 2, dtype=dtype), torch.zeros(1, 7, dtype=dtype)
        problem = check(x, table, None, None, None, window=4, softmax=True, shift=None, activation="none")
        call = triton_launch.Call(x, table, None, problem, backward=False)
        assert call.precision == ("tf32" if dtype == torch.float32 and setting == "tf32" else "ieee")


@interpreted_only
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_elements_that_the_kernels_ask_for(activation, monkeypatch):
    """By the masks of the interpreter's own loads and stores, and P beside them.

    Forward 3 C elements a token, each once. Backward 8 C loaded, one more for an activation's slope, of which
    3 C differ; 2 C stored.
    """
    import triton
    from triton.runtime import interpreter

    from posmlp_kernels.pos_gate import triton_launch

    counts = {"loads": 0, "stores": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *args):
        counts["loads"] += int(mask.data.sum()) * (pointers.get_element_ty() == triton.language.float16)
        return load(self, pointers, mask, *args)

    def counted_store(self, pointers, value, mask, *args):
        counts["stores"] += int(mask.data.sum()) * (pointers.get_element_ty() == triton.language.float16)
        return store(self, pointers, value, mask, *args)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    tile = Tile(256, 64, 32, 64, rows=64, run=64, keep=256, waves=1)
    monkeypatch.setattr(
        triton_launch.triton_tiles, "tile_of", lambda name, tokens, *args: tile.for_window(tokens)
    )
    groups, window, channels = 2, 7, 24
    tokens = 4 * window * 3 * window * 2  # so many that P is little beside them
    x = torch.randn(2, 4 * window, 3 * window, 2 * channels, dtype=torch.float16)
    table, bias = torch.randn(groups, 13, 13), torch.randn(49)
    settings = ((window, window), (0, 0), True, ("none", "gelu").index(activation), -1.0)
    mixing = groups * 64**2 / (tokens * channels)

    z = triton_launch.forward(x, table, bias, None, None, None, *settings)
    forward = {name: count / (tokens * channels) for name, count in counts.items()}
    assert forward == pytest.approx({"loads": 2 + mixing, "stores": 1 + mixing})

    counts |= {"loads": 0, "stores": 0}
    triton_launch.backward(torch.randn_like(z), x, table, bias, None, None, None, *settings, True)
    backward = {name: count / (tokens * channels) for name, count in counts.items()}
    loads = 8 + (activation != "none") + 2 * mixing
    assert backward == pytest.approx({"loads": loads, "stores": 2 + mixing})


@interpreted_only
def test_a_forward_is_two_launches(monkeypatch):
    from posmlp_kernels.pos_gate import triton_launch

    launched = []

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel.fn.__name__)
            return self.kernel[grid]

    for owner, name in (
        (triton_launch.triton_mixing, "mixing_kernel"),
        (triton_launch.triton_product, "gate_kernel"),
        (triton_launch.triton_norm, "statistics_kernel"),
    ):
        monkeypatch.setattr(owner, name, Watched(getattr(owner, name)))
    x, table = torch.randn(1, 4, 12), torch.randn(2, 7)
    with torch.no_grad():
        pos_gate(x, table, window=4, softmax=True, activation="gelu", backend="triton")
    assert launched == ["mixing_kernel", "gate_kernel"]


SPILL_FREE = {("sm_80", "gate_kernel"), ("sm_90", "gate_kernel"), ("sm_100", "gate_kernel")}


@pytest.mark.parametrize(
    "chip",
    ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx1100"],
)
def test_kernels_compile_and_fit(chip, tmp_path):
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "benchmarks.triton_resources", chip, "--few"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    assert not [kernel for kernel in kernels if kernel["shared"] > kernel["limit"]]
    spilling = [kernel for kernel in kernels if kernel["spilled"]]
    assert not [kernel for kernel in spilling if (chip, kernel["kernel"]) in SPILL_FREE]
    assert not [kernel for kernel in spilling if kernel["spilled"] > 128]
    if chip.startswith("sm_"):
        whole = [k for k in kernels if k["kernel"] == "gate_kernel" and "window 24" in k["call"]]
        assert all(kernel["wide_stores"] == kernel["stores"] > 0 for kernel in whole)


def test_the_page_says_what_was_compiled():
    from benchmarks import triton_resources

    text = triton_resources.DOCUMENT.read_text()
    committed = json.loads(triton_resources.COMMITTED.read_text())
    assert triton_resources.fill(text, committed) == text, (
        "run python -m benchmarks.triton_resources --out ..."
    )


def test_what_would_be_tuned(capsys):
    from benchmarks import tune

    tune.main(["--dry-run"])
    assert "72 tiles forward\n144 tiles backward" in capsys.readouterr().out
    shapes = tune.shapes("TSB")
    assert len(set(shapes)) == 12
    for backward in (False, True):
        for tile in tune.candidates(backward):
            assert sum(tile.for_window(196).pieces(196)) in (208, 256)
