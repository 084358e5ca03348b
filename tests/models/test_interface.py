"""The interface that timm's users expect, without timm, and what PyTorch does to whole models."""

import copy
import pickle

import pytest
import torch

from posmlp import create_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("posmlp_nano", dims=(16, 32, 64), depths=2, windows=4, groups=4, ratios=2).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 44, 36, generator=torch.Generator().manual_seed(1))


def test_forward_is_head_of_features(model, x):
    features = model.forward_features(x)
    assert features.shape == (2, 64, 3, 3)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features.mean((2, 3))) and pooled.shape[1] == model.head_hidden_size
    assert torch.equal(model.get_classifier()(pooled), model(x))


@pytest.mark.parametrize(
    ("indices", "levels"), [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), ([0, 2], [0, 2]), ([-2, 0], [1, 0])]
)
def test_intermediates(model, x, indices, levels):
    features, maps = model.forward_intermediates(x, indices)
    assert torch.equal(features, model.forward_features(x))
    for level, found in zip(levels, maps, strict=True):
        info = model.feature_info[level]
        size = [-(-side // info["reduction"]) for side in x.shape[2:]]
        assert list(found.shape) == [2, info["num_chs"], *size]
    alone = model.forward_intermediates(
        x, indices, intermediates_only=True, output_fmt="NHWC", stop_early=True
    )
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(alone, maps, strict=True))


def test_intermediates_of_the_last_level_are_normalised_on_request(model, x):
    features, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(maps[-1], features)
    assert torch.equal(maps[0], model.forward_intermediates(x)[1][0])


def test_intermediates_stop_early(model, x):
    runs = []
    model.levels[2].register_forward_hook(lambda *args: runs.append(1))
    features, maps = model.forward_intermediates(x, [0, 1], stop_early=True)
    assert not runs and torch.equal(features, maps[1])


@pytest.mark.parametrize("indices", [0, 4, [], [3], [-4]])
def test_bad_indices_are_named(model, x, indices):
    with pytest.raises(ValueError, match="indices must"):
        model.forward_intermediates(x, indices)


def test_bad_output_format_is_named(model, x):
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_prune(model, x):
    before = model.forward_intermediates(x, [1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([-2]) == [1]
    assert len(model.levels) == 2 and not list(model.head.parameters())
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], before)
    assert torch.equal(model(x), before)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


def test_reset_classifier(model, x):
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0, "max")
    assert torch.equal(model(x), model.forward_features(x).amax((2, 3)))
    model.double().reset_classifier(5, "")
    assert model(x.double()).shape == (2, 5, 3, 3)


def test_no_weight_decay_names_every_position(model):
    names = set(dict(model.named_parameters()))
    found = create_model("posmlp_nano", absolute_embedding=True).no_weight_decay()
    assert "stem.position.weight" in found
    assert model.no_weight_decay() <= names
    assert model.no_weight_decay() == {n for n in names if ".gate." in n}
    learned = create_model("posmlp_nano_lrpe_m").no_weight_decay()
    assert "levels.0.blocks.0.gate.table" in learned and "levels.0.blocks.0.gate.matrix" not in learned


def test_checkpointing_gives_the_same_gradients(model, x):
    model.train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_copies_and_pickles(model, x):
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


def test_channels_last_changes_nothing(model, x):
    y = model(x)
    assert torch.equal(model(x.to(memory_format=torch.channels_last)), y)
    assert torch.equal(model.to(memory_format=torch.channels_last)(x), y)
    assert torch.allclose(model.to(memory_format=torch.contiguous_format)(x), y, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, x):
    torch.manual_seed(0)
    model = create_model("posmlp_nano", absolute_embedding=True, dtype=torch.float64).eval()
    y = model(x.double())
    found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - y).abs().max() <= 8 * torch.finfo(dtype).eps * y.abs().max()
    assert create_model("posmlp_nano", dtype=dtype).norm.weight.dtype == dtype


def test_autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), model(x), atol=2e-2)


@pytest.mark.parametrize("name", ["posmlp_nano", "posmlp_nano_lrpe_m"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    model = create_model(name, depths=1, drop_path_rate=0.1, shift=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    compiled(x).sum().backward()
    model.eval()
    with torch.no_grad():
        for shape in ((2, 3, 32, 32), (3, 3, 40, 52), (5, 3, 48, 36)):
            x = torch.randn(shape)
            assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_exports_with_a_free_batch(x):
    model = create_model("posmlp_nano", depths=1).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
    more = torch.cat([x, -x, x])
    assert torch.allclose(exported(more), model(more), atol=1e-6)
