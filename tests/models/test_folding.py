"""The stem's batch norms in eval mode: the same numbers without their pass, and never yesterday's."""

import copy

import pytest
import torch
from torch import nn

from posmlp import folding
from posmlp.layers import conv_stem
from posmlp_kernels.testing import assert_no_worse


@pytest.fixture
def stem():
    """In eval mode, as after training: statistics, scales and offsets of their own."""
    torch.manual_seed(0)
    stem = conv_stem(3, 16, "gelu").eval()
    for norm in (m for m in stem if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.1, 4)
    return stem


@pytest.fixture
def x():
    return torch.randn(2, 3, 21, 18, generator=torch.Generator().manual_seed(1))


def plain(stem, x):
    """Module after module."""
    for module in stem:
        x = module(x)
    return x


def with_gradients(stem, x, call):
    x = x.detach().requires_grad_()
    y = call(stem, x)
    parameters = dict(stem.named_parameters())
    gradients = torch.autograd.grad(y.square().sum(), [x, *parameters.values()])
    return dict(zip(["y", "x", *parameters], [y.detach(), *gradients], strict=True))


def folded(stem, x):
    return stem(x)


def normalises(stem, x, monkeypatch):
    """How often a batch norm runs on its own."""
    calls, normalise = [], nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: calls.append(1) or normalise(self, x))
    stem(x)
    return len(calls)


def test_the_same_numbers_and_gradients(stem, x):
    truth = with_gradients(copy.deepcopy(stem).double(), x.double(), plain)
    assert_no_worse(with_gradients(stem, x, folded), with_gradients(stem, x, plain), truth, factor=4)


def test_training_normalises_by_the_batch(stem, x):
    stem.train()
    other = copy.deepcopy(stem)
    assert torch.equal(stem(x), plain(other, x))
    assert all(torch.equal(a, b) for a, b in zip(stem.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.bias", "norm1.weight", "norm3.bias"])
@pytest.mark.parametrize("buffer", ["norm1.running_mean", "norm2.running_var"])
def test_never_stale(stem, x, name, buffer):
    stem(x)
    stem.get_parameter(name).data.mul_(1.5)
    stem.get_buffer(buffer).data.add_(0.5)
    torch.testing.assert_close(stem(x), plain(stem, x))
    stem.load_state_dict({key: value * 1.25 for key, value in stem.state_dict().items()})
    torch.testing.assert_close(stem(x), plain(stem, x))


def test_a_norm_is_folded_when_it_is_in_eval_mode_itself(stem, x, monkeypatch):
    assert normalises(stem, x, monkeypatch) == 0
    stem.train()
    stem.norm2.eval()  # as those do who fine-tune with fixed statistics
    assert normalises(stem, x, monkeypatch) == 2


def test_hooks_see_what_they_watch(stem, x, monkeypatch):
    seen = []
    stem.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    stem.norm3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert normalises(stem, x, monkeypatch) == 2
    assert torch.equal(seen[0], stem.conv1(x)) and len(seen) == 3


def test_low_precision_is_not_folded(stem, x, monkeypatch):
    assert normalises(stem.bfloat16(), x.bfloat16(), monkeypatch) == 3


def test_names_are_those_of_the_parts():
    names = {name.rsplit(".", 1)[0] for name in conv_stem(3, 16, "gelu").state_dict()}
    assert names == {"conv1", "norm1", "conv2", "norm2", "conv3", "norm3"}


@pytest.fixture
def activations(monkeypatch):
    """A list that grows with every GELU that is a step of its own."""
    calls, activate = [], nn.GELU.forward
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: calls.append(1) or activate(self, x))
    return calls


needs_onednn = pytest.mark.skipif(not folding._ACTIVATES, reason="this torch has no such convolution")


@needs_onednn
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inference_activates_on_the_way_out(stem, x, layout, activations):
    x = x.contiguous(memory_format=layout)
    truth = plain(copy.deepcopy(stem).double(), x.double())
    with torch.inference_mode():
        wanted = plain(stem, x)
        del activations[:]
        found = stem(x)
    assert not activations and found.stride() == wanted.stride()
    assert_no_worse({"y": found}, {"y": wanted}, {"y": truth.detach()}, factor=4)
    with torch.no_grad():
        assert stem(x[:0]).shape == (0, *found.shape[1:])
        with pytest.raises(RuntimeError, match="expected input"):
            stem(x[:, :2])


@needs_onednn
def test_whoever_looks_into_it_sees_the_activations(stem, x, activations):
    stem(x)  # its gradient
    assert len(activations) == 2
    with torch.no_grad():
        copy.deepcopy(stem).double()(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stem(x)
        with torch.backends.mkldnn.flags(enabled=False):
            stem(x)
        assert len(activations) == 8
        stem.act1.register_forward_hook(lambda module, inputs, y: None)
        stem.act2.approximate = "tanh"
        stem(x)
    assert len(activations) == 10
