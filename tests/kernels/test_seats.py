"""Widths of a group of channels, which decide how the CPU back end moves them between maps and registers."""

from __future__ import annotations

import pytest
import torch
from support import assert_cpu_no_worse, available, results_of

from posmlp_kernels import pos_gate

pytestmark = pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
# Whole vectors, halves and quarters of them, and widths that fit none, on vectors of 4, 8 and 16 numbers.
WIDTHS = (3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48)


def draw(width, window, windows=(2, 3), batch=2, seed=0, groups=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    sizes = [count * w for count, w in zip(windows, window, strict=True)]
    x = normal(batch, *sizes, 2 * groups * width)
    table = normal(groups, *(2 * w - 1 for w in window))
    return (x, table, normal(window[0] * window[1])), normal(batch, *sizes, groups * width)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("window", [(7, 7), (5, 14), (2, 3), (9, 8)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, window, activation):
    """Twelve windows: full panels, and one that is not."""
    draws = [draw(width, window, seed=seed) for seed in range(4)]
    assert_cpu_no_worse(draws, window, activation=activation)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_same_bits_whatever_the_panel(width, activation):
    """A window's columns lie by vectors in a full panel, and in another one otherwise."""
    window = (7, 7)
    (x, table, bias), dz = draw(width, window, windows=(1, 1), batch=16)
    settings = {"window": window, "softmax": True, "activation": activation, "backend": "cpu"}

    def both(x, dz):
        x = x.clone().requires_grad_()
        z = pos_gate(x, table, bias, **settings)
        return z.detach(), torch.autograd.grad(z, x, dz)[0]

    together = both(x, dz)
    for image in (0, 1, 2, 15):
        here = slice(image, image + 1)
        for one, all_ in zip(both(x[here], dz[here]), together, strict=True):
            assert torch.equal(one, all_[here])


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_beside_a_map_is_read_or_written(width):
    """A map amid NaN: rows, images and channels around it; windows are shifted, partial at both ends."""
    window, shift = (7, 7), (3, 2)
    tensors, dz = draw(width, window, windows=(3, 3))
    x, table, bias = tensors
    around = torch.full([size + 2 for size in x.shape], torch.nan)
    around[1:-1, 1:-1, 1:-1, 1:-1] = x
    inside = around[1:-1, 1:-1, 1:-1, 1:-1]
    assert not inside.is_contiguous()
    for got, expected in zip(
        results_of((inside, table, bias), dz, window, "cpu", torch.float32, shift=shift).values(),
        results_of((x, table, bias), dz, window, "cpu", torch.float32, shift=shift).values(),
        strict=True,
    ):
        assert torch.equal(got, expected)
