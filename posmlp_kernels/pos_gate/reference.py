"""The operator in plain PyTorch: the specification that every back end is held to.

    Z[i, c] = (sum_j P_g[i, j] X1[j, c] + b[i]) X2[i, c]        (PosMLP's positional spatial gating unit)

Any device, any floating dtype, differentiable to any order. It cuts windows by padding, and leaves out the
tokens that a window has outside the map by a mask; the fast back ends do the same by address.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mixing import mixing_matrix
from ..problem import Problem, accumulate_dtype, without_autocast


def gate(
    x: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    problem: Problem,
) -> Tensor:
    """`x [B, *map, 2C] -> z [B, *map, C]`, computed in x's dtype; parameters must have that dtype too."""
    p = problem
    x1, x2 = activate(x, p.activation).chunk(2, -1)
    if p.eps is not None:
        x1 = F.layer_norm(x1, (p.channels,), norm_weight, norm_bias, p.eps)

    tokens = cut_windows(x1, p).unflatten(-1, (p.groups, -1))  # [B, T, N, S, D]
    if p.softmax and p.has_partial_windows:
        present = cut_windows(x1.new_ones(1, *p.map, 1), p)[0, :, None, None, :, 0]  # [T, 1, 1, N]
        logits = mixing_matrix(table, p.window, False, matrix)  # [S, N, N]
        weights = logits.masked_fill(present == 0, -torch.inf).softmax(-1)  # [T, S, N, N]
        mixed = torch.einsum("tgij,btjgd->btigd", weights, tokens)
    else:
        weights = mixing_matrix(table, p.window, p.softmax, matrix)  # [S, N, N]
        mixed = torch.einsum("gij,btjgd->btigd", weights, tokens)
    if bias is not None:
        mixed = mixed + bias[:, None, None]
    return join_windows(mixed.flatten(-2), p) * x2


def run(
    x: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    problem: Problem,
) -> Tensor:
    """`gate` in the accumulation dtype, which the parameters have already, rounded once to x's dtype."""
    x_wide = x.to(accumulate_dtype(x.dtype))
    with without_autocast(x.device):
        return gate(x_wide, table, bias, matrix, norm_weight, norm_bias, problem).to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def cut_windows(x: Tensor, p: Problem) -> Tensor:
    """`[B, *map, C] -> [B, T, N, C]`; tokens outside the map are zeros."""
    padding = [0, 0]
    for size, window, shift in zip(reversed(p.map), reversed(p.window), reversed(p.shift), strict=True):
        padding += [shift, -(size + shift) % window]
    x, rank = F.pad(x, padding), len(p.map)
    for axis in reversed(range(rank)):
        x = x.unflatten(axis + 1, (-1, p.window[axis]))  # [B, th, h, tw, w, C]
    return (
        x.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), -1)
        .flatten(rank + 1, -2)
        .flatten(1, rank)
    )


def join_windows(x: Tensor, p: Problem) -> Tensor:
    """`[B, T, N, C] -> [B, *map, C]`, the inverse of `cut_windows`."""
    rank = len(p.map)
    counts = [
        -(-(size + shift) // window) for size, window, shift in zip(p.map, p.window, p.shift, strict=True)
    ]
    x = x.unflatten(2, p.window).unflatten(1, counts)  # [B, th, tw, h, w, C]
    x = x.permute(0, *(axis for d in range(rank) for axis in (1 + d, 1 + rank + d)), -1)
    for axis in range(rank):
        x = x.flatten(axis + 1, axis + 2).narrow(axis + 1, p.shift[axis], p.map[axis])
    return x
