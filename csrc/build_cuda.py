"""Builds the CUDA back end, as setup.py does: `python csrc/build_cuda.py LIBRARY`, from the project's folder.

One call of nvcc, which needs neither a GPU nor a CUDA build of torch: the stable ABI's headers are the same
in all, and what only a CUDA torch has is looked up when the library is loaded. Honours CUDA_HOME, MAX_JOBS,
and TORCH_CUDA_ARCH_LIST as torch's own builds take it ("8.0;9.0a+PTX"), or "native" for this machine's GPUs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0 12.0"
SOURCES = sorted(str(path) for path in [Path("csrc/module.cpp"), *Path("csrc").rglob("*.cu")])
# No file uses another's device code, so nothing is device-linked: with --threads nvcc would link for all
# architectures at once, into one temporary file, and fails now and then.
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-nodlink", "-cudart=static", "-Xcompiler=-fPIC",
    "--expt-relaxed-constexpr", "-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DLIBRARY=_C_cuda",
)  # fmt: skip


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def code_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list of architectures."""
    if architectures == "native":
        return ["-arch=native"]
    flags = []
    for entry in architectures.replace(";", " ").split():
        number = entry.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if entry.endswith("+PTX") else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def default_architectures(nvcc: str) -> str:
    """Those of `ARCHITECTURES` that this toolkit knows, the last one as PTX too."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [entry for entry in ARCHITECTURES.split() if f"sm_{entry.replace('.', '').rstrip('a')}" in listed]
    return " ".join(known or ARCHITECTURES.split()) + "+PTX"


def main(library: str) -> int:
    """Returns nvcc's exit status; 0 where there is none, once that has been said."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("posmlp-kernels: no CUDA back end without nvcc (install the CUDA toolkit, or set CUDA_HOME)")
        return 0
    from torch.utils.cpp_extension import include_paths, library_paths

    Path(library).parent.mkdir(parents=True, exist_ok=True)
    folders = [*include_paths(), "csrc", "csrc/pos_gate", sysconfig.get_paths()["include"]]
    code = code_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(nvcc))
    jobs = os.environ.get("MAX_JOBS") or str(min(4, os.cpu_count() or 1))
    options = [*FLAGS, *code, f"--threads={jobs}", *(f"-I{folder}" for folder in folders)]
    links = [*(f"-L{folder}" for folder in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    return subprocess.run([nvcc, *options, *SOURCES, *links, "-o", library]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
