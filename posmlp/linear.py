"""The linear layer of the blocks: `nn.Linear`, by whichever of PyTorch's two CPU libraries is faster.

`F.linear` multiplies through MKL, which keeps to AVX2 on processors that are not Intel's, and copies the bias
into the output first. oneDNN, which PyTorch also ships, uses AVX-512 on all of them, adds the bias (and what
else is to be added) on the way out, and reads a second operand as it lies, transposed or not. With AVX2 it is
no faster than MKL but for that. In bfloat16 `F.linear` asks oneDNN too, but for the bias and what else is to
be added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posmlp_kernels.transposed import transposed

from .eager import is_eager_or_compiled_cpu

# Elsewhere the two ways come out alike, or nobody has compared them.
_PAYS = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # Inductor's, without a promise
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
)
# Whether it multiplies faster than MKL: gradients too, and weights by columns.
_MULTIPLIES_FASTER = torch.backends.cpu.get_cpu_capability() == "AVX512"
_PAYS_IN_BFLOAT16 = _PAYS and torch.cpu._is_amx_tile_supported()  # in inference
# Beside which a copy of the weight by columns costs less than what oneDNN gains by it.
_MANY_ROWS = 1024


class Linear(nn.Linear):
    """`[..., in_features] -> [..., out_features]`, on CPUs in less time than `nn.Linear` takes: in float32,
    and in inference in bfloat16 where there is AMX.

    `plus`, of the output's shape, is added to it. In float32 where there is AVX-512 the weight lies in memory
    by columns, which oneDNN multiplies faster where x has few rows, and so does its gradient; by rows
    otherwise.
    Gradients of every order are right. What is neither an eager call on ordinary tensors nor traced by
    `torch.compile` meets `F.linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._lay_out()

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        super()._apply(function, recurse)
        self._lay_out()  # for the device and dtype that it may have now
        return self

    def _lay_out(self) -> None:
        """Moves the weight's numbers to where they are multiplied fastest; the parameter stays the same."""
        weight = self._parameters.get("weight")
        # Not what a parametrisation computes, what other processes see, or what must not be changed.
        if type(weight) is not nn.Parameter or weight.is_shared() or weight.is_inference() or not _PAYS:
            return
        by_columns = _MULTIPLIES_FASTER and weight.is_cpu and weight.dtype == torch.float32
        if not (weight.T if by_columns else weight).is_contiguous():
            data = weight.detach()
            weight.data = data.T.contiguous().T if by_columns else data.contiguous()

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if not _onednn_serves(x, self.weight, self.bias, plus):
            y = F.linear(x, self.weight, self.bias)
            return y if plus is None else plus + y
        if torch.is_grad_enabled():
            return _OneDNNLinear.apply(x, self.weight, self.bias, plus)
        return product(x, self.weight, self.bias, plus)


def pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of that type, as far as machine, settings and gradients decide it."""
    if dtype == torch.float32:
        return _PAYS and torch.backends.mkldnn.enabled
    # A backward would have to copy both of its operands: oneDNN is slow where bfloat16 lies by columns.
    in_bfloat16 = dtype == torch.bfloat16 and not torch.is_grad_enabled()
    return in_bfloat16 and _PAYS_IN_BFLOAT16 and torch.backends.mkldnn.enabled


def _onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None) -> bool:
    return (
        pays(weight.dtype)
        and is_eager_or_compiled_cpu(x, weight, bias, plus)
        and all(t is None or t.dtype == weight.dtype for t in (x, bias, plus))
        and x.dim() > 1
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # else F.linear says what is wrong
        and (bias is None or bias.shape == weight.shape[:1])  # else it is broadcast, or F.linear says so
        and (plus is None or plus.shape == (*x.shape[:-1], weight.shape[0]))  # else it is broadcast
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias + plus` for `[..., K]` and `[N, K]`, any strides."""
    if torch.compiler.is_compiling():
        return torch.ops.posmlp.linear(x, weight, bias, plus)
    if weight.dtype != torch.float32:
        weight = weight.contiguous()  # as it is, unless somebody put in one of their own
    elif _MULTIPLIES_FASTER and weight.is_contiguous() and x.numel() >= _MANY_ROWS * x.shape[-1]:
        weight = transposed(weight).T
    if plus is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias, plus)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_plus = ctx.needs_input_grad
        # Of expanded tensors, such as a sum's gradient, oneDNN's products take a thousand times as long.
        x, dy = x.contiguous(), dy.contiguous()
        rows, drows = x.flatten(0, -2), dy.flatten(0, -2)  # [M, K], [M, N]
        dweight = dbias = None
        if torch.is_grad_enabled() or not _MULTIPLIES_FASTER:  # the first, for gradients of gradients
            dx = dy @ weight if needs_x else None
            dweight = drows.T @ rows if needs_weight else None
            dbias = drows.sum(0) if needs_bias else None
        else:
            dx = product(dy, weight.T) if needs_x else None
            if needs_weight:
                dweight, dbias = _parameter_gradients(rows, drows, needs_bias)
            elif needs_bias:
                dbias = drows.sum(0)
        return dx, dweight, dbias if needs_bias else None, dy if needs_plus else None


def _parameter_gradients(rows: Tensor, drows: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """`[M, K], [M, N] -> [N, K], [N]`: the weight's, by columns, and the bias's, empty if nobody wants it.

    oneDNN wants its first operand by rows, so that one of the two has to be transposed: the smaller one.
    Gradients are summed where they pass anyway: in the product, as that of one more row, of ones, or out of
    caches that the copy has just filled.
    """
    if torch.compiler.is_compiling():
        return torch.ops.posmlp.linear_parameter_gradients(rows, drows, bias)
    if rows.shape[1] <= drows.shape[1]:
        sums = product(transposed(rows, ones=int(bias)), drows.T)
        return sums[: rows.shape[1]].T, sums[rows.shape[1] :].flatten().clone()
    columns = transposed(drows)
    return transposed(product(columns, rows.T)).T, columns.sum(1) if bias else drows.new_empty(0)


# What torch.compile puts into its graphs for the two functions. Left to itself, Inductor would multiply by
# MKL, or ask for weights that are constants.
_library = torch.library.Library("posmlp", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? plus) -> Tensor")
_library.define("linear_parameter_gradients(Tensor rows, Tensor drows, bool bias) -> (Tensor, Tensor)")
_library.impl("linear", product, "CPU")
_library.impl("linear_parameter_gradients", _parameter_gradients, "CPU")


@torch.library.register_fake("posmlp::linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("posmlp::linear_parameter_gradients", lib=_library)
def _(rows: Tensor, drows: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    width = drows.shape[1]
    return rows.new_empty(rows.shape[1], width).T, rows.new_empty(width if bias else 0)
