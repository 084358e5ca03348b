"""The specification itself: the reference against loops, against the cyclic roll, and its own invariants."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import by_pairs

from posmlp_kernels import gqpe_table, mixing_matrix, pos_gate
from posmlp_kernels.testing import CASES, find_case, make_inputs, run


def by_loops(x, table, bias, window, shift, softmax):
    """One 2-D image, one number at a time, as the equation reads: no tensors but for storage."""
    height, width, channels = x.shape[0], x.shape[1], x.shape[2] // 2
    depth = channels // table.shape[0]
    z = torch.zeros(height, width, channels, dtype=torch.float64)
    tokens = list(itertools.product(range(height), range(width)))

    def window_and_place(token):
        moved = [t + s for t, s in zip(token, shift, strict=True)]
        pairs = [divmod(m, w) for m, w in zip(moved, window, strict=True)]
        return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)

    for (i, c), _ in itertools.product(itertools.product(tokens, range(channels)), [0]):
        i_window, i_place = window_and_place(i)
        values, inputs = [], []
        for j in tokens:
            j_window, j_place = window_and_place(j)
            if j_window == i_window:
                row, column = (b - a + w - 1 for a, b, w in zip(i_place, j_place, window, strict=True))
                values.append(float(table[c // depth, row, column]))
                inputs.append(float(x[j][c]))
        if softmax:
            total = math.fsum(math.exp(v) for v in values)
            values = [math.exp(v) / total for v in values]
        mixed = math.fsum(v * a for v, a in zip(values, inputs, strict=True))
        z[i][c] = (mixed + float(bias[i_place[0] * window[1] + i_place[1]])) * float(x[i][channels + c])
    return z


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    "size, window, shift", [((4, 5), (3, 2), (0, 0)), ((5, 4), (3, 3), (1, 2)), ((2, 3), (4, 5), (3, 0))]
)
def test_loops(size, window, shift, softmax):
    """Partial, shifted and oversized windows against plain Python numbers."""
    torch.manual_seed(0)
    x = torch.randn(*size, 8, dtype=torch.float64)
    table = torch.randn(2, *(2 * w - 1 for w in window), dtype=torch.float64)
    bias = torch.randn(math.prod(window), dtype=torch.float64)
    truth = by_loops(x, table, bias, window, shift, softmax)
    options = {"window": window, "shift": shift, "softmax": softmax}
    for function in (by_pairs, lambda *a, **o: pos_gate(*a, **o, backend="reference")):
        torch.testing.assert_close(function(x[None], table, bias, **options)[0], truth, rtol=0, atol=1e-13)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    "map_size, window, shift", [((8, 8), (4, 4), (2, 2)), ((6, 8), (3, 4), (1, 3)), ((9,), (3,), (2,))]
)
def test_shift_is_the_cyclic_roll_with_a_region_mask(map_size, window, shift, softmax):
    """Swin's way on maps that windows tile: roll the map, mix whole windows, mask pairs that were not
    neighbours before the roll, and roll back. A token's place in its window is the same in both."""
    torch.manual_seed(1)
    rank, tokens, groups, depth = len(map_size), math.prod(window), 2, 3
    x = torch.randn(2, *map_size, 2 * groups * depth, dtype=torch.float64)
    table = torch.randn(groups, *(2 * w - 1 for w in window), dtype=torch.float64)
    bias = torch.randn(tokens, dtype=torch.float64)
    axes = tuple(range(1, rank + 1))

    def windows(t):  # [B, *map, C] -> [T, N, C] for each image, by index rather than by view
        starts = itertools.product(*(range(0, m, w) for m, w in zip(map_size, window, strict=True)))
        cut = [
            t[(slice(None), *(slice(s, s + w) for s, w in zip(start, window, strict=True)))]
            for start in starts
        ]
        return torch.stack([c.flatten(1, rank) for c in cut], 1)  # [B, T, N, C]

    rolled = x.roll(shift, axes)  # the grid moved by -shift is the map moved by +shift
    region = torch.zeros(1, *map_size, 1, dtype=torch.float64)
    for axis, s in enumerate(shift):
        wrapped = (torch.arange(map_size[axis]) < s).double() * 2**axis
        region = region + wrapped.view(-1, *(1,) * (rank - axis))
    label = windows(region)[0, ..., 0]  # [T, N]
    same = label[:, :, None] == label[:, None]  # [T, N, N]

    logits = mixing_matrix(table, window, False)  # [S, N, N]
    if softmax:
        weights = logits.expand(len(same), -1, -1, -1).masked_fill(~same[:, None], -torch.inf).softmax(-1)
    else:
        weights = logits * same[:, None]
    x1, x2 = windows(rolled).chunk(2, -1)
    mixed = torch.einsum("tgij,btjgd->btigd", weights, x1.unflatten(-1, (groups, depth))).flatten(-2)
    masked = (mixed + bias[:, None]) * x2  # [B, T, N, C]

    z = pos_gate(x, table, bias, window=window, shift=shift, softmax=softmax, backend="reference")
    torch.testing.assert_close(windows(z.roll(shift, axes)), masked, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_shift_of_whole_windows_is_no_shift(case):
    inputs = make_inputs(case, torch.float64)
    shift = case.shift or (0,) * len(case.map)
    moved = type(case)(
        **{**vars(case), "shift": tuple(s + 2 * w for s, w in zip(shift, case.window, strict=True))}
    )
    assert torch.equal(run(case, inputs, "reference"), run(moved, inputs, "reference"))


def test_windows_are_independent():
    """A map is its windows: each alone gives the same numbers."""
    case = find_case("tiles")
    inputs = make_inputs(case, torch.float64)
    z = run(case, inputs, "reference")
    for row, column in itertools.product((0, 4), (0, 4)):
        part = inputs["x"][:, row : row + 4, column : column + 4]
        alone = run(case, {**inputs, "x": part}, "reference")
        torch.testing.assert_close(z[:, row : row + 4, column : column + 4], alone, rtol=0, atol=1e-14)


def test_ranks_agree():
    """A line, a flat picture and a flat volume are the same problem."""
    torch.manual_seed(2)
    x, table = torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    line = pos_gate(x, table, bias, window=(3,), shift=(1,), softmax=True, backend="reference")
    flat = pos_gate(
        x[:, None], table[:, None], bias, window=(1, 3), shift=(0, 1), softmax=True, backend="reference"
    )
    deep = pos_gate(
        x[:, :, None, None],
        table[..., None, None],
        bias,
        window=(3, 1, 1),
        shift=(1, 0, 0),
        softmax=True,
        backend="reference",
    )
    assert torch.equal(line, flat[:, 0]) and torch.equal(line, deep[:, :, 0, 0])


def test_bias_is_added_before_the_gate_and_by_place():
    """With X1 = 0 and X2 = 1 what is left is the bias at each token's place in its window."""
    x = torch.cat([torch.zeros(1, 5, 6, 2), torch.ones(1, 5, 6, 2)], -1).double()
    bias = torch.arange(12, dtype=torch.float64)
    z = pos_gate(
        x,
        torch.zeros(1, 5, 7, dtype=torch.float64),
        bias,
        window=(3, 4),
        shift=(1, 2),
        softmax=True,
        backend="reference",
    )
    for row, column in itertools.product(range(5), range(6)):
        assert (z[0, row, column] == (row + 1) % 3 * 4 + (column + 2) % 4).all()


def test_mixing_matrix_is_what_the_operator_applies():
    """One-hot inputs read the matrix out of the operator, query by key."""
    case = find_case("matrix_grouped")
    inputs = make_inputs(case, torch.float64)
    tokens = math.prod(case.window)
    eye = torch.eye(tokens, dtype=torch.float64).repeat(1, case.groups)  # channel = group * N + key
    x = torch.cat([eye, torch.ones_like(eye)], -1).view(1, *case.window, -1)
    z = pos_gate(
        x, inputs["table"], matrix=inputs["matrix"], window=case.window, softmax=True, backend="reference"
    )
    read = z.view(tokens, case.groups, tokens).transpose(0, 1)
    matrix = mixing_matrix(inputs["table"], case.window, True, inputs["matrix"])
    torch.testing.assert_close(read, matrix, rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(case.groups, tokens, dtype=torch.float64))


def test_centre_points_from_query_to_key():
    """A sharp quadratic about (0, 1) takes each token's value from its right-hand neighbour."""
    table = gqpe_table(torch.tensor([[0.0, 1.0]]), 20 * torch.eye(2)[None], (3, 4))
    matrix = mixing_matrix(table, (3, 4), True)[0].view(3, 4, 3, 4)
    for row, column in itertools.product(range(3), range(3)):
        assert matrix[row, column, row, column + 1] > 0.999
