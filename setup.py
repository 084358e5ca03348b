"""Builds posmlp_kernels._C where there is a C++ compiler; without one the package installs in pure Python.

One library serves every Python from 3.10 and every torch from 2.10 (stable ABI). The environment variables
CXX, MAX_JOBS and POSMLP_SKIP_CPU=1 are honoured.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

CPU_SOURCES = sorted(str(path) for path in [Path("csrc/module.cpp"), *Path("csrc").rglob("cpu_*.cpp")])
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
STABLE_ABI = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Not -ffast-math: it would flush subnormals in the whole process and lose NaN.
OPTIMISE = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]


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
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def without_extension(reason: str) -> dict:
    print(f"posmlp-kernels: installing without the compiled CPU back end: {reason}", file=sys.stderr)
    return {}


arguments = cpu_extension()
if "ext_modules" in arguments:
    arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(**arguments)
