"""The Triton back end: any GPU that Triton serves; its interpreter on a machine with none
(TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from ..problem import Problem
from . import ops

MAX_RANK = 3
MAX_NORM_CHANNELS = 2**16  # a token of the LayerNorm is held in registers


def _constant(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, which would import all of Dynamo to set this mark."""
    function._dynamo_marked_constant = True
    return function


def _forward(*args):
    from .triton_launch import forward  # Triton is optional: imported by the first call, not with the package

    return forward(*args)


def _backward(*args):
    from .triton_launch import backward

    return backward(*args)


@_constant
def _missing() -> str:
    """The reason why nothing can run on this machine, or an empty string."""
    global _missing_reason
    if _missing_reason is None:
        if importlib.util.find_spec("triton") is None:
            _missing_reason = "triton is not installed"
        elif not interpreted() and not torch.accelerator.is_available():
            _missing_reason = "there is no GPU (with TRITON_INTERPRET=1 it runs on the CPU, for tests)"
        else:
            _missing_reason = ""
    return _missing_reason


@_constant
def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, as Triton itself reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


_missing_reason: str | None = None


def unavailable() -> list[str]:
    reason = _missing()
    return [reason] if reason else []


def unsupported(problem: Problem) -> list[str]:
    reasons = []
    if problem.device.type == "cpu" and not interpreted():
        reasons.append("it runs on GPU tensors, x is on cpu (with TRITON_INTERPRET=1 there too, for tests)")
    elif problem.device.type not in ("cpu", "cuda", "xpu"):
        reasons.append(f"it runs on GPU tensors, x is on {problem.device}")
    if interpreted() and problem.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 wrongly")
    if len(problem.map) > MAX_RANK:
        reasons.append(f"it takes maps of at most {MAX_RANK} dimensions, x has {len(problem.map)}")
    if problem.eps is not None and problem.channels > MAX_NORM_CHANNELS:
        reasons.append(f"its norm takes at most {MAX_NORM_CHANNELS} channels, x has {problem.channels}")
    return reasons


def declined(problem: Problem) -> list[str]:
    if problem.device.type == "cpu":
        return ["the interpreter is for tests"]
    return ["it has not yet run correctly on hardware"]


ops.register("triton", _forward, _backward)
