"""Relative positional encodings: a choice of the relative table.

A table R holds one value for every displacement delta = position(key) - position(query) inside a window,
`[S, 2h-1, 2w-1]`, indexed by `delta + (h-1, w-1)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import accumulate_dtype, without_autocast


def gqpe_table(center: Tensor, factor: Tensor, window: int | Sequence[int]) -> Tensor:
    """The table of the group-wise Gaussian-like quadratic positional encoding (PosMLP, G-GQPE).

    `R_g(delta) = -1/2 (delta - center_g)^T M_g M_g^T (delta - center_g)`, with `M_g = factor[g]`.

    Args:
        center: `[S, d]`, in tokens, in the order of the map's dimensions.
        factor: `[S, d, d]`, a factor of the inverse covariance, in 1 / tokens.
        window: `d` sizes, or one for all dimensions.

    Returns: `[S, *(2*window-1)]`, differentiable in both arguments; float32 for parameters in half
    precision, because a rounded exponent is a wrong weight.
    Raises: `ValueError` for shapes that do not fit, `TypeError` for a dtype that is not floating point.
    """
    if not center.is_floating_point() or center.dtype != factor.dtype:
        raise TypeError(
            f"center and factor must share a floating-point dtype, got {center.dtype} and {factor.dtype}"
        )
    if center.dim() != 2 or center.shape[1] < 1:
        raise ValueError(f"center must be [S, d], got {list(center.shape)}")
    groups, rank = center.shape
    if tuple(factor.shape) != (groups, rank, rank):
        raise ValueError(f"factor must be [S, d, d] = {[groups, rank, rank]}, got {list(factor.shape)}")
    window = (window,) * rank if isinstance(window, int) else tuple(window)
    if len(window) != rank or min(window) < 1:
        raise ValueError(f"window must be {rank} sizes of at least 1, got {list(window)}")

    dtype = accumulate_dtype(center.dtype)
    center, factor = center.to(dtype), factor.to(dtype)
    axes = [torch.arange(1 - w, w, device=center.device, dtype=dtype) for w in window]
    delta = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # [*(2*window-1), d]
    centers = center.view(groups, *(1,) * rank, rank)
    with without_autocast(center.device):
        projected = (delta - centers).flatten(1, -2) @ factor  # [S, prod(2*window-1), d]
    return (-0.5 * projected.square().sum(-1)).view(groups, *(2 * w - 1 for w in window))


def gqpe_isotropic_table(center: Tensor, scale: Tensor, window: int | Sequence[int]) -> Tensor:
    """The isotropic GQPE, `R_g(delta) = a_g^2 (center_g . delta) - 1/2 |delta|^2`, up to a constant per
    group.

    Completing the square makes it the general table about `a_g^2 center_g` with an identity factor; the row
    softmax does not see the constant that this adds.

    Args: center `[S, d]`, scale `a` `[S]`, window as in `gqpe_table`. Returns: `[S, *(2*window-1)]`.
    """
    groups, rank = center.shape
    identity = torch.eye(rank, device=center.device, dtype=center.dtype).expand(groups, rank, rank)
    return gqpe_table(scale.square().unsqueeze(-1) * center, identity, window)
