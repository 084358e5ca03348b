"""What a user would write instead of the operator, at its best in plain PyTorch; and no operator at all."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from posmlp_kernels import PosSGU, mixing_matrix

M = TypeVar("M", bound=nn.Module)

_NEGLIGIBLE = (
    1e-30  # weights that no sum can see; as subnormals they would slow the product down several times
)


def mixing(table: Tensor, window: int, softmax: bool = True, matrix: Tensor | None = None) -> Tensor:
    """P `[S, N, N]` from the table, without weights that only cost time."""
    weights = mixing_matrix(table, window, softmax, matrix)
    return weights.masked_fill(weights < _NEGLIGIBLE, 0.0) if softmax else weights


def gate(x: Tensor, weights: Tensor, bias: Tensor, window: int) -> Tensor:
    """`[B, H, W, 2C] -> [B, H, W, C]` for maps that the windows tile; P `[S, N, N]` is given.

    One batched product over the groups, with (window, channel) as its long axis: measured, this is faster
    than an einsum or a product per window.
    """
    batch, height, width, channels = x.shape
    groups, rows, columns = weights.shape[0], height // window, width // window
    mixed, factor = x.chunk(2, -1)
    # [B, rows, h, columns, w, S, D] -> [S, N, B * rows * columns * D]
    mixed = mixed.reshape(batch, rows, window, columns, window, groups, -1)
    mixed = mixed.permute(5, 2, 4, 0, 1, 3, 6).reshape(groups, window * window, -1)
    mixed = torch.baddbmm(bias.view(1, -1, 1), weights, mixed)
    mixed = mixed.view(groups, window, window, batch, rows, columns, -1)
    mixed = mixed.permute(3, 4, 1, 5, 2, 0, 6)
    return mixed.reshape(batch, height, width, channels // 2) * factor


class FreeGate(nn.Module):
    """Takes a gate's place and no time: `[..., 2C] -> [..., C]`, zeros made once, as are its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def replace_gates(cls, model: M) -> M:
        """The model itself, every `PosSGU` in it replaced."""
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, PosSGU):
                    free = cls()
                    free.dim = child.dim
                    setattr(module, name, free)
        return model

    def forward(self, x: Tensor) -> Tensor:
        return _Free.apply(x, self.zeros)


class _Free(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, zeros: dict[tuple[int, ...], Tensor]) -> Tensor:
        ctx.zeros, ctx.shape = zeros, tuple(x.shape)
        return _zeros_like(x, zeros, (*x.shape[:-1], x.shape[-1] // 2))

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None]:
        return _zeros_like(dz, ctx.zeros, ctx.shape), None


def _zeros_like(x: Tensor, zeros: dict[tuple[int, ...], Tensor], shape: tuple[int, ...]) -> Tensor:
    if shape not in zeros:
        zeros[shape] = x.new_zeros(shape)
    return zeros[shape].detach()
