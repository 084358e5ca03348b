"""What the CPU back end takes of P: all of it, runs of what counts, and runs that are split."""

from __future__ import annotations

import pytest
import torch
from support import assert_cpu_no_worse, available

from posmlp_kernels import gqpe_table, pos_gate

pytestmark = pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")


def draw(table, window, channels, batch, seed):
    """x, table and bias, and dz: a window an image."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *window, 2 * channels, generator=generator)
    dz = torch.randn(batch, *window, channels, generator=generator)
    return (x, table, torch.randn(window[0] * window[1], generator=generator)), dz


@pytest.mark.parametrize("centre", [0.0, 4.5])
@pytest.mark.parametrize("sharpness", [0.4, 1.0])
@pytest.mark.parametrize("window", [(14, 14), (7, 14), (12, 12), (9, 11), (5, 13), (16, 16)])
def test_split_tiles(window, sharpness, centre):
    """Gaussians of which few of a tile's queries see an end, in the middle or beside the window."""
    groups, channels = 2, 192
    factor = sharpness * (
        torch.eye(2) + 0.2 * torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    )
    table = gqpe_table(torch.full((groups, 2), centre), factor, window, backend="reference")
    assert_cpu_no_worse([draw(table, window, channels, 4, seed) for seed in range(8)], window)


@pytest.mark.parametrize("sides", [1, 2])
def test_an_image_gives_the_same_bits_alone_and_in_a_batch(sides):
    """With windows that few panels use alone and many in a batch, and with windows that are split in both."""
    window, groups, channels = (14, 14), 4, 96
    generator = torch.Generator().manual_seed(0)
    table = gqpe_table(torch.zeros(groups, 2), torch.eye(2).expand(groups, 2, 2), window, backend="reference")
    x = torch.randn(8, 14 * sides, 14 * sides, 2 * channels, generator=generator).requires_grad_()
    settings = {"window": window, "softmax": True, "backend": "cpu"}
    z = pos_gate(x, table, **settings)
    (dx,) = torch.autograd.grad(z.square().sum(), x)
    alone = x[3:4].detach().requires_grad_()
    z_alone = pos_gate(alone, table, **settings)
    assert torch.equal(z_alone, z[3:4])
    assert torch.equal(torch.autograd.grad(z_alone.square().sum(), alone)[0], dx[3:4])


@pytest.mark.parametrize("window", [(7, 7), (8, 8), (4, 12), (3, 7), (9, 9)])
def test_wide_and_sharp_groups_in_turn(window):
    """Of a small window's wide Gaussian all is taken, as was the last one's; of a sharp one what counts."""
    scales, channels = torch.tensor([0.3, 1.6, 0.5, 0.4, 1.4, 0.3]), 72
    factor = scales[:, None, None] * torch.eye(2)
    table = gqpe_table(torch.full((6, 2), 0.3), factor, window, backend="reference")
    assert_cpu_no_worse([draw(table, window, channels, 5, seed) for seed in range(8)], window)
