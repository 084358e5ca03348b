"""The activations that gates apply as they load: over the whole line, by every vector's width."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import available

from posmlp_kernels import pos_gate

LINE = torch.arange(-9, 9, 1e-4, dtype=torch.float64).float()
needs_cpu = pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")


def activated(x, activation, channels):
    """act(x) and act'(x) by a gate whose mixed half is 1: P = 0 and b = 1."""
    count = len(x) // channels * channels
    maps = torch.zeros(1, count // channels, 2 * channels, dtype=x.dtype)
    maps[0, :, channels:] = x[:count].view(-1, channels)
    maps.requires_grad_()
    table, bias = torch.zeros(1, 1, dtype=x.dtype), torch.ones(1, dtype=x.dtype)
    z = pos_gate(maps, table, bias, window=1, softmax=False, activation=activation, backend="cpu")
    (gradient,) = torch.autograd.grad(z.sum(), maps)
    return z.detach().flatten(), gradient[0, :, channels:].flatten()


def truth(x, activation):
    x = x.double().requires_grad_()
    y = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@needs_cpu
@pytest.mark.parametrize("channels", [1, 2, 4, 8, 16, 29])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_no_worse_than_pytorch_over_the_line(activation, channels):
    ours, wanted = activated(LINE, activation, channels), truth(LINE, activation)
    eager = LINE.clone().requires_grad_()
    y = F.gelu(eager, approximate="tanh" if activation == "gelu_tanh" else "none")
    plain = y.detach(), torch.autograd.grad(y.sum(), eager)[0]
    for got, other, true in zip(ours, plain, wanted, strict=True):
        count = len(got)
        error, allowed = (got - true[:count]).abs().max(), (other - true).abs().max()
        assert error <= 2 * allowed


@needs_cpu
@pytest.mark.parametrize("scale", [0.1, 0.3, 1, 3])
def test_gelu_on_the_whole_no_worse_than_pytorch(scale):
    x = scale * torch.randn(2**17, generator=torch.Generator().manual_seed(0))
    eager = x.clone().requires_grad_()
    y = F.gelu(eager)
    plain = y.detach(), torch.autograd.grad(y.sum(), eager)[0]
    for got, other, true in zip(activated(x, "gelu", 16), plain, truth(x, "gelu"), strict=True):
        assert (got - true).norm() <= 1.25 * (other - true).norm()


@needs_cpu
def test_gelu_is_good_to_a_few_units_in_the_last_place():
    x = LINE[LINE > -1]
    y, (true, _) = activated(x, "gelu", 16)[0], truth(x, "gelu")
    true = true[: len(y)]
    assert ((y - true).abs() <= 4 * 2**-23 * true.abs() + 2**-126).all()
    x = LINE[LINE <= -1]  # here the value itself is what a difference of two numbers near 1 leaves
    y, (true, _) = activated(x, "gelu", 16)[0], truth(x, "gelu")
    assert ((y - true[: len(y)]).abs() <= 2**-22).all()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 4, 8, 16])
def test_gelu_at_the_ends_of_the_line(channels, dtype):
    ends = [0.0, 1e-30, -1e-30, 1e-6, -1e-6, 100, -100, 3e38, -3e38, math.inf, math.nan, 1, 2, 3, 4, 5]
    x = torch.tensor(ends, dtype=dtype)
    y, slope = activated(x, "gelu", channels)
    wanted = [0.0, 5e-31, -5e-31, 5e-7, -5e-7, 100, 0, 3e38, 0, math.inf, math.nan]
    torch.testing.assert_close(y[:11], x.new_tensor(wanted), equal_nan=True, rtol=1e-5, atol=0.0)
    assert torch.equal(slope[5:9], x.new_tensor([1.0, 0, 1, 0]))
    assert slope[10].isnan()


@needs_cpu
@pytest.mark.parametrize("channels", [1, 2, 4, 8, 29])
def test_gelu_in_double(channels):
    x = LINE.double()[::7]
    for got, true in zip(activated(x, "gelu", channels), truth(x, "gelu"), strict=True):
        error = (got - true[: len(got)]).abs()
        assert (error <= 2 * 2**-52 * x[: len(got)].clamp_min(1)).all()
