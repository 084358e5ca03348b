"""The operator as PyTorch sees it: one schema, one fake and one gradient formula, above the back ends.

Every compiled back end is an overload of the same two ops, `posmlp_kernels::pos_gate.<backend>` and
`posmlp_kernels::pos_gate_backward.<backend>`: functional, with fresh contiguous outputs, so that opcheck,
torch.compile, export and vmap need to know nothing about the kernels. Parameters come in the accumulation
dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import ACTIVATIONS, Problem, accumulate_dtype
from . import reference
from .vmap import register_vmap_by_loop

_INPUTS = "Tensor x, Tensor? table, Tensor? bias, Tensor? matrix, Tensor? norm_weight, Tensor? norm_bias"
_SETTINGS = "int[] window, int[] shift, bool softmax, int activation, float eps"
FORWARD_SCHEMA = f"({_INPUTS}, {_SETTINGS}) -> Tensor"
_GRADIENTS = ", ".join(["Tensor"] * 6)
BACKWARD_SCHEMA = f"(Tensor dz, {_INPUTS}, {_SETTINGS}, bool mixing_grad) -> ({_GRADIENTS})"
_INPUT_COUNT = 6

_library = torch.library.Library("posmlp_kernels", "FRAGMENT")


def settings_of(problem: Problem) -> tuple:
    """The op's arguments that are not tensors."""
    eps = -1.0 if problem.eps is None else problem.eps
    return problem.window, problem.shift, problem.softmax, ACTIVATIONS.index(problem.activation), eps


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


def overloads(backend: str) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """The forward and the backward op of a registered back end."""
    ops = torch.ops.posmlp_kernels
    return getattr(ops.pos_gate, backend), getattr(ops.pos_gate_backward, backend)


def register(backend: str, forward: Callable | None = None, backward: Callable | None = None) -> None:
    """Register a back end: Python functions over the ops' arguments, or None where C++ defines the ops."""
    for name, schema, kernel, fake in (
        ("pos_gate", FORWARD_SCHEMA, forward, _fake_forward),
        ("pos_gate_backward", BACKWARD_SCHEMA, backward, _fake_backward),
    ):
        overload = f"{name}.{backend}"
        if kernel is not None:
            _library.define(overload + schema)
            _library.impl(overload, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"posmlp_kernels::{overload}", fake, lib=_library)
    for op in overloads(backend):
        register_vmap_by_loop(op, _library)


def run(backend: str, inputs: tuple[Tensor | None, ...], problem: Problem) -> Tensor:
    """Run a registered back end on `(x, table, bias, matrix, norm_weight, norm_bias)`, differentiably."""
    if torch.compiler.is_compiling() and _inside_func_grad():
        # There Dynamo takes every requires_grad for False and would trace a gradient of zeros: run eagerly.
        torch._dynamo.graph_break()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _PosGate.apply(backend, *inputs, *settings_of(problem))
    return overloads(backend)[0](*inputs, *settings_of(problem))


def _inside_func_grad() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


_inside_func_grad._dynamo_marked_constant = True  # a fact of the trace, which the trace need not record


class _PosGate(torch.autograd.Function):
    """Saves its inputs only; backward recomputes what it needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, *args):
        return overloads(backend)[0](*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.settings = inputs[0], inputs[1 + _INPUT_COUNT :]
        ctx.save_for_backward(*inputs[1 : 1 + _INPUT_COUNT])

    @staticmethod
    def backward(ctx, dz):
        needs = ctx.needs_input_grad[1 : 1 + _INPUT_COUNT]
        _, needs_table, _, needs_matrix, *_ = needs
        args = (dz, *ctx.saved_tensors, *ctx.settings, needs_table or needs_matrix)
        if torch.is_grad_enabled():  # somebody wants gradients of the gradients
            gradients = _PosGateBackward.apply(ctx.backend, *args)
        else:  # torch.compile traces no Function inside a Function's backward
            gradients = overloads(ctx.backend)[1](*args)
        gradients = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
        return None, *gradients, *(None,) * len(ctx.settings)


class _PosGateBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that gradients of gradients come out right: by the
    reference."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, *args):
        return overloads(backend)[1](*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors = inputs[1 : 2 + _INPUT_COUNT]
        ctx.settings, ctx.mixing_grad = inputs[2 + _INPUT_COUNT : -1], inputs[-1]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        given = [t for t in tensors if t is not None]

        def gradients(*given: Tensor) -> tuple[Tensor, ...]:
            remaining = iter(given)
            dz, *inputs = (None if t is None else next(remaining) for t in tensors)
            return _reference_backward(dz, inputs, ctx.settings)

        wanted = [c for t, c in zip(tensors[1:], cotangents, strict=True) if t is not None]
        values, pullback = torch.func.vjp(gradients, *given)
        wanted = [
            c if c.shape == v.shape else torch.zeros_like(v) for c, v in zip(wanted, values, strict=True)
        ]
        results = iter(pullback(tuple(wanted)))
        found = tuple(None if t is None else next(results) for t in tensors)
        return None, *found, *(None,) * (len(ctx.settings) + 1)


def _reference_backward(dz: Tensor, inputs: list[Tensor | None], settings: tuple) -> tuple[Tensor, ...]:
    """The gradients for the inputs that are not None, through plain PyTorch."""
    problem = problem_of(inputs[0], inputs[1], inputs[3], settings)
    given = [t for t in inputs if t is not None]

    def forward(*given: Tensor) -> Tensor:
        remaining = iter(given)
        return reference.run(*(None if t is None else next(remaining) for t in inputs), problem)

    return torch.func.vjp(forward, *given)[1](dz)


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
