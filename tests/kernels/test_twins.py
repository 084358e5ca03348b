"""Windows with an even number of rows: three products in the place of four (csrc/pos_gate/cpu_packing.h)."""

from __future__ import annotations

import pytest
import torch
from support import assert_cpu_no_worse, available, results_of

from posmlp_kernels import gqpe_table, pos_gate

pytestmark = pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")


def gaussian(window, sharpness, centre=0.0):
    factor = sharpness * (torch.eye(2) + 0.1 * torch.arange(2)[:, None, None])
    return gqpe_table(torch.full((2, 2), centre), factor, window, backend="reference")


def draw(table, window, seed, maps=None, channels=48, batch=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *(maps or window), 2 * channels, generator=generator)
    dz = torch.randn(batch, *(maps or window), channels, generator=generator)
    return (x, table, torch.randn(window[0] * window[1], generator=generator)), dz


def assert_right(table, window, seeds=8, settings=None, **sizes):
    assert_cpu_no_worse(
        [draw(table, window, seed, **sizes) for seed in range(seeds)], window, **(settings or {})
    )


@pytest.mark.parametrize("width", range(2, 18))
@pytest.mark.parametrize("rows", [8, 10])
def test_rows_of_every_width(rows, width):
    """Tiles of all heights, and rows too short to have tiles of their own."""
    assert_right(gaussian((rows, width), 0.5), (rows, width))


@pytest.mark.parametrize("rows", [8, 12, 14, 18, 24])
@pytest.mark.parametrize("channels", [48, 96, 90, 20])
def test_panels_of_every_kind(rows, channels):
    """From registers and out of memory, full and not, with sums of more than 256 terms among them."""
    assert_right(gaussian((rows, 24), 0.25, 1.0), (rows, 24), channels=channels)


@pytest.mark.parametrize("shift", [(0, 0), (5, 3)])
def test_windows_that_are_cut(shift):
    """With an odd number of rows and with few of them, in one map with even ones."""
    assert_right(gaussian((12, 10), 0.4), (12, 10), maps=(29, 23), settings={"shift": shift})


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(activation):
    assert_right(gaussian((14, 14), 0.5), (14, 14), settings={"activation": activation})


@pytest.mark.parametrize("end", range(1, 15))
@pytest.mark.parametrize("mirrored", [False, True])
def test_weights_that_end_after_any_row(end, mirrored):
    """Of a row and its twin one may see what the other does not."""
    window = (14, 14)
    table = 0.2 * torch.randn(2, 27, 27, generator=torch.Generator().manual_seed(end))
    table[:, 13 + end :] = -1000
    table[:, : end // 2] = -1000
    table[:, :, 20 - end // 2 :] = -1000
    assert_right(table.flip(1) if mirrored else table, window)


@pytest.mark.parametrize("high", [0, 1])
def test_tables_that_are_not_smooth(high):
    """Where twins have weights of different orders their difference has twice the error, in the mean."""
    table = 0.1 * torch.randn(2, 27, 27, generator=torch.Generator().manual_seed(0))
    table[:, high::2] += 20
    (x, *_), _ = draw(table, (14, 14), 0)

    def error(backend):
        settings = {"window": (14, 14), "softmax": True}
        truth = pos_gate(x.double(), table.double(), **settings, backend="reference")
        return (pos_gate(x, table, **settings, backend=backend) - truth).norm().item()

    assert error("cpu") < 1.7 * error("reference")


@pytest.mark.parametrize("centre", [1.5, 3.0, 6.0, 12.0])
@pytest.mark.parametrize("sharpness", [0.3, 0.8])
def test_gaussians_beside_the_window(sharpness, centre):
    """Whose rows have sums of other orders the farther they are from it."""
    assert_right(gaussian((14, 14), sharpness, centre), (14, 14))


def test_groups_with_and_without():
    """In turn, of small windows, of which what was found for the last group may serve again."""
    tables = [gaussian((8, 8), sharpness) for sharpness in (0.3, 1.8, 0.2)]
    assert_right(torch.cat(tables), (8, 8), channels=144)


def test_what_is_not_finite_stays_in_its_group():
    """In one thread, whose next group finds the last one's sums where its own will be."""
    window, channels, before = (14, 14), 52, torch.get_num_threads()
    (x, table, bias), dz = draw(gaussian(window, 0.5), window, 0, channels=channels)
    settings = {"window": window, "backend": "cpu", "dtype": torch.float32}
    torch.set_num_threads(1)
    try:
        without = results_of((x, table, bias), dz, **settings)
        x[..., : channels // 2] = torch.nan
        results = results_of((x, table, bias), dz, **settings)
    finally:
        torch.set_num_threads(before)
    assert results["dtable"][0].isnan().any()
    assert torch.equal(results["dtable"][1], without["dtable"][1])
    assert torch.equal(results["z"][..., channels // 2 :], without["z"][..., channels // 2 :])
