"""Compiles every Triton kernel for a chip that is not here, as a call of the operator would launch it.

    python tests/kernels/triton_compiles.py sm_90

Prints a JSON line per kernel: its name, the call, the shared memory that it needs and what the chip has. It
runs in a process of its own, without Triton's interpreter; launches are caught after compilation.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from posmlp_kernels.pos_gate import triton_launch

# The chip, and the kilobytes of shared memory that a program may have on it.
CHIPS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "sm_120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}


@dataclass(frozen=True)
class Launch:
    """A call whose kernels are compiled, and why it is worth it."""

    why: str
    window: int
    dtype: torch.dtype
    activation: int = 0
    norm: bool = False
    shift: tuple[int, int] = (0, 0)
    softmax: bool = True


CALLS = (
    Launch("stages 1 to 3 of PosMLP in a block", 14, torch.bfloat16, activation=1),
    Launch("stage 4, and the norm's kernels", 7, torch.bfloat16, norm=True),
    Launch("a window too large to be kept, shifted", 24, torch.bfloat16, shift=(12, 12)),
    Launch("the largest window of the benchmarks, a learned table", 32, torch.float16, softmax=False),
    Launch("full precision: the operands are twice as large", 14, torch.float32, activation=2),
)


class NoGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch(call: Launch) -> None:
    """Forward and backward with all gradients; group width 24, as in PosMLP-T."""
    window, channels, tokens = (call.window,) * 2, 48, call.window**2
    side = 2 * call.window + any(call.shift)
    x = torch.zeros(2, side, side, 2 * channels, dtype=call.dtype)
    table, bias = torch.zeros(2, *(2 * w - 1 for w in window)), torch.zeros(tokens)
    norm = torch.zeros(2, channels) if call.norm else (None, None)
    eps = 1e-5 if call.norm else -1.0
    inputs = (x, table, bias, None, *norm, window, call.shift, call.softmax, call.activation, eps)
    triton_launch.forward(*inputs)
    triton_launch.backward(torch.zeros(2, side, side, channels, dtype=call.dtype), *inputs, True)


def main(chip: str) -> None:
    target, kilobytes = CHIPS[chip]
    driver.set_active(NoGpu(target))
    triton_launch.shared_memory = lambda device: kilobytes * 1024
    compile_and_run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        line = {"kernel": self.__name__, "call": call.why, "shared": kernel.metadata.shared}
        print(json.dumps(line | {"limit": kilobytes * 1024}), flush=True)
        return kernel

    JITFunction.run = compile_only
    for call in CALLS:
        launch(call)


if __name__ == "__main__":
    main(sys.argv[1])
