"""The transposed copy that linear layers make for their gradients."""

import pytest
import torch
from support import available

from posmlp_kernels.transposed import transposed

SIDES = (1, 3, 15, 16, 17, 31, 48, 65)


@pytest.mark.parametrize("rows", SIDES)
@pytest.mark.parametrize("columns", SIDES)
def test_equals_pytorch_bit_for_bit(rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 100 + columns))
    y = transposed(x)
    assert y.is_contiguous() and torch.equal(y, x.T)


def test_rows_may_lie_apart_and_large_ones_are_shared_out():
    x = torch.randn(3000, 70)
    for view in (x, x[:, 3:50], x[::7, :33], x[:1].expand(5, 70), x.T, x[:, :1], x[:0], x[:, :0]):
        assert torch.equal(transposed(view), view.T)


@pytest.mark.parametrize("ones", [1, 3])
def test_rows_of_ones_below(ones):
    for x in (torch.randn(37, 21), torch.randn(3000, 70)[:, 3:50], torch.randn(4, 0), torch.randn(0, 4)):
        assert torch.equal(transposed(x, ones), torch.cat([x.T, torch.ones(ones, len(x))]))


@pytest.mark.parametrize("ones", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types(dtype, ones):
    x = torch.arange(30).view(5, 6).to(dtype)
    y = transposed(x, ones)
    assert y.dtype == dtype and torch.equal(y, torch.cat([x.T, torch.ones(ones, 5, dtype=dtype)]))


def test_nan_and_infinity_go_along():
    x = torch.tensor([[1.0, float("nan")], [float("-inf"), -0.0]])
    y = transposed(x)
    assert torch.equal(y.view(torch.int32), x.T.contiguous().view(torch.int32))


def test_without_the_compiled_copy(monkeypatch):
    monkeypatch.setattr("posmlp_kernels.transposed._COMPILED", False)
    x = torch.randn(7, 5)
    assert torch.equal(transposed(x), x.T) and transposed(x).is_contiguous()


def test_it_is_no_part_of_a_graph():
    assert not transposed(torch.randn(4, 3, requires_grad=True)).requires_grad


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"x must be \[M, K\], got 1 dimensions"),
        (torch.zeros(3, 4).double(), "x must be float32"),
        (torch.zeros(4, 3).T, "the rows of x must be contiguous"),
    ],
)
def test_the_bare_op_refuses_by_name(x, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.posmlp_kernels.transposed(x)


@pytest.mark.skipif(not available("cpu"), reason="the cpu back end is not built")
def test_the_bare_op_refuses_fewer_than_no_ones():
    with pytest.raises(RuntimeError, match="ones must not be negative, got -1"):
        torch.ops.posmlp_kernels.transposed(torch.zeros(3, 4), -1)
