"""The linear layer of the blocks: `nn.Linear`, by whichever of PyTorch's two CPU libraries is faster.

`F.linear` multiplies through MKL, which keeps to AVX2 on processors that are not Intel's, and copies the bias
into the output first. oneDNN, which PyTorch also ships, uses AVX-512 on all of them, adds the bias on the way
out, and reads transposed operands as they lie, for the products of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import is_eager_cpu

# Elsewhere the two libraries come out alike, or nobody has compared them.
_PAYS = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # Inductor's, without a promise
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


class Linear(nn.Linear):
    """`[..., in_features] -> [..., out_features]`, in float32 on CPUs in less time than `nn.Linear` takes.

    Gradients of every order are right. What is no eager call on ordinary tensors meets `F.linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _onednn_serves(x, self.weight, self.bias):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _OneDNNLinear.apply(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias)


def _onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _PAYS
        and torch.backends.mkldnn.enabled
        and is_eager_cpu(x, weight, bias)
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.dim() > 1
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # else F.linear says what is wrong
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for `[..., K]` and `[N, K]`, any strides."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, drows = x.flatten(0, -2), dy.flatten(0, -2)  # [M, K], [M, N]
        if torch.is_grad_enabled():  # somebody wants gradients of the gradients
            dx, dweight = dy @ weight, drows.T @ rows
        else:
            dx = _product(dy, weight.T) if needs_x else None
            dweight = _weight_gradient(rows, drows) if needs_weight else None
        return dx, dweight, drows.sum(0) if needs_bias else None


def _weight_gradient(rows: Tensor, drows: Tensor) -> Tensor:
    """`[M, K], [M, N] -> [N, K]`. oneDNN copies its first operand if that is transposed: the smaller one."""
    if rows.shape[1] < drows.shape[1]:
        return _product(rows.T, drows.T).T
    return _product(drows.T, rows.T)
