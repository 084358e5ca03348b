"""The C++ kernels by themselves, on all instruction sets of this processor and more; see test_kernels.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from posmlp_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What test_kernels says, with tile registers in software."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    tmp_path = tmp_path_factory.mktemp("kernels")
    sources = [s for s in sorted((ROOT / "csrc/pos_gate").glob("cpu_*.cpp")) if s.name != "cpu_ops.cpp"]
    program = tmp_path / "test_kernels"

    def compiled(source: Path) -> str:
        to = str(tmp_path / f"{source.stem}.o")
        flags = ["-std=c++17", "-O2", "-pthread", "-DPOSMLP_AMX_EMULATED"]
        flags += ["-I", str(ROOT / "csrc/pos_gate"), "-I", str(ROOT / "tests/csrc")]
        subprocess.run([COMPILER, *flags, "-c", str(source), "-o", to], check=True)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [Path(__file__).with_suffix(".cpp"), *sources]))
    subprocess.run([COMPILER, "-pthread", *objects, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_equal_the_definition(report):
    assert report.rstrip().endswith(" 0 failed") and "wide" in report.split(), report


def test_the_kernels_for_tile_registers_were_among_them(report):
    if "avx512_bf16" not in report.split():
        pytest.skip("no AVX512-BF16, by which these kernels do all but their products")
    assert "avx512_amx" in report.split(), report


@pytest.mark.skipif("cpu" not in backends(), reason="the cpu back end was not built")
@pytest.mark.parametrize("name", ["avx512_amx", "avx512_bf16", "avx512", "avx2", "portable", "nonsense"])
def test_the_environment_names_an_instruction_set(name):
    """All give the reference's numbers through the op; an unknown name is an error that lists the others."""
    script = (
        "import torch; from posmlp_kernels import PosSGU, use_backend; torch.manual_seed(0)\n"
        "layer, x = PosSGU(60, (3, 5), groups=2, activation='gelu', norm=True), torch.randn(2, 7, 11, 60)\n"
        "z = layer(x)\n"
        "with use_backend('reference'): torch.testing.assert_close(z, layer(x), rtol=1e-4, atol=1e-5)\n"
    )
    environment = os.environ | {"POSMLP_CPU_KERNELS": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "POSMLP_CPU_KERNELS must be one of" in done.stderr:
        assert name not in done.stderr.split("must be one of")[1].split(" on this")[0]
        if name != "nonsense":
            pytest.skip(f"this processor has no {name}")
    else:
        assert done.returncode == 0 and name != "nonsense", done.stderr
