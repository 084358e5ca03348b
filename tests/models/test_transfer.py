"""Weights at other windows, image sizes and classes: what carries over, what is resized, what is refused."""

from __future__ import annotations

import pytest
import torch
from original import needs_golden, state_dict

from posmlp import PosMLP, create_model, load_checkpoint, save_checkpoint
from posmlp.card import ModelCard
from posmlp.transfer import resize_bias, resize_matrix, resize_table, transfer_weights

NAMES = ("posmlp_nano", "posmlp_nano_gqpe_isotropic", "posmlp_nano_lrpe", "posmlp_nano_glrpe")
FREE = ("posmlp_nano_lrpe_m", "posmlp_nano_sgu")


def random_model(name: str, seed: int = 0, **options) -> PosMLP:
    """A model whose biases and matrices are not the constants they start at."""
    torch.manual_seed(seed)
    model = create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def saved(tmp_path, model: PosMLP, name: str = "weights.pt"):
    save_checkpoint(model, tmp_path / name)
    return tmp_path / name


def refused(model: PosMLP, path, match: str, **options) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        transfer_weights(model, path, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES + FREE)
def test_nothing_changes_where_nothing_differs(name, tmp_path):
    source, target = random_model(name, absolute_embedding=True), create_model(name, absolute_embedding=True)
    assert transfer_weights(target, saved(tmp_path, source)) == []
    pairs = zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_knows_the_window_changes(name, tmp_path):
    source, target = random_model(name), create_model(name, windows=(12, 5))
    lines = transfer_weights(target, saved(tmp_path, source))
    assert "levels.0.blocks.1.gate.bias [64] -> [144], bicubic, windows of 8x8 -> 12x12" in lines
    changed = {line.split()[0] for line in lines}
    ends = (".gate.bias", ".gate.table") if "lrpe" in name else (".gate.bias",)
    own = target.state_dict()
    assert changed == {entry for entry in own if entry.endswith(ends)}
    assert all(torch.equal(value, own[n]) for n, value in source.state_dict().items() if n not in changed)
    assert target(torch.randn(1, 3, 48, 48)).isfinite().all()


WINDOWS = [((8, 8), (12, 12)), ((7, 7), (5, 5)), ((5, 5), (12, 7)), ((4, 9), (6, 6)), ((3, 4), (1, 1))]


@pytest.mark.parametrize(("old", "new"), [*WINDOWS, ((1, 1), (4, 3)), ((4, 3), (1, 7))])
def test_constant_maps_stay_constant(old, new):
    """A bias keeps its value; a table and a matrix keep the sum over a window's keys."""
    tokens, resized = old[0] * old[1], new[0] * new[1]
    assert torch.equal(resize_bias(torch.full((tokens,), 0.3), old, new), torch.full((resized,), 0.3))
    share = tokens / resized
    table = resize_table(torch.full((2, *(2 * side - 1 for side in old)), 0.3), new)
    torch.testing.assert_close(table, torch.full((2, *(2 * side - 1 for side in new)), 0.3 * share))
    matrix = resize_matrix(torch.full((tokens, tokens), 0.3), old, new)
    torch.testing.assert_close(matrix, torch.full((resized, resized), 0.3 * share))
    torch.testing.assert_close(matrix.sum(1), torch.full((resized,), 0.3 * tokens))


@pytest.mark.parametrize(("old", "new"), WINDOWS)
def test_no_displacement_stays_none_and_ends_stay_ends(old, new):
    table = torch.randn(2, *(2 * side - 1 for side in old), dtype=torch.float64)
    resized = resize_table(table, new) * (new[0] * new[1]) / (old[0] * old[1])
    here, there = (..., old[0] - 1, old[1] - 1), (..., new[0] - 1, new[1] - 1)
    torch.testing.assert_close(resized[there], table[here])
    if min(new) > 1:
        corners = (slice(None), slice(None, None, 2 * old[0] - 2), slice(None, None, 2 * old[1] - 2))
        new_corners = (slice(None), slice(None, None, 2 * new[0] - 2), slice(None, None, 2 * new[1] - 2))
        torch.testing.assert_close(resized[new_corners], table[corners])


@pytest.mark.parametrize(("old", "new"), WINDOWS)
def test_symmetric_parameters_stay_symmetric(old, new):
    table = torch.randn(3, *(2 * side - 1 for side in old), dtype=torch.float64)
    resized = resize_table(table + table.flip(1, 2), new)
    torch.testing.assert_close(resized, resized.flip(1, 2))
    tokens = old[0] * old[1]
    bias = torch.randn(tokens, dtype=torch.float64)
    resized = resize_bias(bias + bias.flip(0), old, new)
    torch.testing.assert_close(resized, resized.flip(0))
    matrix = torch.randn(tokens, tokens, dtype=torch.float64)
    resized = resize_matrix(matrix + matrix.T, old, new)
    torch.testing.assert_close(resized, resized.T)


def test_a_bias_follows_its_window_s_shape():
    """Rows stay rows: what varies along one side only still does, and in the same order."""
    rows = torch.arange(4.0, dtype=torch.float64).view(4, 1).expand(4, 9).flatten()
    resized = resize_bias(rows, (4, 9), (8, 6)).view(8, 6)
    torch.testing.assert_close(resized, resized[:, :1].expand(8, 6))
    assert (resized[1:, 0] > resized[:-1, 0]).all()


@pytest.mark.parametrize("name", ["posmlp_nano", "posmlp_nano_gqpe_isotropic"])
def test_quadratic_encodings_see_the_same_at_other_windows(name, tmp_path):
    """A query in the middle of a window of 16, and of 24, has the same neighbours on a periodic map."""
    source = create_model(name, windows=(16, 4), dtype=torch.float64).eval()
    target = create_model(name, windows=(24, 4), dtype=torch.float64).eval()
    transfer_weights(target, saved(tmp_path, source))
    period = torch.randn(1, 48, 4, 4, dtype=torch.float64)
    x = period.tile(1, 1, 12, 12)  # 48 x 48: queries at 8 of windows of 16, at 12 of windows of 24
    blocks = [model.levels[0].blocks[0](x.permute(0, 2, 3, 1)) for model in (source, target)]
    torch.testing.assert_close(blocks[0][:, 8, 8], blocks[1][:, 12, 12])
    assert not torch.allclose(blocks[0][:, 0, 0], blocks[1][:, 12, 12])  # at an edge half of them are missing


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_map_gives_the_same_outputs_at_other_windows(name, tmp_path):
    """A softmax's rows sum up to 1 at any window, and those of a constant table to what they did."""
    source = create_model(name, dtype=torch.float64).eval()
    target = create_model(name, windows=(12, 6), dtype=torch.float64).eval()
    for block in source.levels[0].blocks if "lrpe" in name else ():
        torch.nn.init.constant_(block.gate.table, 0.05)
    transfer_weights(target, saved(tmp_path, source))
    x = torch.randn(1, 48, 1, 1, dtype=torch.float64).expand(1, 48, 24, 24)
    torch.testing.assert_close(source.levels[0](x), target.levels[0](x))


@pytest.mark.parametrize("name", FREE)
def test_free_matrices_are_refused_by_name(name, tmp_path):
    path = saved(tmp_path, random_model(name))
    refused(create_model(name, windows=(12, 6)), path, r"levels\.0\.blocks\.0\.gate\.matrix is a free matrix")
    refused(create_model(name, windows=(8, 6)), path, "4x4 and not of 6x6.*interpolate_free=True")
    target = create_model(name, windows=(12, 6))
    lines = transfer_weights(target, path, interpolate_free=True)
    assert any("gate.matrix [64, 64] -> [144, 144]" in line for line in lines)


def test_the_embedding_of_another_image_size(tmp_path):
    source = random_model("posmlp_nano", absolute_embedding=True)
    target = create_model("posmlp_nano", absolute_embedding=True, img_size=(48, 64))
    assert transfer_weights(target, saved(tmp_path, source)) == [
        "stem.position.weight [1, 48, 8, 8] -> [1, 48, 12, 16], bicubic"
    ]
    x = torch.randn(1, 3, 48, 64)  # the model itself resamples a stored embedding for another map
    torch.testing.assert_close(source.stem(x), target.eval().stem(x))


@pytest.mark.parametrize("classes", [0, 3])
def test_another_classifier_is_kept_and_reported(classes, tmp_path):
    source, target = random_model("posmlp_nano"), create_model("posmlp_nano", num_classes=classes)
    head = {name: value.clone() for name, value in target.head.state_dict().items()}
    lines = transfer_weights(target, saved(tmp_path, source))
    assert len(lines) == 2 and lines[0].startswith("head.weight [10, 96] -> ")
    assert all(torch.equal(head[name], value) for name, value in target.head.state_dict().items())
    assert torch.equal(target.norm.weight, source.norm.weight)
    back = transfer_weights(create_model("posmlp_nano"), saved(tmp_path, target, "back.pt"))
    assert len(back) == 2 and back[1].endswith("-> [10], the model's own is kept")


def test_windows_that_are_no_squares(tmp_path):
    """36 tokens are 6x6 or 4x9: a table says, or the card does, or the model's own are taken."""
    wide, square = {"windows": ((4, 9), 4)}, {"windows": (6, 4)}
    source = random_model("posmlp_nano", **wide)
    path = saved(tmp_path, source)
    target = create_model("posmlp_nano", **wide)
    assert transfer_weights(target, path) == []
    ModelCard("posmlp_nano", options=wide).save(path)
    target = create_model("posmlp_nano", **square)
    assert len(transfer_weights(target, path)) == 2
    bias = "levels.0.blocks.0.gate.bias"
    expected = resize_bias(source.state_dict()[bias], (4, 9), (6, 6))
    assert torch.equal(target.state_dict()[bias], expected)
    path = saved(tmp_path, random_model("posmlp_nano_glrpe", **wide), "table.pt")
    assert len(transfer_weights(create_model("posmlp_nano_glrpe", **square), path)) == 4


def test_what_cannot_be_carried_over_says_why(tmp_path):
    path = saved(tmp_path, random_model("posmlp_nano"))
    other = create_model("posmlp_nano", windows=(12, 6), dims=(24, 48))
    refused(other, path, r"holds another model: stem.conv1.weight must be \[12, .* more")
    refused(create_model("posmlp_nano_glrpe"), path, "gate.table is missing")
    refused(create_model("posmlp_nano", groups=4, windows=6), path, "gate.center must be")
    ModelCard("posmlp_nano", options={"windows": 7}).save(path)
    refused(create_model("posmlp_nano", windows=6), path, "has 64 tokens, but the model card.* says 7x7")
    ModelCard("posmlp_nano", options={"wings": 7}).save(path)
    refused(create_model("posmlp_nano"), path, "is not a model card")
    wide = saved(tmp_path, random_model("posmlp_nano", windows=((3, 5), 4)), "wide.pt")
    refused(create_model("posmlp_nano"), wide, "has 15 tokens, but")
    odd = random_model("posmlp_nano").state_dict()
    odd["levels.0.blocks.0.gate.bias"] = torch.zeros(64, 1)
    torch.save(odd, tmp_path / "odd.pt")
    refused(create_model("posmlp_nano", windows=6), tmp_path / "odd.pt", "gate.bias must be")
    with pytest.raises(FileNotFoundError):
        transfer_weights(other, tmp_path / "none.pt")


@needs_golden
def test_weights_of_the_original(tmp_path):
    """Its layout, inside a training checkpoint, goes the same way as ours."""
    dims, groups = (16, 32, 64, 128), (2, 4, 8, 16)
    source, target = (PosMLP(dims, (1, 1, 2, 1), w, groups, (4, 4, 4, 2), num_classes=10) for w in (4, 6))
    torch.save({"state_dict_ema": state_dict("posmlp_nano_128")}, tmp_path / "model.pth.tar")
    load_checkpoint(source, tmp_path / "model.pth.tar")
    lines = transfer_weights(target, tmp_path / "model.pth.tar")
    assert len(lines) == 5 and all("[16] -> [36]" in line for line in lines)
    assert torch.equal(source.levels[2].blocks[1].gate.factor, target.levels[2].blocks[1].gate.factor)
