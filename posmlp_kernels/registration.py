"""An operator as PyTorch sees it, above its back ends: registration, and the one gradient formula.

Every compiled back end of an operator is an overload of the same two ops, `posmlp_kernels::<name>.<backend>`
and `posmlp_kernels::<name>_backward.<backend>`: functional, with fresh contiguous outputs, so that opcheck,
torch.compile, export and vmap need to know nothing about the kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .vmap import register_vmap_by_loop

_library = torch.library.Library("posmlp_kernels", "FRAGMENT")


def _no_flags(needs: Sequence[bool]) -> tuple[bool, ...]:
    return ()


@dataclass(frozen=True)
class Operator:
    """What the back ends of one operator have in common.

    The forward op takes `tensors` tensors, each perhaps None, and then settings. The backward op takes the
    output's gradient, the same arguments, and the flags that `backward_flags` makes of which gradients are
    wanted; it returns one per tensor, with no elements where there is none. `reference` takes the forward
    op's arguments and is differentiable to any order: it serves gradients of gradients.
    """

    name: str
    schema: str
    backward_schema: str
    tensors: int
    fake: Callable[..., Tensor]
    fake_backward: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., Tensor]
    backward_flags: Callable[[Sequence[bool]], tuple[bool, ...]] = _no_flags

    def is_defined(self, backend: str) -> bool:
        """Whether some loaded library defines the ops of a back end."""
        try:
            self.overloads(backend)
        except AttributeError:
            return False
        return True

    def overloads(self, backend: str) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
        """The forward and the backward op of a registered back end."""
        ops = torch.ops.posmlp_kernels
        return getattr(getattr(ops, self.name), backend), getattr(
            getattr(ops, f"{self.name}_backward"), backend
        )

    def register(
        self, backend: str, forward: Callable | None = None, backward: Callable | None = None
    ) -> None:
        """Register a back end: functions over the ops' arguments, or None where C++ defines the ops."""
        for name, schema, kernel, fake in (
            (self.name, self.schema, forward, self.fake),
            (f"{self.name}_backward", self.backward_schema, backward, self.fake_backward),
        ):
            overload = f"{name}.{backend}"
            if kernel is not None:
                _library.define(overload + schema)
                _library.impl(overload, kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"posmlp_kernels::{overload}", fake, lib=_library)
        for op in self.overloads(backend):
            register_vmap_by_loop(op, _library)

    def run(self, backend: str, inputs: Sequence[Tensor | None], settings: tuple) -> Tensor:
        """Run a registered back end, differentiably."""
        if torch.compiler.is_compiling() and _inside_func_grad():
            # There Dynamo takes every requires_grad for False and would trace a gradient of zeros.
            torch._dynamo.graph_break()
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            return (_Forward if transformed else _PlainForward).apply(self, backend, *inputs, *settings)
        return self.overloads(backend)[0](*inputs, *settings)

    def reference_backward(
        self, dz: Tensor, inputs: Sequence[Tensor | None], settings: tuple
    ) -> tuple[Tensor, ...]:
        """The gradients for the inputs that are not None, through plain PyTorch."""

        def forward(*given: Tensor) -> Tensor:
            return self.reference(*_with_nones(given, inputs), *settings)

        return torch.func.vjp(forward, *_given(inputs))[1](dz)


def _keep_signature(function: Callable) -> Callable:
    """`Function.apply` asks for the signature in every call; finding it out takes longer than a small op."""
    function.__signature__ = inspect.signature(function)
    return function


class _Forward(torch.autograd.Function):
    """Saves its inputs only; backward recomputes what it needs."""

    generate_vmap_rule = True

    @staticmethod
    @_keep_signature
    def forward(operator, backend, *args):
        return operator.overloads(backend)[0](*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, ctx.backend, *args = inputs
        count = ctx.operator.tensors
        ctx.settings = tuple(args[count:])
        ctx.save_for_backward(*args[:count])

    @staticmethod
    def backward(ctx, dz):
        operator = ctx.operator
        needs = ctx.needs_input_grad[2 : 2 + operator.tensors]
        args = (dz, *ctx.saved_tensors, *ctx.settings, *operator.backward_flags(needs))
        if torch.is_grad_enabled():  # somebody wants gradients of the gradients
            gradients = _Backward.apply(operator, ctx.backend, *args)
        else:  # torch.compile traces no Function inside a Function's backward
            gradients = operator.overloads(ctx.backend)[1](*args)
        gradients = tuple(g if need else None for g, need in zip(gradients, needs, strict=True))
        return None, None, *gradients, *(None,) * len(ctx.settings)


class _PlainForward(torch.autograd.Function):
    """The same for whom no transform of functions asks: `apply` need not bind its arguments then, which takes
    longer than all else that Python does for a gate."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _Forward.forward(*inputs)
        _Forward.setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_Forward.backward)


class _Backward(torch.autograd.Function):
    """The gradients as a function of their own, so that gradients of gradients come out right: by the
    reference."""

    generate_vmap_rule = True

    @staticmethod
    @_keep_signature
    def forward(operator, backend, *args):
        return operator.overloads(backend)[1](*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, _, *args = inputs
        count = 1 + ctx.operator.tensors
        flags = len(ctx.operator.backward_flags((True,) * ctx.operator.tensors))
        ctx.settings, ctx.flags = tuple(args[count : len(args) - flags]), flags
        ctx.save_for_backward(*args[:count])

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors

        def gradients(*given: Tensor) -> tuple[Tensor, ...]:
            dz, *inputs = _with_nones(given, tensors)
            return ctx.operator.reference_backward(dz, inputs, ctx.settings)

        values, pullback = torch.func.vjp(gradients, *_given(tensors))
        wanted = [c for t, c in zip(tensors[1:], cotangents, strict=True) if t is not None]
        wanted = [
            c if c.shape == v.shape else torch.zeros_like(v) for c, v in zip(wanted, values, strict=True)
        ]
        found = _with_nones(pullback(tuple(wanted)), tensors)
        return None, None, *found, *(None,) * (len(ctx.settings) + ctx.flags)


def _given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _with_nones(given: Sequence[Tensor], like: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inverse of `_given`: None wherever `like` has it."""
    remaining = iter(given)
    return [None if t is None else next(remaining) for t in like]


def _inside_func_grad() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


_inside_func_grad._dynamo_marked_constant = True  # a fact of the trace, which the trace need not record
