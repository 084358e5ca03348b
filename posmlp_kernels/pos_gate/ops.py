"""The operator's ops, `posmlp_kernels::pos_gate.<backend>` and `posmlp_kernels::pos_gate_backward.<backend>`:
their schema, fakes and reference. Parameters come in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..problem import ACTIVATIONS, Problem, accumulate_dtype
from ..registration import Operator
from . import reference

_INPUTS = "Tensor x, Tensor? table, Tensor? bias, Tensor? matrix, Tensor? norm_weight, Tensor? norm_bias"
_SETTINGS = "int[] window, int[] shift, bool softmax, int activation, float eps"
FORWARD_SCHEMA = f"({_INPUTS}, {_SETTINGS}) -> Tensor"
_GRADIENTS = ", ".join(["Tensor"] * 6)
BACKWARD_SCHEMA = f"(Tensor dz, {_INPUTS}, {_SETTINGS}, bool mixing_grad) -> ({_GRADIENTS})"
_INPUT_COUNT = 6


def settings_of(problem: Problem) -> tuple:
    """The op's arguments that are not tensors."""
    eps = -1.0 if problem.eps is None else problem.eps
    return problem.window, problem.shift, problem.softmax, ACTIVATIONS.index(problem.activation), eps


@cache
def settings_without_norm(
    window: tuple[int, ...], shift: tuple[int, ...], softmax: bool, activation: str
) -> tuple:
    """The same for a layer without a norm, looked up once; any shift."""
    shift = tuple(s % w for s, w in zip(shift, window, strict=True))
    return window, shift, softmax, ACTIVATIONS.index(activation), -1.0


def problem_of(x: Tensor, table: Tensor | None, matrix: Tensor | None, settings: tuple) -> Problem:
    """The problem that an op's arguments describe: the inverse of `settings_of`."""
    window, shift, softmax, activation, eps = settings
    return Problem(
        device=x.device,
        dtype=x.dtype,
        batch=x.shape[0],
        map=tuple(x.shape[1:-1]),
        window=tuple(window),
        shift=tuple(shift),
        groups=table.shape[0] if table is not None else matrix.shape[0] if matrix.dim() == 3 else 1,
        channels=x.shape[-1] // 2,
        softmax=softmax,
        activation=ACTIVATIONS[activation],
        eps=None if eps < 0 else eps,
    )


def run(backend: str, inputs: tuple[Tensor | None, ...], problem: Problem) -> Tensor:
    """Run a registered back end on `(x, table, bias, matrix, norm_weight, norm_bias)`, differentiably."""
    return run_with(backend, inputs, settings_of(problem))


def run_with(backend: str, inputs: tuple[Tensor | None, ...], settings: tuple) -> Tensor:
    """The same with an op's own settings, as `settings_of` makes them."""
    return _operator.run(backend, inputs, settings)


def _reference(*args) -> Tensor:
    inputs, settings = args[:_INPUT_COUNT], args[_INPUT_COUNT:]
    x, table, _, matrix, *_ = inputs
    return reference.run(*inputs, problem_of(x, table, matrix, settings))


def _mixing_grad(needs: Sequence[bool]) -> tuple[bool]:
    _, needs_table, _, needs_matrix, *_ = needs
    return (needs_table or needs_matrix,)


def _fake_forward(x, *args):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_backward(dz, x, table, bias, matrix, norm_weight, norm_bias, *settings):
    parameters = (table, bias, matrix, norm_weight, norm_bias)
    mixing_grad, dtype = settings[-1], accumulate_dtype(x.dtype)
    wanted = (mixing_grad, True, mixing_grad, True, True)
    return x.new_empty(x.shape), *(
        x.new_empty(p.shape if p is not None and want else (0,), dtype=dtype)
        for p, want in zip(parameters, wanted, strict=True)
    )


_operator = Operator(
    name="pos_gate",
    schema=FORWARD_SCHEMA,
    backward_schema=BACKWARD_SCHEMA,
    tensors=_INPUT_COUNT,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    reference=_reference,
    backward_flags=_mixing_grad,
)
register, overloads = _operator.register, _operator.overloads


@cache
def forward_op(backend: str) -> torch._ops.OpOverload:
    """The forward op of a registered back end, looked up once."""
    return overloads(backend)[0]
