"""A value that depends on parameters only, kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ParameterCache:
    """Keeps one value built from a few small tensors.

    On the CPU a change is found by comparing values, so that no way of writing is missed, `.data` included.
    Elsewhere that would wait for the device: there the storage's address and the version counter must be the
    same.
    """

    def __init__(self) -> None:
        # (stamps, value), replaced as a whole: threads may share a layer.
        self._entry: tuple[tuple, Tensor] | None = None

    def get(self, parameters: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
        """The kept value if no parameter has changed since it was built, else `build()`."""
        if torch.compiler.is_compiling() or not all(map(_has_own_values, parameters)):
            return build()
        entry = self._entry
        if entry is None or not all(map(_unchanged, entry[0], parameters)):
            # Built with inference mode off: a tensor made inside it could not be used outside it later.
            with torch.inference_mode(False), torch.no_grad():
                entry = (tuple(map(_stamp, parameters)), build())
            self._entry = entry
        return entry[1]

    def clear(self) -> None:
        """Forget the value."""
        self._entry = None


def _has_own_values(tensor: Tensor) -> bool:
    """Whether a tensor is neither a tracer's stand-in, nor wrapped by a transform, nor without values."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.is_cpu or not tensor.is_inference()  # inference tensors count no versions


def _stamp(tensor: Tensor) -> Tensor | tuple:
    if tensor.is_cpu:
        return tensor.detach().clone()
    return tensor.data_ptr(), tensor._version, tensor.device, tensor.dtype, tensor.shape


def _unchanged(stamp: Tensor | tuple, tensor: Tensor) -> bool:
    if isinstance(stamp, Tensor):
        return tensor.is_cpu and stamp.dtype == tensor.dtype and torch.equal(stamp, tensor)
    return not tensor.is_cpu and stamp == _stamp(tensor)
