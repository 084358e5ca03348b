"""The table's ops, `posmlp_kernels::gqpe_table.<backend>` and `gqpe_table_backward.<backend>`.

With G = dL/dR and u = delta - center the gradients are moments of G over the table's displacements:

    s1 = sum G u,  s2 = sum G u u^T,    dcenter = M M^T s1,  dM = -s2 M

Parameters come in the accumulation dtype.
"""

from __future__ import annotations

from torch import Tensor

from ..pos_gate import compiled
from ..registration import Operator
from . import reference

FORWARD_SCHEMA = "(Tensor center, Tensor factor, int[] window) -> Tensor"
BACKWARD_SCHEMA = "(Tensor dtable, Tensor center, Tensor factor, int[] window) -> (Tensor, Tensor)"


def run(backend: str, center: Tensor, factor: Tensor, window: tuple[int, ...]) -> Tensor:
    """Run a registered back end, differentiably."""
    return _operator.run(backend, (center, factor), (window,))


def _fake_forward(center, factor, window):
    return center.new_empty((center.shape[0], *(2 * w - 1 for w in window)))


def _fake_backward(dtable, center, factor, window):
    return center.new_empty(center.shape), factor.new_empty(factor.shape)


def _triton_forward(*args):
    from .triton import forward  # Triton is optional: imported by the first call, not with the package

    return forward(*args)


def _triton_backward(*args):
    from .triton import backward

    return backward(*args)


_operator = Operator(
    name="gqpe_table",
    schema=FORWARD_SCHEMA,
    backward_schema=BACKWARD_SCHEMA,
    tensors=2,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    reference=reference.table,
)
overloads = _operator.overloads

_operator.register("triton", _triton_forward, _triton_backward)
_compiled = [
    name for name in compiled.LOADED if _operator.is_defined(name)
]  # not by a library built before it
for _name in _compiled:
    _operator.register(_name)
BACKENDS = ("triton", *_compiled)
