"""What models are: sizes, costs, names, options, and what their forward does with maps of any size."""

import pytest
import torch

import posmlp
from posmlp import complexity, create_model, list_models
from posmlp.cost import total
from posmlp_kernels import PosSGU

# Parameters in millions, of the paper's tables and abstract.
PARAMETERS = {
    "posmlp_tiny": 20.93,
    "posmlp_small": 36.82,
    "posmlp_base": 81.98,
    "gmlp_s16_sgu": 19.42,
    "gmlp_s16_ggqpe": 18.23,
    "gmlp_s16_lrpe": 18.25,
    "gmlp_s16_lrpe_m": 19.40,
}
MACS = {"posmlp_tiny": 5.19, "posmlp_small": 8.73, "posmlp_base": 18.56}  # in 1e9, at 224 x 224


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_paper(name):
    model = create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PARAMETERS[name]


@pytest.mark.parametrize("name", MACS)
def test_macs_of_the_paper(name):
    assert round(total(complexity(create_model(name, device="meta"))).macs / 1e9, 2) == MACS[name]


def test_macs_at_384():
    model = create_model("posmlp_tiny", windows=(12, 12, 24, 12), device="meta")
    cost = total(complexity(model, 384))
    assert round((cost.macs - cost.map_macs) / 1e9, 1) == 17.7
    assert round(cost.macs / 1e9, 1) == 18.6


def test_complexity_by_hand():
    model = create_model(
        "posmlp_nano", dims=(8, 16), depths=1, windows=(3, 2), groups=2, ratios=2, shift=True
    )
    stem, first, second, head = complexity(model, (16, 8))
    assert (stem.shape, first.shape, second.shape, head.shape) == ((8, 4, 2), (8, 4, 2), (16, 2, 1), (10,))
    norms = 2 * (4 * 8 * 4 + 2 * 8 * 4 * 2)
    assert stem.macs == (4 * 8 * 4) * 27 + (8 * 4 * 2) * 4 * 9 + (8 * 4 * 2) * 8 + norms
    pairs = (9 + 1) * 4  # windows of 3 and 1 rows, and of 2 columns: tokens squared
    assert first.macs == 8 * (8 * 16 + 8 * 8) + pairs * 8 + 5 * 64 + first.map_macs
    assert first.map_macs == 5 * 2 * 81
    assert sum(c.parameters for c in (stem, first, second, head)) == sum(
        p.numel() for p in model.parameters()
    )


def test_complexity_leaves_the_model_alone():
    model = create_model("posmlp_nano", gate_backend="reference")
    complexity(model, 32)
    assert model.training and not model._forward_hooks and not any(p.is_meta for p in model.parameters())


def test_names():
    assert list_models("gmlp*") == sorted(
        f"gmlp_s16_{end}" for end in ("sgu", "lrpe", "lrpe_m", "glrpe", "ggqpe")
    )
    for size in ("nano", "tiny", "small", "base"):
        ends = ("", "_glrpe", "_gqpe_isotropic", "_lrpe", "_lrpe_m", "_sgu")
        assert list_models(f"posmlp_{size}*") == [f"posmlp_{size}{end}" for end in ends]


@pytest.mark.parametrize("name", list_models("posmlp_nano*"))
def test_every_encoding_learns(name):
    torch.manual_seed(0)
    model = create_model(name)
    x, target = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", list_models("gmlp*"))
def test_gmlp_runs(name):
    model = create_model(name, depths=2, num_classes=5).eval()
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 5)
    assert model(torch.randn(1, 3, 50, 330)).isfinite().all()  # partial patches and partial windows


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1), (5, 200)])
def test_any_image_size(size):
    model = create_model("posmlp_nano").eval()
    assert model(torch.randn(2, 3, *size)).isfinite().all()


def test_empty_batch():
    assert create_model("posmlp_nano").eval()(torch.randn(0, 3, 32, 32)).shape == (0, 10)


def test_number_of_levels_is_free():
    for dims in ((12,), (8, 16, 16, 32, 64)):
        model = posmlp.PosMLP(dims, 1, 4, 2, 2, num_classes=3)
        assert len(model.levels) == len(model.feature_info) == len(dims)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_blocks_see_channels_last_maps_and_the_gate_has_the_activation():
    model, seen = create_model("posmlp_nano", shift=True).eval(), []
    for module in model.modules():
        if isinstance(module, PosSGU):
            assert module.activation == "gelu"
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    handle = model.levels[1].downsample.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    model(torch.randn(2, 3, 32, 32))
    handle.remove()
    assert len(seen) == 5 and all(seen)


def test_shift_alternates():
    model = create_model("posmlp_nano", depths=3, windows=((8, 4), 4), shift=(True, False))
    assert [b.gate.shift for b in model.levels[0].blocks] == [(0, 0), (4, 2), (0, 0)]
    assert all(b.gate.shift == (0, 0) for b in model.levels[1].blocks)


def test_bias_and_absolute_embedding():
    base = sum(p.numel() for p in create_model("posmlp_nano").parameters())
    without = create_model("posmlp_nano", bias=False)
    assert base - sum(p.numel() for p in without.parameters()) == 2 * 64 + 2 * 16
    embedded = create_model("posmlp_nano", absolute_embedding=True).eval()
    assert sum(p.numel() for p in embedded.parameters()) - base == 48 * 8 * 8
    x = torch.randn(1, 3, 40, 72)
    before = embedded(x)
    torch.nn.init.normal_(embedded.stem.position.weight)
    assert not torch.allclose(embedded(x), before)


def test_absolute_embedding_is_added_as_it_is_at_its_own_size():
    embedding = create_model("posmlp_nano", absolute_embedding=True).stem.position
    assert torch.equal(embedding(torch.zeros(1, 48, 8, 8)), embedding.weight)
    assert embedding(torch.zeros(2, 48, 5, 11)).shape == (2, 48, 5, 11)


def test_drop_path_grows_linearly_and_scales():
    model = create_model("posmlp_nano", drop_path_rate=0.3)
    rates = [block.drop_path.rate for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    drop_path = model.levels[1].blocks[1].drop_path
    dropped = drop_path(torch.ones(2000, 1, 1, 1))
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(drop_path.eval()(torch.ones(4, 1)), torch.ones(4, 1))


def test_evaluation_is_deterministic_and_training_drops():
    model, x = create_model("posmlp_nano", drop_rate=0.5, drop_path_rate=0.5), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_initial_values():
    torch.manual_seed(0)
    model = create_model("posmlp_nano")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
    assert model.levels[0].blocks[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.stem.conv2.weight.std().item() == pytest.approx(0.02, rel=0.1)
    gate = model.levels[0].blocks[0].gate
    assert torch.allclose(gate.factor, torch.eye(2).expand(8, 2, 2), atol=0.1)
    assert model.stem.norm1.eps == model.norm.eps == 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": ()}, "dims must be at least one"),
        ({"dims": (48, 72)}, "multiple of the one before"),
        ({"depths": (2, 2, 2)}, "depths must have an entry for each of the 2 levels"),
        ({"depths": (2, 0)}, "depths must be at least 1"),
        ({"groups": 7}, "groups must divide"),
        ({"windows": 0}, "window must be at least 1"),
        ({"encoding": "rope"}, "encoding must be one of"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"global_pool": "median"}, "global_pool must be one of"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must lie in"),
        ({"num_classes": -1}, "num_classes"),
        ({"patch_size": 0}, "patch_size"),
        ({"gate_backend": "abacus"}, "backend must be one of"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        create_model("posmlp_nano", **changes)


def test_unknown_names_get_a_hint():
    with pytest.raises(ValueError, match=r"unknown model 'posmlp_tinny'; did you mean posmlp_tiny"):
        create_model("posmlp_tinny")
    with pytest.raises(TypeError, match=r"no option 'window'; did you mean windows"):
        create_model("posmlp_nano", window=7)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32)])
def test_bad_input_is_named(shape):
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\]"):
        create_model("posmlp_nano")(torch.randn(shape))


def test_a_seed_gives_the_same_weights_however_they_lie_in_memory(monkeypatch):
    states = []
    monkeypatch.setattr("posmlp.linear._MULTIPLIES_FASTER", True)
    for pays in (True, False):
        monkeypatch.setattr("posmlp.linear._PAYS", pays)
        torch.manual_seed(0)
        states.append(create_model("posmlp_nano").state_dict())
    first, second = states
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    fc1 = "levels.0.blocks.0.fc1.weight"
    assert first[fc1].stride() != second[fc1].stride()
