"""The data behind the figures: patterns, ellipses, extents, what a gate does to an image."""

from __future__ import annotations

import math

import pytest
import torch

from posmlp import create_model
from posmlp.visualize.effect import gate_effects, upsample
from posmlp.visualize.extent import cumulated, extent, extents
from posmlp.visualize.views import GateView, view_levels
from posmlp_kernels import PosSGU, mixing_matrix
from posmlp_kernels.layers import ENCODINGS


def gate(encoding: str = "gqpe", window: tuple[int, ...] = (5, 6), groups: int = 2, **options) -> PosSGU:
    """A gate with parameters far from their initial values."""
    torch.manual_seed(1)
    made = PosSGU(8, window, groups=1 if encoding == "sgu" else groups, encoding=encoding, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def gaussian(center: list[float], covariance: list[list[float]], window: int = 61) -> GateView:
    """One group whose pattern is a Gaussian."""
    made = PosSGU(2, window, groups=1, bias=False)
    with torch.no_grad():
        made.center.copy_(torch.tensor([center]))
        made.factor.copy_(torch.linalg.cholesky(torch.tensor([covariance]).inverse()))
    return GateView.of(made)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_patterns_are_rows_of_the_mixing_matrix(encoding):
    made = gate(encoding)
    view = GateView.of(made)
    mixing = mixing_matrix(made.relative_table(), made.window, made.softmax, made.matrix)  # [S, N, N]
    for query in ((0, 0), (2, 3), (4, 5)):
        row = mixing[:, query[0] * 6 + query[1]].view(-1, 5, 6)
        torch.testing.assert_close(view.patterns(query), row.detach())
    assert view.middle == (2, 3)
    assert torch.equal(view.patterns(), view.patterns((2, 3)))
    if view.softmax:
        torch.testing.assert_close(view.patterns((4, 0)).sum((1, 2)), torch.ones(view.groups))


def test_a_view_is_a_copy():
    made = gate()
    view, bias = GateView.of(made), made.bias.detach().clone()
    pattern = view.patterns().clone()
    with torch.no_grad():
        made.bias.zero_()
        made.center.zero_()
    assert torch.equal(view.bias, bias.view(5, 6)) and torch.equal(view.patterns(), pattern)
    assert GateView.of(gate(bias=False)).bias is None


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match=r"two-dimensional.*\[7\]"):
        GateView.of(gate(window=(7,), encoding="lrpe"))
    broken = gate()
    with torch.no_grad():
        broken.center[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"center .* finite"):
        GateView.of(broken)
    for query in ((5, 0), (0, 6), (-1, 0)):
        with pytest.raises(ValueError, match=f"5x6 window.*got {query[0]} {query[1]}"):
            GateView.of(gate()).patterns(query)


CENTER, COVARIANCE = [3.0, -2.0], [[9.0, 4.0], [4.0, 16.0]]


def test_ellipses_have_the_moments_of_their_pattern():
    """A wide Gaussian in a larger window: its centre and covariance, measured from the pattern."""
    view = gaussian(CENTER, COVARIANCE)
    weights, steps = view.patterns()[0].double(), view.displacements().double()
    mean = torch.einsum("hw,hwd->d", weights, steps)
    covariance = torch.einsum("hw,hwd,hwe->de", weights, steps - mean, steps - mean)
    curve = view.ellipses(1.0, points=361)[0, :-1].double()
    torch.testing.assert_close(curve.mean(0), mean, atol=1e-3, rtol=0)
    offsets = curve - curve.mean(0)
    torch.testing.assert_close(2 * offsets.T @ offsets / len(offsets), covariance, atol=0.02, rtol=0)
    torch.testing.assert_close(mean, torch.tensor(CENTER).double(), atol=1e-3, rtol=0)

    inverse = torch.tensor(COVARIANCE).inverse()
    apart = view.ellipses(2.0)[0] - torch.tensor(CENTER)
    torch.testing.assert_close(((apart @ inverse) * apart).sum(1), torch.full((73,), 4.0), atol=1e-3, rtol=0)


def test_the_isotropic_ellipse_lies_where_its_pattern_does():
    made = PosSGU(2, 31, groups=1, encoding="gqpe_isotropic", bias=False)
    with torch.no_grad():
        made.center.copy_(torch.tensor([[1.0, -0.5]]))
        made.scale.fill_(2.0)
    view = GateView.of(made)
    mean = torch.einsum("hw,hwd->d", view.patterns()[0], view.displacements())
    torch.testing.assert_close(mean, torch.tensor([4.0, -2.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(view.center[0], mean, atol=1e-3, rtol=0)
    torch.testing.assert_close((view.ellipses(1.0)[0] - mean).norm(dim=1), torch.ones(73), atol=1e-3, rtol=0)


def test_a_flat_gaussian_has_an_ellipse():
    made = PosSGU(2, 5, groups=1)
    torch.nn.init.zeros_(made.factor)
    assert GateView.of(made).ellipses(1.0).isfinite().all()


def table_gate(**entries: float) -> GateView:
    """A learned table of 5x5 windows that is zero but for displacements such as d1_0."""
    made = PosSGU(2, 5, groups=1, encoding="lrpe")
    torch.nn.init.zeros_(made.table)
    with torch.no_grad():
        for name, value in entries.items():
            row, column = map(int, name[1:].split("_"))
            made.table[0, 4 + row, 4 + column] = value
    return GateView.of(made)


def test_extents_of_simple_patterns():
    assert extent(table_gate(d0_0=-3.0)).by_group.item() == 0.0
    assert extent(table_gate()).by_group.item() == 0.0
    assert extent(table_gate(d1_2=-3.0), stride=4).by_group.item() == pytest.approx(4 * math.sqrt(5))
    half = extent(table_gate(d0_0=1.0, d2_0=-1.0))  # signs do not cancel
    assert half.by_group.item() == pytest.approx(math.sqrt(2))
    assert half.mean.tolist() == [[1.0, 0.0]]
    assert half.uniform == pytest.approx(2.0) and half.window == 5


def test_the_extent_of_a_gaussian():
    """Its covariance's trace and its centre's distance, root of the sum of squares; in pixels."""
    found = extent(gaussian(CENTER, COVARIANCE), stride=8)
    assert found.by_group.item() == pytest.approx(8 * math.sqrt(9 + 16 + 9 + 4), rel=1e-3)
    assert found.overall == pytest.approx(found.by_group.item())


def test_cumulated_extents_add_means_and_variances():
    step = extent(gaussian([1.0, 0.0], [[4.0, 0.0], [0.0, 5.0]]))
    assert cumulated([step] * 3) == pytest.approx([math.sqrt(n * n + 9 * n) for n in (1, 2, 3)], rel=1e-3)
    # Two groups that look to opposite sides are a spread, not a drift.
    made = PosSGU(4, 61, groups=2, bias=False)
    with torch.no_grad():
        made.center.copy_(torch.tensor([[0.0, 3.0], [0.0, -3.0]]))
        made.factor.copy_(torch.eye(2).expand(2, 2, 2))
    assert cumulated([extent(GateView.of(made))] * 4)[-1] == pytest.approx(math.sqrt(4 * 11), rel=1e-3)


def test_levels_of_a_model():
    levels = view_levels(create_model("posmlp_nano", in_chans=1))
    assert [(level.number, level.stride, len(level.gates)) for level in levels] == [(0, 4, 2), (1, 8, 2)]
    assert [step.level for step in extents(levels)] == [0, 0, 1, 1]
    assert [level.last.window for level in levels] == [(8, 8), (4, 4)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_effects_are_what_the_gate_computes(encoding):
    """X1 and P X1 + b by the definition, for windows that shift and stick out of the map."""
    torch.manual_seed(0)
    groups = 1 if encoding == "sgu" else (2, 4)
    model = create_model("posmlp_nano", encoding=encoding, groups=groups, shift=True, windows=(5, 3)).eval()
    pixels = torch.randn(3, 32, 40)
    last, caught = [level.blocks[-1].gate for level in model.levels], {}
    hooks = [g.register_forward_hook(lambda m, x, z: caught.update({m: (x[0], z)})) for g in last]
    with torch.no_grad():
        model(pixels.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    effects = gate_effects(model, pixels, [0, 1])
    for effect, size in zip(effects, ((8, 10), (4, 5)), strict=True):
        x, z = caught[last[effect.level]]
        tokens, gates = torch.nn.functional.gelu(x).chunk(2, -1)
        assert effect.tokens.shape == effect.mixed.shape == effect.gated.shape == size
        torch.testing.assert_close(effect.tokens, tokens[0].abs().mean(-1))
        torch.testing.assert_close(effect.gated, z[0].abs().mean(-1))
        torch.testing.assert_close(effect.mixed, (z / gates)[0].abs().mean(-1), rtol=1e-2, atol=1e-3)
    assert not any(g._forward_hooks for g in last)
    assert effects[0].borders() == ([3 / 8], [0.3, 0.8])  # windows of 5 that begin at -2
    assert [effect.level for effect in gate_effects(model, pixels, [1])] == [1]


def test_effects_of_broken_weights_are_refused():
    model = create_model("posmlp_nano", in_chans=1).eval()
    torch.nn.init.constant_(model.stem.conv1.weight, math.inf)
    with pytest.raises(ValueError, match="level 0 must give finite"):
        gate_effects(model, torch.rand(1, 32, 32), [0, 1])


def test_upsampling_keeps_the_mean_of_a_map():
    values = torch.rand(4, 5)
    large = upsample(values, (32, 40))
    assert large.shape == (32, 40)
    assert upsample(torch.full((4, 5), 2.0), (32, 40)).eq(2.0).all()
    torch.testing.assert_close(large.mean(), values.mean(), atol=0.05, rtol=0)
