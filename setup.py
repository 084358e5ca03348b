"""Builds posmlp_kernels._C where there is a C++ compiler, and _C_cuda where there is nvcc besides.

Without them the package installs in pure Python. One build serves every Python from 3.10 and every torch from
2.10 (stable ABI). Honours CXX, MAX_JOBS, POSMLP_SKIP_CPU=1, POSMLP_SKIP_CUDA=1, and what build_cuda.py does.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

CPU_SOURCES = sorted(str(path) for path in [Path("csrc/module.cpp"), *Path("csrc").rglob("cpu_*.cpp")])
# What _C_cuda depends on, not its sources: for a .cu among those torch's build wants a torch with CUDA,
# of the toolkit's major version, and else gives up on _C too. build_cuda.py needs neither.
CUDA_SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cu*"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
STABLE_ABI = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Not -ffast-math: it would flush subnormals in the whole process and lose NaN. GCC stops inlining where a
# file has grown by 40 %, and a file of kernels is nothing but templates to be inlined.
OPTIMISE = [
    "-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "--param=inline-unit-growth=400",
    "-falign-loops=64",  # a product's inner loop is slower where it begins amid a cache line
]  # fmt: skip


def find_compiler() -> str | None:
    """The C++ compiler that torch's build would call."""
    candidates = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    return next((name for name in candidates if name and shutil.which(name)), None)


def cpu_extension() -> dict:
    """The setup() arguments that build `_C`; none, with a line that says why, where it cannot be built."""
    if os.environ.get("POSMLP_SKIP_CPU") == "1":
        return without_extension("POSMLP_SKIP_CPU=1")
    if sys.platform == "win32":
        return without_extension("Windows' compiler has no vector extension; use clang under WSL")
    if find_compiler() is None:
        return without_extension("no C++ compiler found (install g++ or clang++, or set CXX)")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without_extension(f"torch cannot be imported while building ({error})")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return without_extension(f"torch {torch.__version__} is older than 2.10")
    extension = CppExtension(
        "posmlp_kernels._C",
        CPU_SOURCES,
        depends=HEADERS,
        extra_compile_args=STABLE_ABI + OPTIMISE,
        py_limited_api=True,
    )
    os.environ.setdefault("MAX_JOBS", str(min(4, os.cpu_count() or 1)))

    class Build(BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            if not ext.name.endswith("_cuda"):
                return super().build_extension(ext)
            command = [sys.executable, "csrc/build_cuda.py", self.get_ext_fullpath(ext.name)]
            if subprocess.run(command).returncode:
                print("posmlp-kernels: installing without the CUDA back end: nvcc failed", file=sys.stderr)

    modules = [extension]
    if os.environ.get("POSMLP_SKIP_CUDA") != "1" and (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
        modules.append(
            Extension(
                "posmlp_kernels._C_cuda",
                ["csrc/build_cuda.py"],
                depends=CUDA_SOURCES + HEADERS,
                py_limited_api=True,
                optional=True,
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


def without_extension(reason: str) -> dict:
    print(f"posmlp-kernels: installing without the compiled CPU back end: {reason}", file=sys.stderr)
    return {}


arguments = cpu_extension()
if "ext_modules" in arguments:
    arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(**arguments)
