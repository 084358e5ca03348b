"""`pos_gate`: the public face of the operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .dispatch import choose, describe
from .problem import Norm, Problem, accumulate_dtype, check


def pos_gate(
    x: Tensor,
    table: Tensor | None,
    bias: Tensor | None = None,
    *,
    window: int | Sequence[int],
    softmax: bool,
    matrix: Tensor | None = None,
    shift: int | Sequence[int] | None = None,
    activation: str = "none",
    norm: Norm | None = None,
    backend: str | None = None,
) -> Tensor:
    """Windowed, grouped, positional spatial gating: `Z = (P_g X1 + b) * X2` (PosMLP, the PosSGU).

    The map is cut into windows from its origin; a window may stick out of the map, and the tokens that it
    has outside are absent: they add nothing and are left out of the softmax. Channel `c` belongs to group `c
    // (C / S)`.

    Args:
        x: `[B, *map, 2C]`, a map of any rank. The first C channels are mixed, the others gate.
        table: `[S, *(2*window-1)]`, the relative table (see `gqpe_table`), or None.
        bias: `[N]`, added to the mixed tokens by their place in the window.
        window: tokens per map dimension.
        softmax: normalise every row of the mixing matrix over its keys.
        matrix: `[N, N]` or `[S, N, N]`, query x key, added to the table's values before the softmax.
        shift: moves the window grid by `-shift`, in tokens.
        activation: "none", "gelu" (exact) or "gelu_tanh", applied to all of x first.
        norm: `(weight [C], bias [C], eps)`, a LayerNorm on X1 over its channels, after the activation.
        backend: a name from `backends()`; None takes the fastest that supports the problem.

    Parameters may be in x's dtype, or in float32 where x is bfloat16 or float16; sums are kept in float32
    (float64 for float64). Returns: `[B, *map, C]` in x's dtype, differentiable in x and all parameters.
    `explain` takes the same arguments and says which back end runs.

    Raises: `TypeError` for a wrong type or dtype, `ValueError` for a wrong shape, value, device or unknown
    name, `NotImplementedError` with the reasons where the named back end cannot run this problem.
    """
    problem = check(
        x, table, bias, matrix, norm, window=window, softmax=softmax, shift=shift, activation=activation
    )
    return choose(problem, backend).run(_inputs(x, table, bias, matrix, norm, problem), problem)


def explain(
    x: Tensor | None = None,
    table: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    window: int | Sequence[int] | None = None,
    softmax: bool = True,
    matrix: Tensor | None = None,
    shift: int | Sequence[int] | None = None,
    activation: str = "none",
    norm: Norm | None = None,
    backend: str | None = None,
) -> str:
    """Which back end runs a call of `pos_gate` with these arguments, and every reason against the others.

    Without arguments: what can run on this machine. Returns a text with a line per back end.
    """
    if x is None:
        return describe(None)
    problem = check(
        x, table, bias, matrix, norm, window=window, softmax=softmax, shift=shift, activation=activation
    )
    return describe(problem, backend)


def _inputs(
    x: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm: Norm | None,
    problem: Problem,
) -> tuple[Tensor | None, ...]:
    """What back ends get: parameters in the accumulation dtype, a norm with both of its parameters."""
    dtype = accumulate_dtype(x.dtype)
    norm_weight = norm_bias = None
    if norm is not None:
        norm_weight, norm_bias, _ = norm
        norm_weight = x.new_ones(problem.channels, dtype=dtype) if norm_weight is None else norm_weight
        norm_bias = x.new_zeros(problem.channels, dtype=dtype) if norm_bias is None else norm_bias
    parameters = (table, bias, matrix, norm_weight, norm_bias)
    return x, *(p if p is None or p.dtype == dtype else p.to(dtype) for p in parameters)
