"""Random problems: any map, window, shift, option and layout, against the definition over pairs of tokens."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis draws the problems")

from hypothesis import given, settings
from hypothesis import strategies as st
from support import Layout, by_pairs, device_of, over_backends, slow_to_start

from posmlp_kernels import backends, explain, pos_gate


# The same problems in every run; no deadline, because the machine may be busy.
def examples(count):
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@st.composite
def problems(draw):
    """The arguments of `pos_gate` in float64, and dz."""
    rank = draw(st.integers(1, 3), label="rank")
    largest = {1: 13, 2: 7, 3: 4}[rank]
    size = tuple(draw(st.lists(st.integers(1, largest), min_size=rank, max_size=rank), label="map"))
    window = tuple(draw(st.lists(st.integers(1, largest), min_size=rank, max_size=rank), label="window"))
    shift = draw(st.none() | st.lists(st.integers(-9, 9), min_size=rank, max_size=rank), label="shift")
    groups = draw(st.integers(1, 3), label="groups")
    channels = groups * draw(st.sampled_from([1, 2, 5, 8]), label="D")
    batch = draw(st.integers(0, 3), label="batch")
    matrix_kind = draw(st.sampled_from(["none", "shared", "grouped"]), label="matrix")
    has_table = matrix_kind == "none" or draw(st.booleans(), label="table")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20), label="seed"))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = math.prod(window)
    matrix_shape = {"none": None, "shared": (tokens, tokens), "grouped": (groups, tokens, tokens)}[
        matrix_kind
    ]
    arguments = {
        "x": with_layout(draw, normal(batch, *size, 2 * channels)),
        "table": normal(groups, *(2 * w - 1 for w in window)) if has_table else None,
        "bias": normal(tokens) if draw(st.booleans(), label="bias") else None,
        "matrix": normal(*matrix_shape) if matrix_shape else None,
        "norm": (normal(channels), normal(channels), 1e-3) if draw(st.booleans(), label="norm") else None,
        "window": window,
        "shift": shift,
        "softmax": draw(st.booleans(), label="softmax"),
        "activation": draw(st.sampled_from(["none", "gelu", "gelu_tanh"]), label="activation"),
    }
    return arguments, with_layout(draw, normal(batch, *size, channels))


def with_layout(draw, t):
    """The same values in a random order of dimensions in storage, sliced out of a NaN buffer or not."""
    order = draw(st.permutations(range(t.dim())), label="storage order")
    return Layout(tuple(order), draw(st.integers(0, 2), label="margin"))(t)


def value_and_gradients(function, arguments, dz):
    """z and the gradients of all tensors in `arguments`, in order."""
    x, table, bias, matrix = (arguments[n] for n in ("x", "table", "bias", "matrix"))
    weight, shift, eps = arguments["norm"] or (None, None, None)
    leaves = [
        None if t is None else t.detach().requires_grad_() for t in (x, table, bias, matrix, weight, shift)
    ]
    norm = None if eps is None else (*leaves[4:], eps)
    options = {n: arguments[n] for n in ("window", "shift", "softmax", "activation")}
    z = function(leaves[0], leaves[1], leaves[2], matrix=leaves[3], norm=norm, **options)
    return z, *torch.autograd.grad(z, [t for t in leaves if t is not None], dz)


def moved(arguments, device):
    """All tensors on a device, strides kept."""
    if device == "cpu":
        return arguments
    move = lambda v: v.to(device) if isinstance(v, torch.Tensor) else v  # noqa: E731
    moved = {name: move(value) for name, value in arguments.items()}
    moved["norm"] = None if moved["norm"] is None else tuple(map(move, moved["norm"]))
    return moved


@over_backends()
def test_random_problems(backend):
    """In float64, where 1e-11 of the largest entry is rounding and anything else is an error."""

    @examples(8 if slow_to_start(backend) else 150)
    @given(problem=problems())
    def check(problem):
        arguments, dz = problem
        expected = value_and_gradients(by_pairs, arguments, dz)

        def gate(*args, **options):
            return pos_gate(*args, **options, backend=backend)

        device = device_of(backend)
        actual = value_and_gradients(gate, moved(arguments, device), dz.to(device))
        for got, truth in zip(actual, expected, strict=True):
            scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
            torch.testing.assert_close(got.cpu(), truth, rtol=0, atol=1e-11 * scale)

    check()


@examples(50)
@given(problem=problems())
def test_explain_agrees_with_what_runs(problem):
    """`explain` takes the same arguments and marks exactly one line, for every legal problem."""
    arguments, _ = problem
    text = explain(**arguments)
    assert text.count("<- runs") == 1
    assert "reference  yes" in text


@pytest.mark.skipif("cpu" not in backends(), reason="the cpu back end was not built")
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("window", "groups", "depth"), [(1024, 3, 100), (128, 4, 60)])
def test_groups_that_are_met_again_in_every_share(window, groups, depth, softmax):
    """A thread keeps P of every group, or makes it anew if there is no room: the same bits either way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2 * window + 5, 2 * groups * depth, generator=generator, dtype=torch.float64)
    table = torch.randn(groups, 2 * window - 1, generator=generator, dtype=torch.float64)
    gate = partial(pos_gate, table=table, window=window, softmax=softmax)
    alone = gate(x[5:6], backend="cpu")
    assert torch.equal(gate(x, backend="cpu")[5:6], alone)
    torch.testing.assert_close(alone, gate(x[5:6], backend="reference"))
