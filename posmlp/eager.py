"""Where a module may take a shortcut that only its running time shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_eager_cpu(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary CPU tensors, and nothing looks into the computation or changes it.

    What does: torch.compile, export, jit.trace, autocast, torch.func, forward-mode gradients, and modes such
    as counters of operations or fake tensors. They are to meet the operations that a module stands for.
    """
    return (
        _are_plain(tensors)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and _nothing_is_changed()
    )


def is_eager_or_compiled_cpu(*tensors: Tensor | None) -> bool:
    """The same, but for torch.compile, which may see what is written for the CPU at hand; export may not."""
    return is_eager_cpu(*tensors) or (
        torch.compiler.is_dynamo_compiling()
        and not _is_exporting()
        and _nothing_is_changed()
        and _are_plain(tensors)
    )


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is an ordinary CPU tensor, or none."""
    return tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu)


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    return all(is_plain(tensor) for tensor in tensors)


def _nothing_is_changed() -> bool:
    return (
        not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


# Facts of a trace, which it need not record.
_is_exporting._dynamo_marked_constant = _nothing_is_changed._dynamo_marked_constant = True


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody watches what goes into or comes out of one of the modules, or their gradients, or has
    put a function in the place of `forward`, as those do who fetch weights when they are wanted."""
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False
