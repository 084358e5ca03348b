"""Relative positional encodings: a choice of the relative table.

A table R holds one value for every displacement delta = position(key) - position(query) inside a window,
`[S, 2h-1, 2w-1]`, indexed by `delta + (h-1, w-1)`. The quadratic one is an operator of its own, one call for
each direction: compiled on the CPU, Triton where that is asked for, plain PyTorch elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import choose_able
from .gqpe_table import ops, reference
from .problem import Problem, accumulate_dtype


def gqpe_table(
    center: Tensor, factor: Tensor, window: int | Sequence[int], *, backend: str | None = None
) -> Tensor:
    """The table of the group-wise Gaussian-like quadratic positional encoding (PosMLP, G-GQPE).

    `R_g(delta) = -1/2 (delta - center_g)^T M_g M_g^T (delta - center_g)`, with `M_g = factor[g]`.

    Args:
        center: `[S, d]`, in tokens, in the order of the map's dimensions.
        factor: `[S, d, d]`, a factor of the inverse covariance, in 1 / tokens.
        window: `d` sizes, or one for all dimensions.
        backend: the gate's, which makes the table too where it can; None takes the fastest that can.

    Returns: `[S, *(2*window-1)]`, differentiable in both arguments; float32 for parameters in half
    precision, because a rounded exponent is a wrong weight.
    Raises: `ValueError` for shapes or devices that do not fit or an unknown name, `TypeError` for a dtype
    that is not floating point.
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
    if factor.device != center.device:
        raise ValueError(f"factor must be on center's device {center.device}, got {factor.device}")

    dtype = accumulate_dtype(center.dtype)
    center, factor = center.to(dtype), factor.to(dtype)
    chosen = choose_able(_gate_problem(center, window), ops.BACKENDS, backend).name
    if chosen == "reference":
        return reference.table(center, factor, window)
    return ops.run(chosen, center, factor, window)


def _gate_problem(center: Tensor, window: tuple[int, ...]) -> Problem:
    """The smallest gate that the table serves: what can run it can make its table."""
    return Problem(
        device=center.device,
        dtype=center.dtype,
        batch=1,
        map=window,
        window=window,
        shift=(0,) * len(window),
        groups=center.shape[0],
        channels=center.shape[0],
        softmax=True,
        activation="none",
        eps=None,
    )


def gqpe_isotropic_table(
    center: Tensor, scale: Tensor, window: int | Sequence[int], *, backend: str | None = None
) -> Tensor:
    """The isotropic GQPE, `R_g(delta) = a_g^2 (center_g . delta) - 1/2 |delta|^2`, up to a constant per
    group.

    Completing the square makes it the general table about `a_g^2 center_g` with an identity factor; the row
    softmax does not see the constant that this adds.

    Args: center `[S, d]`, scale `a` `[S]`, window and backend as in `gqpe_table`.
    Returns: `[S, *(2*window-1)]`.
    """
    groups, rank = center.shape
    identity = torch.eye(rank, device=center.device, dtype=center.dtype).expand(groups, rank, rank)
    return gqpe_table(scale.square().unsqueeze(-1) * center, identity, window, backend=backend)
