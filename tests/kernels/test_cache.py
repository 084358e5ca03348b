"""The table of a frozen layer is built once, and never used after a parameter has changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from posmlp_kernels import PosSGU, layers

ENCODINGS = ("gqpe", "gqpe_isotropic")
encodings = pytest.mark.parametrize("encoding", ENCODINGS)


@pytest.fixture
def built(monkeypatch):
    """A list that grows by one for every table that is built."""
    calls = []
    for name in ("gqpe_table", "gqpe_isotropic_table"):
        build = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, build=build, **k: calls.append(1) or build(*a, **k))
    return calls


def make(encoding="gqpe"):
    torch.manual_seed(0)
    return PosSGU(8, 3, groups=2, encoding=encoding, backend="reference").eval()


def x(dtype=torch.float32):
    return torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def fresh(layer, dtype=torch.float32):
    """What the layer must give: a new layer with its parameters, which has no cache to be stale."""
    new = PosSGU(
        8, 3, groups=2, encoding=layer.encoding, backend="reference", dtype=layer.center.dtype
    ).train()
    new.load_state_dict(layer.state_dict())
    return new(x(dtype)).detach()


@encodings
def test_a_frozen_layer_builds_its_table_once(built, encoding):
    layer = make(encoding)
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            for _ in range(3):
                layer(x())
    assert len(built) == 1


@encodings
def test_frozen_parameters_need_no_no_grad(built, encoding):
    """Fine-tuning something else: x has gradients, the gate's parameters do not."""
    layer, leaf = make(encoding).requires_grad_(False), x().requires_grad_()
    for _ in range(3):
        layer(leaf).sum().backward()
    assert len(built) == 1 and leaf.grad.any()


def test_a_table_from_inference_mode_serves_autograd_later():
    layer, leaf = make().requires_grad_(False), x().requires_grad_()
    with torch.inference_mode():
        layer(x())
    layer(leaf).sum().backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("mode", ["train", "grad"])
def test_no_cache_where_the_table_has_a_gradient(built, mode):
    layer = make().train(mode == "train")
    for _ in range(3):
        layer(x()).sum().backward()
    assert len(built) == 3 and layer.center.grad.any()


def in_place(layer):
    layer.center.add_(0.5)


def through_data(layer):
    layer.center.data[0, 0] = 3.0


def through_detach(layer):
    layer.center.detach().mul_(7)


def through_numpy(layer):
    layer.center.detach().numpy()[:] += 1


def data_replaced(layer):
    layer.center.data = layer.center.data + 1


def parameter_replaced(layer):
    layer.center = torch.nn.Parameter(layer.center.detach() + 1)


def loaded(layer):
    layer.load_state_dict({k: v + 0.5 for k, v in layer.state_dict().items()})


def loaded_by_assignment(layer):
    layer.load_state_dict({k: v + 0.5 for k, v in layer.state_dict().items()}, assign=True)


def optimizer_step(layer):
    with torch.enable_grad():
        layer(x()).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def fused_optimizer_step(layer):
    with torch.enable_grad():
        layer(x()).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True).step()


def reset(layer):
    layer.reset_parameters()


def other_parameter(layer):
    for name, parameter in layer.named_parameters():
        if name in ("factor", "scale"):
            parameter.mul_(1.5)


def swapped(layer):
    torch.utils.swap_tensors(layer.center, torch.nn.Parameter(layer.center.detach() + 1))


CHANGES = [
    in_place,
    through_data,
    through_detach,
    through_numpy,
    data_replaced,
    parameter_replaced,
    loaded,
    loaded_by_assignment,
    optimizer_step,
    fused_optimizer_step,
    reset,
    other_parameter,
    swapped,
]


@encodings
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_is_never_missed(encoding, change):
    layer = make(encoding)
    before = layer(x())
    change(layer)
    after = layer(x())
    assert not torch.equal(before, after), "the change must matter for this test"
    assert torch.equal(after, fresh(layer))


@torch.no_grad()
def test_inference_mode_changes_are_seen():
    layer = make()
    with torch.inference_mode():
        layer(x())
        layer.center.data.add_(1)
        after = layer(x())
    assert torch.equal(after, fresh(layer))


@encodings
@torch.no_grad()
def test_dtype_changes_are_seen(encoding):
    layer = make(encoding)
    layer(x())
    layer.to(torch.float64)
    assert torch.equal(layer(x(torch.float64)), fresh(layer, torch.float64))
    layer.bfloat16()
    assert torch.equal(layer(x(torch.bfloat16)), fresh(layer, torch.bfloat16))


@torch.no_grad()
def test_another_window_is_seen():
    layer = make()
    layer(x())
    layer.window, layer.bias = (2, 2), None
    wanted = PosSGU(8, 2, groups=2, bias=False, backend="reference").train()
    wanted.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x()), wanted(x()))


@torch.no_grad()
def test_other_shapes_with_the_same_numbers_are_refused_as_ever():
    layer = make()
    layer(x())
    layer.center = torch.nn.Parameter(layer.center.reshape(1, 4))
    with pytest.raises(ValueError, match="factor must be"):
        layer(x())


@torch.no_grad()
def test_copies_do_not_share_a_cache():
    layer = make()
    expected = layer(x())
    for copied in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x()), expected)
    other = copy.deepcopy(layer)
    other.center.add_(1)
    assert torch.equal(other(x()), fresh(other)) and torch.equal(layer(x()), expected)


@torch.no_grad()
def test_functional_call_does_not_see_the_layers_table():
    layer = make()
    expected = layer(x())
    other = {name: value + 0.5 for name, value in layer.named_parameters()}
    result = torch.func.functional_call(layer, other, (x(),))
    assert not torch.equal(result, expected)
    assert torch.equal(layer(x()), expected)


@torch.no_grad()
def test_nothing_of_the_cache_is_saved():
    layer = make()
    names = set(layer.state_dict())
    layer(x())
    assert set(layer.state_dict()) == names
    assert layer._cache._entry is not None and pickle.loads(pickle.dumps(layer))._cache._entry is None


@torch.no_grad()
def test_not_a_number_is_never_kept():
    """NaN differs from itself, so a poisoned table is rebuilt rather than trusted."""
    layer = make()
    expected = layer(x())
    kept = layer.center.clone()
    layer.center.fill_(torch.nan)
    assert layer(x()).isnan().any()
    layer.center.copy_(kept)
    assert torch.equal(layer(x()), expected)
