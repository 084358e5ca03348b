"""Strides: every layout of x, the parameters and dz gives what contiguous tensors give."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import device_of, over_backends, seeds_of, skip_if_interpreter_lacks, strided_case

from posmlp_kernels.testing import (
    PARAMETERS,
    assert_no_worse,
    find_case,
    make_inputs,
    run,
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


def assert_as_contiguous(backend, view, dtype=torch.float32, case=None, gradients=with_gradients):
    """What `view(inputs)` puts in place of some inputs gives what contiguous copies of it give.

    Not a bit of a compiled back end's results depends on the layout, and no precision of the reference's:
    its library sums strided tensors in another order.
    """
    case, gate = case or strided_case(backend), partial(run, backend=backend)
    actual, expected, truth = [], [], []
    for seed in seeds_of(backend) if backend == "reference" else range(1):
        inputs = make_inputs(case, dtype, device_of(backend), seed)
        views = view(inputs)
        whole = inputs | {name: t.contiguous() for name, t in views.items()}
        actual.append(gradients(gate, case, inputs | views))
        expected.append(with_gradients(gate, case, whole))
        truth.append(truth_of(case, whole))
    if backend == "reference":
        assert_no_worse(actual, expected, truth)
        return
    for name, value in actual[0].items():
        assert torch.equal(value, expected[0][name]), name


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["x", "dz"])
@over_backends()
def test_layout(backend, name, dtype, layout):
    skip_if_interpreter_lacks(backend, dtype)

    def view(inputs):
        changed = layout(inputs[name])
        assert torch.equal(changed, inputs[name]), "the layout must not change the values"
        assert layout is offset_by_one or changed.stride() != inputs[name].stride()
        return {name: changed}

    assert_as_contiguous(backend, view, dtype)


@over_backends()
def test_parameters_are_views(backend):
    """Every parameter sliced out of a NaN buffer, matrices and tables also transposed in storage."""

    def view(inputs):
        views = {name: sliced(inputs[name]) for name in PARAMETERS}
        views["table"] = inputs["table"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
        views["matrix"] = inputs["matrix"].T.contiguous().T
        return views

    assert_as_contiguous(backend, view, case=replace(find_case("gelu_tanh_norm"), matrix="shared"))


def expanded(name, part):
    """One part of an input in the place of the whole of it, by strides of 0."""

    def view(inputs):
        changed = inputs[name][part].expand_as(inputs[name])
        assert 0 in changed.stride()
        return {name: changed}

    return view


ALL = slice(None)
FIRST = slice(1)


@pytest.mark.parametrize("part", [FIRST, (ALL, ALL, FIRST), (..., FIRST)], ids=["batch", "map", "channels"])
@over_backends()
def test_expanded_x(backend, part):
    assert_as_contiguous(backend, expanded("x", part))


@pytest.mark.parametrize(
    "part",
    [FIRST, (ALL, FIRST), (..., FIRST), (FIRST, FIRST, FIRST, FIRST)],
    ids=["batch", "map", "channels", "all"],
)
@over_backends()
def test_expanded_dz(backend, part):
    assert_as_contiguous(backend, expanded("dz", part))


@pytest.mark.parametrize("name", ["table", "bias"])
@over_backends()
def test_expanded_parameters(backend, name):
    """A table shared by all groups, a constant bias: expanded rather than copied."""
    assert_as_contiguous(backend, expanded(name, FIRST))


@over_backends()
def test_dz_of_a_sum(backend):
    """`z.sum()` hands back a single one, expanded to z's shape with strides of 0."""

    def gradients(gate, case, inputs):
        def summed(case, inputs):
            nonlocal z
            z = gate(case, inputs)
            return z.sum()

        z = None
        result = with_gradients(summed, case, inputs | {"dz": None})
        return result | {"z": z.detach()}

    ones = lambda inputs: {"dz": torch.ones_like(inputs["dz"])}  # noqa: E731
    assert_as_contiguous(backend, ones, gradients=gradients)


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
