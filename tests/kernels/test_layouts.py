"""Strides: every layout of x, the parameters and dz gives what contiguous tensors give."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import device_of, over_backends, skip_if_interpreter_lacks, strided_case

from posmlp_kernels.testing import (
    PARAMETERS,
    assert_no_worse,
    find_case,
    make_inputs,
    run,
    run_eager,
    truth_of,
    with_gradients,
)


def sliced(t):
    """A part of a larger buffer whose other elements are NaN: a read outside the view shows."""
    buffer = t.new_full([n + 3 for n in t.shape], torch.nan)
    view = buffer[tuple(slice(1, 1 + n) for n in t.shape)]
    return view.copy_(t)


def channels_sliced(t):
    """Every token starts in the middle of a wider one, as after a fused projection."""
    return torch.cat([torch.full_like(t, torch.nan), t], -1)[..., t.shape[-1] :]


def channels_first(t):
    """NCHW storage seen as NHWC: dense, but the last dimension has a stride."""
    return t.movedim(-1, 1).contiguous().movedim(1, -1)


def every_other_channel(t):
    """Last dimension of stride 2, with NaN between."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def map_transposed(t):
    """The map's dimensions stored in the opposite order."""
    return t.transpose(1, -2).contiguous().transpose(1, -2)


def batch_last(t):
    """Stored as [*map, B, C]."""
    return t.movedim(0, -2).contiguous().movedim(-2, 0)


def offset_by_one(t):
    """Not aligned to any vector: one element into its storage."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS = [
    sliced,
    channels_sliced,
    channels_first,
    every_other_channel,
    map_transposed,
    batch_last,
    offset_by_one,
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


def assert_same(backend, case, inputs, actual):
    """Not a bit of a compiled back end's results depends on the layout, and no precision of the reference's:
    its library sums strided tensors in another order."""
    if backend == "reference":
        assert_no_worse(actual, with_gradients(run_eager, case, inputs), truth_of(case, inputs))
        return
    expected = with_gradients(partial(run, backend=backend), case, inputs)
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def assert_as_contiguous(backend, inputs, changed):
    for name in changed:
        assert torch.equal(changed[name], inputs[name]), "the layout must not change the values"
    case = strided_case(backend)
    assert_same(backend, case, inputs, with_gradients(partial(run, backend=backend), case, inputs | changed))


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_backends()
def test_x(backend, dtype, layout):
    skip_if_interpreter_lacks(backend, dtype)
    case = strided_case(backend)
    inputs = make_inputs(case, dtype, device_of(backend))
    x = layout(inputs["x"])
    assert layout is offset_by_one or x.stride() != inputs["x"].stride()
    assert_as_contiguous(backend, inputs, {"x": x})


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_backends()
def test_dz(backend, dtype, layout):
    skip_if_interpreter_lacks(backend, dtype)
    case = strided_case(backend)
    inputs = make_inputs(case, dtype, device_of(backend))
    assert_as_contiguous(backend, inputs, {"dz": layout(inputs["dz"])})


@over_backends()
def test_parameters_are_views(backend):
    """Every parameter sliced out of a NaN buffer, matrices and tables also transposed in storage."""
    case = replace(find_case("gelu_tanh_norm"), matrix="shared")
    inputs = make_inputs(case, device=device_of(backend))
    views = {name: sliced(inputs[name]) for name in PARAMETERS if inputs[name] is not None}
    views["table"] = inputs["table"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    views["matrix"] = inputs["matrix"].T.contiguous().T
    assert_same(backend, case, inputs, with_gradients(partial(run, backend=backend), case, inputs | views))


@over_backends()
def test_expanded_x(backend):
    """Stride 0 along the batch and along a map dimension."""
    case = strided_case(backend)
    inputs = make_inputs(case, device=device_of(backend))
    for first in (inputs["x"][:1], inputs["x"][:, :, :1], inputs["x"][..., :1]):
        x = first.expand_as(inputs["x"])
        assert 0 in x.stride()
        assert_as_contiguous(backend, {**inputs, "x": x.contiguous()}, {"x": x})


@over_backends()
def test_expanded_parameters(backend):
    """A table shared by all groups and a constant bias, expanded rather than copied."""
    case = strided_case(backend)
    inputs = make_inputs(case, device=device_of(backend))
    table, bias = inputs["table"][:1].expand_as(inputs["table"]), inputs["bias"][:1].expand_as(inputs["bias"])
    whole = {**inputs, "table": table.contiguous(), "bias": bias.contiguous()}
    assert_as_contiguous(backend, whole, {"table": table, "bias": bias})


@over_backends()
def test_expanded_dz(backend):
    case = strided_case(backend)
    inputs = make_inputs(case, device=device_of(backend))
    for dz in (inputs["dz"][:1], inputs["dz"][:, :1], inputs["dz"][..., :1], inputs["dz"][:1, :1, :1, :1]):
        dz = dz.expand_as(inputs["dz"])
        assert_as_contiguous(backend, {**inputs, "dz": dz.contiguous()}, {"dz": dz})


@over_backends()
def test_dz_of_a_sum(backend):
    """`z.sum()` hands back a single one, expanded to z's shape with strides of 0."""
    case = strided_case(backend)
    inputs = make_inputs(case, device=device_of(backend))
    inputs["dz"] = torch.ones_like(inputs["dz"])
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items() if t is not None and n != "dz"}
    z = run(case, {**inputs, **leaves}, backend)
    z.sum().backward()
    actual = {"z": z.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
    assert_same(backend, case, inputs, actual)


@over_backends()
def test_outputs_are_contiguous_and_fresh(backend):
    """What the op promises torch.compile: whatever x's strides, contiguous outputs that share nothing."""
    case = strided_case(backend)
    inputs = make_inputs(case, device=device_of(backend))
    x = channels_first(inputs["x"])
    z = run(case, {**inputs, "x": x}, backend)
    assert z.is_contiguous() or backend == "reference"
    assert z.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@over_backends()
def test_inputs_are_left_alone(backend):
    inputs = make_inputs(find_case("gelu_tanh_norm"), device=device_of(backend))
    before = {name: None if t is None else t.clone() for name, t in inputs.items()}
    with_gradients(partial(run, backend=backend), find_case("gelu_tanh_norm"), inputs)
    assert all(t is None or torch.equal(t, inputs[name]) for name, t in before.items())
