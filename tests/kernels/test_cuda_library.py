"""The compiled CUDA library as far as it can be looked at without a GPU: what it holds, and what it takes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posmlp_kernels.gqpe_table import ops as table_ops
from posmlp_kernels.pos_gate import compiled

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = next(iter((ROOT / "posmlp_kernels").glob("_C_cuda*.so")), None)
ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}

needs_library = pytest.mark.skipif(LIBRARY is None, reason="there was no nvcc to build it")


def cuobjdump(*arguments: str) -> str:
    """The output of CUDA's tool, which Triton brings along too."""
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")):
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        tool = str(bundled) if bundled.exists() else None
    if tool is None:
        pytest.skip("there is no cuobjdump")
    command = [tool, *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """By architecture and kernel: registers and bytes of stack, which is where spills go."""
    found, architecture, kernel = {}, "", ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[architecture, kernel] = {"registers": int(match[1]), "stack": int(match[2])}
    return found


@needs_library
@pytest.mark.skipif("TORCH_CUDA_ARCH_LIST" in os.environ, reason="it was asked for others")
def test_it_is_built_for_every_architecture(resources):
    built = {architecture for architecture, _ in resources}
    assert built >= ARCHITECTURES, "the toolkit does not know them all, or the build has lost some"
    assert "sm_120.ptx" in cuobjdump("--list-ptx"), "newer chips need PTX"


@needs_library
def test_products_do_not_spill(resources):
    kernels = {name for _, name in resources if "QuadraticTable" not in name and "enter" in name}
    assert len(kernels) >= 30
    spilling = {key: used for key, used in resources.items() if key[1] in kernels and used["stack"]}
    assert not spilling
    tensor = {key: used["registers"] for key, used in resources.items() if "Tensor" in key[1]}
    assert len(tensor) >= 8 * len({architecture for architecture, _ in resources})
    assert max(tensor.values()) <= 65536 // 256, "a block of 8 warps must fit into a multiprocessor"
    # cuda_tensor_plan.h reckons with these, for the gate and the product by columns.
    shared_out = {key: n for key, n in tensor.items() if re.search(r"ProductKernel.*ProductE[02]E", key[1])}
    assert len(shared_out) == 4 * len({architecture for architecture, _ in resources})
    for (architecture, kernel), registers in shared_out.items():
        generation = int(re.search(r"\d+", architecture)[0])
        assert registers <= (144 if generation < 100 else 160), (architecture, kernel)


@needs_library
@pytest.mark.skipif(not torch.version.cuda, reason="this torch has no CUDA, which the library needs to load")
def test_its_ops_have_schemas_and_fakes():
    """Loaded beside a CUDA torch, with or without a GPU: the ops are there, and trace."""
    assert not compiled._CUDA_MISSING
    assert "cuda" in table_ops.BACKENDS
    x = torch.empty(2, 7, 9, 12, device="meta")
    z = torch.ops.posmlp_kernels.pos_gate.cuda(
        x, torch.empty(3, 5, 5, device="meta"), None, None, None, None, [3, 3], [0, 0], True, 0, -1.0
    )
    assert z.shape == (2, 7, 9, 6)


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_is_never_chosen():
    reason = compiled.cuda_unavailable()
    assert reason and ("no CUDA" in reason[0])


def test_an_older_toolkit_builds_for_what_it_knows(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_80 sm_86 sm_89 sm_90\n")
    nvcc.chmod(0o755)
    code = f"import build_cuda; print(build_cuda.default_architectures({str(nvcc)!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "csrc", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8.0", "8.6", "8.9", "9.0a+PTX"]


def test_architectures_are_read_as_torch_reads_them():
    code = "import build_cuda; print(*build_cuda.code_flags('8.0;9.0a 12.0+PTX'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "csrc", capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
