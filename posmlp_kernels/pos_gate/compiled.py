"""The back ends compiled from csrc/: `cpu`, and `cuda` where nvcc was there to build it."""

from __future__ import annotations

import importlib

import torch

from ..problem import Problem
from . import ops


def _load(module: str, backend: str) -> str | None:
    """Load a compiled library and register its ops; the reason if there is none."""
    try:
        importlib.import_module(f"posmlp_kernels.{module}")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return f"posmlp_kernels.{module} " + ("was not built" if missing else f"does not load ({error})")
    ops.register(backend)
    return None


_CPU_MISSING = _load("_C", "cpu")
_CUDA_MISSING = _load("_C_cuda", "cuda") if torch.version.cuda else "this torch has no CUDA"
LOADED = [name for name, missing in (("cpu", _CPU_MISSING), ("cuda", _CUDA_MISSING)) if not missing]


def cpu_unavailable() -> list[str]:
    return [_CPU_MISSING] if _CPU_MISSING else []


def cpu_unsupported(problem: Problem) -> list[str]:
    return _refusals(problem, "cpu")


def cuda_unavailable() -> list[str]:
    if _CUDA_MISSING:
        return [_CUDA_MISSING]
    return [] if torch.cuda.is_available() else ["there is no CUDA device"]


def cuda_unsupported(problem: Problem) -> list[str]:
    return _refusals(problem, "cuda")


def cuda_declined(problem: Problem) -> list[str]:
    """Why it runs only when asked for by name; measurements on hardware decide this."""
    return ["it has not yet run correctly on hardware"]


def _refusals(problem: Problem, device: str) -> list[str]:
    reasons = []
    if problem.device.type != device:
        reasons.append(f"it runs on {device} tensors, x is on {problem.device}")
    if len(problem.map) > 3:
        reasons.append(f"it takes maps of 1 to 3 dimensions, x has {len(problem.map)}")
    return reasons
