"""Compiles the table's Triton kernels for chips that are not here, as calls of its ops would launch them.

Prints a JSON line per kernel, chip and call, as benchmarks/triton_resources.py does. It runs in a process
of its own, without Triton's interpreter; launches are caught after compilation.
"""

from __future__ import annotations

import json

import torch
from triton.runtime import JITFunction, driver

from benchmarks.triton_resources import CHIPS, NoGpu
from posmlp_kernels.gqpe_table import triton

WINDOWS = ((14, 14), (7,), (2, 4, 4))  # PosMLP's, and the other ranks


def call(window: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward and backward."""
    rank = len(window)
    center, factor = torch.zeros(2, rank, dtype=dtype), torch.zeros(2, rank, rank, dtype=dtype)
    triton.backward(triton.forward(center, factor, window), center, factor, window)


def main() -> None:
    compile_and_run = JITFunction.run
    limit = 0

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        print(json.dumps({"kernel": self.__name__, "shared": kernel.metadata.shared, "limit": limit}))
        return kernel

    JITFunction.run = compile_only
    for target, kilobytes in CHIPS.values():
        driver.set_active(NoGpu(target))
        limit = kilobytes * 1024
        for window in WINDOWS:
            call(window, torch.float32)
        call(WINDOWS[0], torch.float64)


if __name__ == "__main__":
    main()
