"""Relative positional encodings: a choice of the relative table, and the mixing matrix that it generates.

A table R holds one value for every displacement delta = position(key) - position(query) inside a window,
`[S, 2h-1, 2w-1]`, indexed by `delta + (h-1, w-1)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import accumulate_dtype, check_mixing, without_autocast


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


def expand_table(table: Tensor, window: tuple[int, ...]) -> Tensor:
    """`R[S, *(2*window-1)] -> L[S, N, N]`, `L[g, i, j] = R[g, position(j) - position(i)]`."""
    rank = len(window)
    for axis, size in enumerate(window, start=1):
        table = table.unfold(axis, size, 1)  # a row of keys for each query, the last query first
    return table.flip(tuple(range(1, rank + 1))).flatten(1, rank).flatten(2)


def mixing_matrix(
    table: Tensor | None, window: int | Sequence[int], softmax: bool, matrix: Tensor | None = None
) -> Tensor:
    """The mixing matrix `P` of a whole window, query x key, as the operator generates it.

    Args:
        table: `[S, *(2*window-1)]` or None.
        window: one size per map dimension (an int stands for all of the table's dimensions).
        softmax: normalise every row over its keys.
        matrix: `[N, N]` or `[S, N, N]`, added to the table's values before the softmax.

    Returns: `[S, N, N]`. Raises: `ValueError` for shapes that do not fit.
    """
    if isinstance(window, int):
        if table is None:
            raise ValueError(
                f"window must be one size per map dimension where there is no table, got {window!r}"
            )
        window = (window,) * (table.dim() - 1)
    window, _ = check_mixing(table, window, matrix)
    logits = 0 if table is None else expand_table(table, window)
    if matrix is not None:
        logits = logits + matrix
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    return logits.softmax(-1) if softmax else logits
