"""The CUDA back end without a GPU: its code on an emulated device, and what nvcc makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
INCLUDE = ["-I", str(SOURCES / "pos_gate"), "-I", str(SOURCES / "gqpe_table"), "-I", str(HERE)]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function that compiles a program of this folder."""
    folder = tmp_path_factory.mktemp("cuda")

    def program(name: str) -> str:
        path = folder / name
        if not path.exists():
            # A fortified longjmp would refuse to change stacks.
            command = [COMPILER, "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", *INCLUDE]
            subprocess.run([*command, str(HERE / f"{name}.cpp"), "-o", str(path)], check=True)
        return str(path)

    return program


def run(*command):
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
def test_kernels_equal_the_definition(compiled):
    done = run(compiled("test_cuda"))
    assert done.returncode == 0 and done.stdout.rstrip().endswith(" 0 failed"), done.stdout + done.stderr


@needs_compiler
def test_products_on_tensor_cores_equal_their_sums(compiled):
    done = run(compiled("test_cuda_tensor"), "24")
    assert done.returncode == 0 and done.stdout.rstrip().endswith(" 0 failed"), done.stdout + done.stderr


@needs_compiler
def test_p_made_from_the_table_equals_p_as_it_is_stored(compiled):
    done = run(compiled("test_cuda_rebuild"))
    assert done.returncode == 0 and done.stdout.endswith(" 0 failed\n"), done.stdout + done.stderr


@needs_compiler
def test_the_quadratic_table_equals_the_cpu_s(compiled):
    done = run(compiled("test_cuda_table"))
    assert done.returncode == 0 and done.stdout.endswith(" 0 failed\n"), done.stdout + done.stderr


@needs_compiler
def test_every_chip_gets_a_cut_that_fits(compiled):
    done = run(compiled("test_cuda_plan"))
    assert done.returncode == 0 and done.stdout == "0 failed\n", done.stdout + done.stderr


@needs_compiler
def test_the_emulator_does_what_the_instructions_do(compiled):
    done = run(compiled("test_emulator"))
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = {
    "1": "63 of 64 threads wait at sync_threads; the others have returned",
    "2": "1 lanes of a warp wait at shuffle_xor; the others wait elsewhere",
    "3": "copy_async: outside of shared memory",
    "4": "copy_async: needs addresses aligned to 4 bytes",
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_reports_faults(compiled, fault):
    done = run(compiled("test_emulator"), fault)
    assert done.returncode < 0 and FAULTS[fault] in done.stderr


@needs_compiler
def test_a_copy_that_is_not_awaited_shows_in_the_results(compiled):
    assert run(compiled("test_emulator"), "5").returncode == 1


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_nvcc_compiles_the_kernels_without_warnings_or_spills(tmp_path):
    options = ["-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80", "-Werror", "all-warnings"]
    command = [NVCC, *options, "-Xptxas", "-v", *INCLUDE, "-cubin", "-o", str(tmp_path / "kernels.cubin")]
    done = run(*command, str(HERE / "instantiate.cu"))
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    kernels = re.findall(r"Compiling entry function '\w*enter\w*'", done.stderr)
    assert len(frames) == len(kernels) >= 30
    assert set(frames) == {("0", "0")}, done.stderr
