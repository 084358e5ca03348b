"""The convolution between two levels, by parts on a CPU: the same numbers."""

import copy

import pytest
import torch
from torch import nn

from posmlp.layers import Downsample
from posmlp_kernels.testing import assert_no_worse


def made(width_in, width_out):
    torch.manual_seed(0)
    return Downsample(width_in, width_out).to(memory_format=torch.channels_last)


def image(*shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def plain(module, x):
    return module.norm(module.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def with_gradients(module, x, call):
    x = x.detach().requires_grad_()
    y = call(module, x)
    parameters = dict(module.named_parameters())
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return dict(zip(["y", "x", *parameters], [y.detach(), *gradients], strict=True))


@pytest.fixture
def convolutions(monkeypatch):
    """A list that grows with every call of the whole convolution."""
    calls, convolve = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: calls.append(1) or convolve(self, x))
    return calls


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")


@needs_onednn
@pytest.mark.parametrize("widths", [(12, 24), (8, 24), (6, 6)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 10)], ids=str)
def test_the_same_numbers_gradients_and_layout(widths, size, convolutions):
    module, x = made(*widths), image(2, widths[0], *size)
    truth = with_gradients(copy.deepcopy(module).double(), x.double(), plain)
    wanted = with_gradients(module, x, plain)
    del convolutions[:]
    found = with_gradients(module, x, lambda module, x: module(x))
    assert len(convolutions) == (widths[0] == widths[1])
    assert_no_worse(found, wanted, truth)
    with torch.inference_mode():
        y, z = module(x), plain(module, x)
    assert y.stride() == z.stride() and torch.allclose(y, z, atol=1e-6)
    assert module(x[:0]).shape == (0, *y.shape[1:])


def test_in_one_piece_where_somebody_looks(convolutions):
    module, x = made(6, 12), image(2, 6, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(x)
    torch.vmap(module)(x.unsqueeze(0))
    copy.deepcopy(module).double()(x.double())
    with torch.backends.mkldnn.flags(enabled=False):
        module(x)
    assert len(convolutions) == 4
    module.conv.register_forward_hook(lambda module, inputs, y: None)
    module(x)
    assert len(convolutions) == 5
    exported = torch.export.export(made(6, 12), (x,)).graph
    assert len([node for node in exported.nodes if "aten.conv" in str(node.target)]) == 1


def test_replaced_convolutions_are_called():
    module, x = made(6, 12), image(2, 6, 5, 5)
    for conv in (
        nn.Conv2d(6, 12, 3, 2, 1, groups=6, bias=False),
        nn.Conv2d(6, 12, 3, 2, 1, groups=6, padding_mode="reflect"),
        nn.Conv2d(6, 12, 3, 2, 1, groups=2),
    ):
        module.conv = conv
        assert torch.equal(module(x), plain(module, x))


@needs_onednn
def test_compiled():
    torch._dynamo.reset()
    module, x = made(6, 12), image(2, 6, 5, 5)
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), module(x))
    with torch.profiler.profile() as profile:
        whole(x)
    assert [event.name for event in profile.events()].count("aten::convolution") == 2


def test_wrong_widths_are_told():
    with pytest.raises(RuntimeError, match="expected input"):
        made(6, 12)(image(2, 5, 5, 5))
