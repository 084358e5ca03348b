"""Gradients, and gradients of gradients, against finite differences in float64."""

from __future__ import annotations

import pytest
import torch
from support import device_of, interpreted, over_backends

from posmlp_kernels.testing import PARAMETERS, Case, make_inputs, run

# As small as each thing that a kernel does in a way of its own allows: gradcheck calls once per element.
SMALL = (
    Case(
        "softmax", "partial and shifted windows, all of a GQPE layer", (3, 2), (2, 2), 2, 2, 2, shift=(1, 0)
    ),
    Case(
        "learned",
        "no softmax, a free matrix per group, no bias",
        (3,),
        (2,),
        2,
        4,
        2,
        softmax=False,
        table="learned",
        matrix="grouped",
        bias=False,
    ),
    Case(
        "everything",
        "activation, norm, table and shared matrix under one softmax",
        (2, 2),
        (2, 1),
        1,
        3,
        1,
        matrix="shared",
        activation="gelu",
        norm=True,
    ),
    Case(
        "sgu",
        "no table; the tanh form of the activation",
        (3,),
        (2,),
        1,
        3,
        1,
        softmax=False,
        table="none",
        matrix="shared",
        activation="gelu_tanh",
        norm=True,
    ),
    Case("volume", "three dimensions", (2, 1, 2), (1, 2, 2), 1, 1, 1),
)
small = pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)


def leaves_and_function(backend, case):
    inputs = make_inputs(case, torch.float64, device_of(backend))
    names = [name for name in ("x", *PARAMETERS) if inputs[name] is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    return leaves, lambda *values: run(case, {**inputs, **dict(zip(names, values, strict=True))}, backend)


@small
@over_backends()
def test_gradients(backend, case):
    """Fast mode where a call is slow: random directions rather than every element."""
    leaves, function = leaves_and_function(backend, case)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=interpreted(backend), nondet_tol=0.0)


@small
@over_backends()
def test_gradients_of_gradients(backend, case):
    if interpreted(backend) and case.name != "everything":
        pytest.skip("interpreted Triton is slow; second derivatives are the reference's for each back end")
    leaves, function = leaves_and_function(backend, case)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@over_backends()
def test_gradient_penalty(backend):
    """Double backward as it is used: the norm of dx as a loss, its gradients those of the reference."""
    results = []
    for name in ("reference", backend):
        leaves, function = leaves_and_function(name, SMALL[0])
        (dx,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
        results.append([g.cpu() for g in torch.autograd.grad(dx.square().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@over_backends(interpreter=False)
def test_mixing_gradients_are_left_out_where_nobody_asks(backend):
    """Gradients of gradients with only x and bias as leaves: what was not computed has no say in them."""
    leaves, function = leaves_and_function(backend, SMALL[0])
    x, table, bias = leaves[0], leaves[1].detach(), leaves[2]
    assert torch.autograd.gradgradcheck(lambda x, bias: function(x, table, bias), (x, bias), fast_mode=True)
