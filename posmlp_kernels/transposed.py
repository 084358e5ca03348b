"""The transpose of a matrix as a copy, for the gradients of linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .pos_gate import compiled

# Not in a library that was built before it.
_COMPILED = "cpu" in compiled.LOADED and hasattr(torch.ops.posmlp_kernels, "transposed")


def transposed(x: Tensor, ones: int = 0) -> Tensor:
    """`[M, K] -> [K + ones, M]`, contiguous, without gradients: the transpose, and rows of ones below it,
    whose products with something are its sums. On CPUs in float32 at the speed of memory."""
    x = x.detach()
    if _COMPILED and x.is_cpu and x.dtype == torch.float32 and x.stride(1) == 1:
        return torch.ops.posmlp_kernels.transposed(x, ones)
    return torch.cat([x.T, x.new_ones(ones, len(x))]) if ones else x.T.contiguous()
