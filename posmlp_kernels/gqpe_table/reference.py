"""The quadratic table in plain PyTorch: the specification that its back ends are held to.

    R_g(delta) = -1/2 |M_g^T (delta - center_g)|^2        (PosMLP's G-GQPE)

Any device, any rank, differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import without_autocast


def table(center: Tensor, factor: Tensor, window: Sequence[int]) -> Tensor:
    """`center [S, d], factor [S, d, d] -> [S, *(2*window-1)]`, in their dtype."""
    groups, rank = center.shape
    axes = [torch.arange(1 - w, w, device=center.device, dtype=center.dtype) for w in window]
    delta = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # [*(2*window-1), d]
    centers = center.reshape(groups, *(1,) * rank, rank)
    with without_autocast(center.device):
        projected = (delta - centers).flatten(1, -2) @ factor  # [S, prod(2*window-1), d]
    return (-0.5 * projected.square().sum(-1)).view(groups, *(2 * w - 1 for w in window))
