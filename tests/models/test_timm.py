"""With timm: our models in its registry, our gate in its models."""

from functools import partial

import pytest
import torch
from torch import nn

import posmlp
from posmlp_kernels import PosSGU

timm = pytest.importorskip("timm")


def test_every_name_is_registered():
    assert set(posmlp.list_models()) <= set(timm.list_models())
    assert not timm.list_pretrained("posmlp*")


def test_create_with_options():
    model = timm.create_model("posmlp_tiny", num_classes=10, in_chans=1, drop_path_rate=0.1, device="meta")
    assert isinstance(model, posmlp.PosMLP)
    assert model.head.out_features == 10 and model.stem.conv1.in_channels == 1
    assert model.levels[-1].blocks[-1].drop_path.rate == pytest.approx(0.1)
    assert (
        model.default_cfg["first_conv"] == "stem.conv1" and model.default_cfg["architecture"] == "posmlp_tiny"
    )
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.9
    assert timm.create_model("posmlp_nano").num_classes == 10


@pytest.mark.parametrize("options", [{}, {"feature_cls": "list"}, {"feature_cls": "hook"}])
def test_features_only(options):
    x = torch.randn(1, 3, 64, 50)
    torch.manual_seed(0)
    features = timm.create_model("posmlp_nano", features_only=True, absolute_embedding=True, **options).eval()
    torch.manual_seed(0)
    model = posmlp.create_model("posmlp_nano", absolute_embedding=True).eval()
    assert features.feature_info.channels() == [48, 96] and features.feature_info.reduction() == [4, 8]
    expected = model.forward_intermediates(x, intermediates_only=True)
    # "list" and "hook" take the stem apart; then it folds no batch norms, which is another rounding.
    same = partial(torch.allclose, atol=1e-5) if options else torch.equal
    assert all(same(a, b) for a, b in zip(features(x), expected, strict=True))


def test_features_of_some_levels():
    x = torch.randn(1, 3, 64, 64)
    features = timm.create_model("posmlp_tiny", features_only=True, depths=1, out_indices=(1, -2)).eval()
    assert features.feature_info.channels() == [192, 384]
    assert [f.shape[1:] for f in features(x)] == [(192, 8, 8), (384, 4, 4)]


def test_errors():
    with pytest.raises(ValueError, match="posmlp_tiny has no pretrained weights"):
        timm.create_model("posmlp_tiny", pretrained=True)
    with pytest.raises(TypeError, match="no option 'drop_paths'; did you mean drop_path_rate"):
        timm.create_model("posmlp_nano", drop_paths=1)


def test_layer_decay_finds_every_layer():
    from timm.optim import create_optimizer_v2

    model = timm.create_model("posmlp_nano")
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.5).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    scales = [0.5**i for i in range(6)]  # the head, four blocks, the stem; a join goes with the first block
    assert sorted({g["lr_scale"] for g in groups}, reverse=True) == scales
    for name in model.no_weight_decay():
        parameter = model.get_parameter(name)
        assert any(any(parameter is p for p in g["params"]) and g["weight_decay"] == 0 for g in groups), name


def test_gate_layer_of_gated_mlp():
    mlp = timm.layers.GatedMlp(32, 64, gate_layer=partial(PosSGU, window=14, groups=4))
    assert mlp(torch.randn(2, 196, 32)).shape == (2, 196, 32)
    assert mlp(torch.randn(1, 20, 30, 32)).shape == (1, 20, 30, 32)


def test_swapped_into_gmlp():
    torch.manual_seed(0)
    model = timm.create_model("gmlp_ti16_224", num_classes=4)
    model.blocks = model.blocks[:3]
    for block in model.blocks:
        block.mlp_channels.act = nn.Identity()
        hidden = block.mlp_channels.fc1.out_features
        block.mlp_channels.gate = PosSGU(hidden, 14, groups=8, activation="gelu")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, target, losses = torch.randn(4, 3, 224, 224), torch.arange(4), []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_sgu_is_timms_with_its_halves_swapped():
    from timm.models.mlp_mixer import SpatialGatingUnit

    torch.manual_seed(0)
    theirs = SpatialGatingUnit(24, 9, dtype=torch.float64)
    ours = PosSGU(24, 3, groups=1, encoding="sgu", dtype=torch.float64)
    nn.init.normal_(theirs.norm.weight)
    with torch.no_grad():
        ours.matrix.copy_(theirs.proj.weight)
        ours.bias.copy_(theirs.proj.bias)
        ours.norm.weight.copy_(theirs.norm.weight)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    assert torch.allclose(ours(x.roll(12, -1)), theirs(x), atol=1e-12)
