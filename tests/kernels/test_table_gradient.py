"""The relative table's gradient, which the CPU back end takes without that of the mixing matrix."""

from __future__ import annotations

import pytest
import torch
from support import available

from posmlp_kernels import gqpe_table, pos_gate
from posmlp_kernels.testing import assert_no_worse

pytestmark = pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
MANY_COLUMNS = {"channels": 96, "batch": 4}  # of which sums may be differences


def gaussian(window, sharpness, centre=0.0, groups=2):
    """Tables whose weights fall from one place on, the quicker the sharper."""
    rank = len(window)
    factor = sharpness * (torch.eye(rank) + 0.1 * torch.arange(groups)[:, None, None])
    return gqpe_table(torch.full((groups, rank), centre), factor, window, backend="reference")


def gradients(x, table, dz, window, backend, dtype, softmax=True):
    """Those of x and the table, by name."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, table)]
    z = pos_gate(*leaves, window=window, softmax=softmax, backend=backend)
    return dict(zip(("dx", "dtable"), torch.autograd.grad(z, leaves, dz.to(dtype)), strict=True))


def draw(window, channels=32, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, *window)
    x = torch.randn(*sizes, 2 * channels, generator=generator)
    return x, torch.randn(*sizes, channels, generator=generator)


def assert_right(window, sharpness, centre, softmax, **sizes):
    """In float64, where all but rounding is an error, and in float32."""
    table = gaussian(window, sharpness, centre)
    truth, eager, actual = [], [], []
    for seed in range(8):
        x, dz = draw(window, seed=seed, **sizes)
        truth.append(gradients(x, table, dz, window, "reference", torch.float64, softmax))
        eager.append(gradients(x, table, dz, window, "reference", torch.float32, softmax))
        actual.append(gradients(x, table, dz, window, "cpu", torch.float32, softmax))
    assert_no_worse(actual, eager, truth)
    for name, got in gradients(x, table, dz, window, "cpu", torch.float64, softmax).items():
        expected = truth[-1][name]
        assert torch.allclose(got, expected, rtol=0, atol=1e-13 * max(1, expected.abs().max().item())), name


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("width", [*range(1, 16), 20, 21, 24, 27])
def test_rows_of_every_width(width, softmax):
    """Tiles of every two heights meet."""
    for window, sharpness, centre in (((4, width), 0.3, 0.0), ((5, width), 1.0, 2.5), ((width,), 0.02, 0.0)):
        assert_right(window, sharpness, centre, softmax)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("rows", range(6, 17))
def test_any_number_of_rows(rows, softmax):
    """Of so many columns rows an odd number apart go by sums of two, where the rows' scales allow it: they do
    for the first two centres."""
    settings = (((rows, 6), 0.2, 0.0), ((rows, 9), 0.6, 2.0), ((2, rows, 5), 0.8, 4.5))
    for window, sharpness, centre in settings:
        assert_right(window, sharpness, centre, softmax, **MANY_COLUMNS)


@pytest.mark.parametrize("end", range(1, 15))
@pytest.mark.parametrize("mirrored", [False, True])
def test_weights_that_end_after_any_row(end, mirrored):
    """What lies one row nearer may count nowhere, one row farther it may not."""
    window, rows = (14, 14), 14
    table = torch.randn(2, 2 * rows - 1, 27, generator=torch.Generator().manual_seed(end))
    table[:, rows - 1 + end :] = -1000
    table[:, : end // 2] = -1000
    table[:, rows + end // 2 - 1] = -1000 if end % 3 == 0 else 0  # a gap
    table = table.flip(1) if mirrored else table
    x, dz = draw(window, seed=end, **MANY_COLUMNS)
    truth = gradients(x, table, dz, window, "reference", torch.float64)
    for dtype, rounding in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        for name, got in gradients(x, table, dz, window, "cpu", dtype).items():
            size = max(1, truth[name].abs().max().item())
            assert torch.allclose(got.double(), truth[name], rtol=0, atol=rounding * size), name


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("width", [10, 12, 14, 20])
def test_displacements_of_one_direction(width, mirrored):
    """Weights that end at any distance, and not by falling: two tiles may meet in one direction alone."""
    window = (4, width)
    for end in range(width):
        table = torch.randn(2, 7, 2 * width - 1, generator=torch.Generator().manual_seed(end))
        table[..., width + end :] = -1000  # of keys farther than `end` behind their query
        table = table.flip(-1) if mirrored else table
        x, dz = draw(window, seed=end)
        truth = gradients(x, table, dz, window, "reference", torch.float64)
        for dtype, rounding in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
            for name, got in gradients(x, table, dz, window, "cpu", dtype).items():
                size = max(1, truth[name].abs().max().item())
                assert torch.allclose(got.double(), truth[name], rtol=0, atol=rounding * size), name


@pytest.mark.parametrize("window", [(14, 14), (7, 7), (5, 24)])
def test_what_all_keys_share_costs_no_precision(window):
    """The gradient of a softmax lacks it. Eager's loses as many digits as it is larger than the rest."""
    x, dz = draw(window, batch=4)
    table = gaussian(window, 0.7)
    x[..., : x.shape[-1] // 2] += 100
    truth = gradients(x, table, dz, window, "reference", torch.float64)["dtable"]

    def error(backend):
        got = gradients(x, table, dz, window, backend, torch.float32)["dtable"]
        return ((got - truth).norm() / truth.norm()).item()

    assert error("reference") > 5e-6
    assert error("cpu") < 5e-7


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_those_who_see_it(value):
    """Queries that leave out a token have the gradients that they have without it."""
    window, channels = (4, 40), 32
    x, dz = draw(window, channels)
    table = gaussian(window, 1.0)
    without = gradients(x, table, dz, window, "cpu", torch.float32)["dx"]
    x[0, :, 0, 5] = value
    dx, dtable = gradients(x, table, dz, window, "cpu", torch.float32).values()
    assert not dx[0, :, :3, channels + 5].isfinite().any()
    assert not dtable[0].isfinite().all() and dtable[1].isfinite().all()
    far, kept = dx[0, :, 20:, channels + 5], without[0, :, 20:, channels + 5]
    assert torch.allclose(far, kept, rtol=1e-5, atol=1e-6)
    others = [c for c in range(2 * channels) if c % channels != 5]
    assert torch.equal(dx[..., others], without[..., others])
