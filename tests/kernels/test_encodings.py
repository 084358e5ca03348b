"""Relative tables: their formulas, their gradients and what they refuse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from posmlp_kernels import gqpe_table, mixing_matrix
from posmlp_kernels.encodings import gqpe_isotropic_table


def quadratic(rank, groups=2, dtype=torch.float64):
    torch.manual_seed(rank)
    return torch.randn(groups, rank, dtype=dtype), torch.randn(groups, rank, rank, dtype=dtype)


@pytest.mark.parametrize("window", [(4,), (3, 2), (2, 3, 2)], ids=str)
def test_gqpe_is_its_formula(window):
    """-1/2 (delta - centre)' M M' (delta - centre), displacement by displacement."""
    center, factor = quadratic(len(window))
    table = gqpe_table(center, factor, window)
    assert table.shape == (2, *(2 * w - 1 for w in window))
    for group in range(2):
        precision = factor[group] @ factor[group].T
        for delta in itertools.product(*(range(1 - w, w) for w in window)):
            offset = torch.tensor(delta, dtype=torch.float64) - center[group]
            value = table[(group, *(d + w - 1 for d, w in zip(delta, window, strict=True)))]
            assert math.isclose(value, -0.5 * offset @ precision @ offset, rel_tol=1e-12, abs_tol=1e-12)


def test_isotropic_differs_from_its_formula_by_a_constant_per_group():
    """The softmax does not see it: the same mixing matrix as of a^2 (centre . delta) - |delta|^2 / 2."""
    torch.manual_seed(0)
    center, scale = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    table = gqpe_isotropic_table(center, scale, (4, 3))
    rows, columns = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-2.0, 3), indexing="ij")
    delta = torch.stack([rows, columns], -1).double()
    formula = scale[:, None, None] ** 2 * (delta @ center.T).movedim(-1, 0) - delta.square().sum(-1) / 2
    difference = table - formula
    torch.testing.assert_close(difference, difference[:, :1, :1].expand_as(difference))
    torch.testing.assert_close(mixing_matrix(table, (4, 3), True), mixing_matrix(formula, (4, 3), True))


@pytest.mark.parametrize("window", [(4,), (3, 2), (2, 2, 2)], ids=str)
def test_gqpe_gradients(window):
    center, factor = (t.requires_grad_() for t in quadratic(len(window)))
    assert torch.autograd.gradcheck(lambda c, f: gqpe_table(c, f, window), (center, factor))
    assert torch.autograd.gradgradcheck(lambda c, f: gqpe_table(c, f, window), (center, factor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_make_a_float32_table(dtype):
    """A rounded exponent would be a wrong weight; the gradients come back in the parameters' dtype."""
    center, factor = (t.requires_grad_() for t in quadratic(2, dtype=dtype))
    table = gqpe_table(center, factor, 7)
    assert table.dtype == torch.float32
    assert torch.equal(table, gqpe_table(center.float(), factor.float(), 7))
    table.sum().backward()
    assert center.grad.dtype == factor.grad.dtype == dtype


def test_autocast_does_not_round_the_table():
    center, factor = quadratic(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gqpe_table(center, factor, 7)
    assert inside.dtype == torch.float32 and torch.equal(inside, gqpe_table(center, factor, 7))


def test_an_int_is_a_window_in_every_dimension():
    center, factor = quadratic(3)
    assert torch.equal(gqpe_table(center, factor, 2), gqpe_table(center, factor, (2, 2, 2)))
    table = gqpe_table(center, factor, 2)
    assert torch.equal(mixing_matrix(table, 2, True), mixing_matrix(table, (2, 2, 2), True))


def test_mixing_matrix_indexes_by_displacement():
    """`P[g, i, j] = R[g, position(j) - position(i)]`, for each pair."""
    torch.manual_seed(0)
    table, free = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    plain, summed = mixing_matrix(table, (3, 2), False), mixing_matrix(table, (3, 2), False, free)
    for i, j in itertools.product(range(6), repeat=2):
        row, column = j // 2 - i // 2, j % 2 - i % 2
        assert torch.equal(plain[:, i, j], table[:, row + 2, column + 1])
        assert torch.equal(summed[:, i, j], table[:, row + 2, column + 1] + free[i, j])
    softmax = mixing_matrix(table, (3, 2), True, free)
    torch.testing.assert_close(softmax, summed.exp() / summed.exp().sum(-1, keepdim=True))
    assert mixing_matrix(None, (3, 2), False, free).shape == (1, 6, 6)


@pytest.mark.parametrize(
    "center, factor, window, error, message",
    [
        ((2,), (2, 2, 2), 3, ValueError, r"center must be \[S, d\], got \[2\]"),
        ((2, 2), (2, 2, 3), 3, ValueError, r"factor must be \[S, d, d\] = \[2, 2, 2\], got \[2, 2, 3\]"),
        ((2, 2), (3, 2, 2), 3, ValueError, r"factor must be \[S, d, d\] = \[2, 2, 2\], got \[3, 2, 2\]"),
        ((2, 2), (2, 2, 2), (3,), ValueError, r"window must be 2 sizes of at least 1, got \[3\]"),
        ((2, 2), (2, 2, 2), (3, 0), ValueError, r"window must be 2 sizes of at least 1, got \[3, 0\]"),
        ((2, 2), (2, 2, 2), 0, ValueError, r"window must be 2 sizes of at least 1, got \[0, 0\]"),
    ],
)
def test_gqpe_refuses_shapes(center, factor, window, error, message):
    with pytest.raises(error, match=message):
        gqpe_table(torch.ones(center), torch.ones(factor), window)


def test_gqpe_refuses_dtypes():
    with pytest.raises(
        TypeError, match=r"must share a floating-point dtype, got torch\.float32 and torch\.float64"
    ):
        gqpe_table(torch.ones(1, 2), torch.ones(1, 2, 2, dtype=torch.float64), 3)
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.int64"):
        gqpe_table(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, 2, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, (2, 2), True), "table or matrix must be given"),
        (
            (None, 2, True, torch.ones(4, 4)),
            "window must be one size per map dimension where there is no table",
        ),
        (
            (torch.ones(1, 3, 5), (2, 2), True),
            r"table must be \[S, 2\*2-1, 2\*2-1\] = \[S, 3, 3\], got \[1, 3, 5\]",
        ),
        (
            (torch.ones(1, 3, 3), (2, 2), True, torch.ones(4, 3)),
            r"matrix must be \[N, N\] or \[S, N, N\] with N = 4",
        ),
        ((torch.ones(2, 3, 3), (2, 2), True, torch.ones(3, 4, 4)), "matrix must have the table's 2 groups"),
    ],
)
def test_mixing_matrix_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixing_matrix(*arguments)
