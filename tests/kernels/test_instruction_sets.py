"""The tests of values and gradients on every instruction set; the suite itself runs on the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, available, instruction_sets

FILES = [
    Path(__file__).with_name(f"test_{what}.py")
    for what in (
        "pos_gate", "gradcheck", "shapes", "golden", "activation", "table_gradient", "split_tiles", "twins",
        "seats",
    )
]  # fmt: skip
ON_THE_CPU = " and ".join(f"not {backend}" for backend in ("reference", "triton", "cuda"))


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
def test_tile_registers_come_first():
    """Where a processor has them; what follows differs among processors."""
    known = instruction_sets()
    assert known[-1] == "portable" and "avx512_amx" not in known[1:]


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize("name", ["avx512_amx", "avx512_bf16", "avx512", "avx2", "portable"])
def test_values_and_gradients(name):
    best, *others = instruction_sets()
    if name not in others:
        pytest.skip(f"the other tests run on {name}" if name == best else f"this processor has no {name}")
    command = [sys.executable, "-m", "pytest", *map(str, FILES), "-k", ON_THE_CPU]
    environment = os.environ | {"POSMLP_CPU_KERNELS": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]
