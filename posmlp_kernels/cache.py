"""A value that depends on parameters only, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

T = TypeVar("T")


class ParameterCache:
    """Keeps one value built from a few small tensors and settings.

    On the CPU a change is found by comparing values, so that no way of writing is missed, `.data` included.
    Elsewhere that would wait for the device: there the storage's address and the version counter must be the
    same. Copies of a cache are empty.
    """

    def __init__(self) -> None:
        # (settings, stamp, value), replaced as a whole: threads may share a layer.
        self._entry: tuple | None = None

    def get(self, parameters: Sequence[Tensor], settings: object, build: Callable[[], T]) -> T:
        """The kept value if nothing has changed since it was built, else `build()`."""
        if torch.compiler.is_compiling() or not all(map(_has_own_values, parameters)):
            return build()
        entry = self._entry
        if entry is None or entry[0] != settings or not _same(entry[1], _stamp(parameters)):
            # Built with inference mode off: a tensor made inside it could not be used outside it later.
            with torch.inference_mode(False), torch.no_grad():
                entry = (settings, _stamp(parameters), build())
            self._entry = entry
        return entry[2]

    def clear(self) -> None:
        """Forget the value."""
        self._entry = None

    def __reduce__(self) -> tuple:
        return ParameterCache, ()


def _has_own_values(tensor: Tensor) -> bool:
    """Whether a tensor is neither a tracer's stand-in, nor wrapped by a transform, nor without values."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.is_cpu or not tensor.is_inference()  # inference tensors count no versions


def _stamp(parameters: Sequence[Tensor]) -> tuple:
    """What differs if a parameter does: its kind, and its values, all in one tensor so that one comparison
    serves, or where these are and how often they were written."""
    if all(p.is_cpu for p in parameters):
        return [(p.dtype, p.shape) for p in parameters], _flatten_dense_tensors(parameters)
    return [(p.device, p.dtype, p.shape) for p in parameters], [
        (p.data_ptr(), p._version) for p in parameters
    ]


def _same(kept: tuple, now: tuple) -> bool:
    if kept[0] != now[0]:
        return False
    return torch.equal(kept[1], now[1]) if isinstance(now[1], Tensor) else kept[1] == now[1]
