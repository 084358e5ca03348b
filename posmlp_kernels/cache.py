"""A value that depends on parameters only, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

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
        if torch.compiler.is_compiling():
            return build()
        for parameter in parameters:
            if not _has_own_values(parameter):
                return build()
        entry = self._entry
        if entry is None or entry[0] != settings or not _hold(entry[1], parameters):
            # Built with inference mode off: a tensor made inside it could not be used outside it later.
            with torch.inference_mode(False), torch.no_grad():
                entry = (settings, [_stamp(p) for p in parameters], build())
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


def _stamp(parameter: Tensor) -> Tensor | tuple:
    """What differs if a parameter does: its values, or where these are and how often they were written."""
    if parameter.is_cpu:
        return parameter.detach().clone()
    return parameter.device, parameter.dtype, parameter.shape, parameter.data_ptr(), parameter._version


def _hold(stamps: Sequence[Tensor | tuple], parameters: Sequence[Tensor]) -> bool:
    """Whether parameters are as they were. On the CPU that is one comparison for each and little else: beside
    a small gate, when none of this is in a cache, every question shows."""
    for stamp, parameter in zip(stamps, parameters, strict=True):
        if type(stamp) is tuple:
            if parameter.is_cpu or _stamp(parameter) != stamp:
                return False
        elif not (parameter.is_cpu and parameter.dtype is stamp.dtype and torch.equal(parameter, stamp)):
            return False
    return True
