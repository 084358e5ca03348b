"""The gate and the model in the original's manner, which ours are measured against, compute the same."""

import pytest
import torch

from posmlp import PosMLP
from posmlp.original_style import OriginalStyleGate, OriginalStylePosMLP, interleaved
from posmlp_kernels import PosSGU


def test_equals_the_layer():
    torch.manual_seed(0)
    layer = PosSGU(48, 4, groups=3).double()
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.normal_(layer.center, std=1.0)
    x = torch.randn(2, 8, 12, 48, dtype=torch.float64)
    order = interleaved(24, 3)
    original = OriginalStyleGate.like(layer).double()  # its parameters have been rounded to float32
    z = original(x.unflatten(-1, (2, -1))[..., order].flatten(-2))
    torch.testing.assert_close(z, layer(x)[..., order], rtol=1e-6, atol=1e-6)


def test_gradients_equal_the_layers():
    torch.manual_seed(0)
    layer = PosSGU(24, 3, groups=2)
    original, order = OriginalStyleGate.like(layer), interleaved(12, 2)
    x, dz = torch.randn(2, 6, 3, 24), torch.randn(2, 6, 3, 12)
    given = x.unflatten(-1, (2, -1))[..., order].flatten(-2)
    theirs = torch.autograd.grad(original(given), list(original.parameters()), dz[..., order])
    ours = torch.autograd.grad(layer(x), list(layer.parameters()), dz)
    for (name, _), their, our in zip(original.named_parameters(), theirs, ours, strict=True):
        torch.testing.assert_close(their.view_as(our), our, rtol=1e-4, atol=1e-5, msg=name)


def test_maps_that_the_windows_do_not_tile_are_refused():
    with pytest.raises(ValueError, match="multiple of the window 4, got 4 x 6"):
        OriginalStyleGate(4, 2)(torch.randn(1, 4, 6, 8))


def test_the_model_equals_ours():
    """Two levels of different windows and groups; batch statistics, GELU and downsampling included."""
    torch.manual_seed(0)
    model = PosMLP((12, 24), (1, 2), (4, 2), (3, 4), (4, 2), num_classes=5)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.bias", "center")):
            torch.nn.init.normal_(parameter)
    original, x = OriginalStylePosMLP.like(model), torch.randn(2, 3, 32, 48)
    for mode in (True, False):
        torch.testing.assert_close(original.train(mode)(x), model.train(mode)(x), rtol=1e-4, atol=1e-5)
