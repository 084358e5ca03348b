"""Checkpoints: the original's numbers come out, and a file that does not fit says why."""

import argparse
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from original import image, load, needs_golden, state_dict

from posmlp import PosMLP, create_model, from_original, load_checkpoint, save_checkpoint
from posmlp_kernels import PosSGU, backends, gqpe_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def nano(**options):
    """The architecture of the golden nano, which is not `posmlp_nano`."""
    dims, groups = (16, 32, 64, 128), (2, 4, 8, 16)
    return PosMLP(dims, (1, 1, 2, 1), 4, groups, (4, 4, 4, 2), num_classes=10, **options)


def tiny(**options):
    return create_model("posmlp_tiny", **options)


@needs_golden
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("file", "make", "name", "size"),
    [("posmlp_nano_128", nano, "nano", 128), ("posmlp_t_224", tiny, "T", 224)],
    ids=["nano", "tiny"],
)
def test_logits_of_the_original(tmp_path, file, make, name, size, dtype, tolerance):
    original = state_dict(file)
    content = {
        "arch": "PosMLP",
        "epoch": 299,
        "args": argparse.Namespace(lr=1e-3),  # as its training script stores it
        "state_dict": {f"module.{key}": value + 1 for key, value in original.items()},
        "state_dict_ema": {f"module.{key}": value for key, value in original.items()},
    }
    torch.save(content, tmp_path / "model.pth.tar")
    model = make(dtype=dtype).eval()
    assert load_checkpoint(model, tmp_path / "model.pth.tar") == []
    expected = load(file)[0]["logits"]
    with torch.no_grad():
        logits = model(image(name, size).to(dtype)).double()
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@needs_golden
@pytest.mark.parametrize("backend", backends())
def test_logits_of_the_original_through_every_back_end(backend):
    device = "cpu" if backend in ("cpu", "reference") or INTERPRETED else "cuda"
    model = nano(gate_backend=backend).eval()
    model.load_state_dict(from_original(state_dict("posmlp_nano_128")))
    expected = load("posmlp_nano_128")[0]["logits"]
    with torch.no_grad():
        logits = model.to(device)(image("nano", 128).float().to(device)).double().cpu()
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@needs_golden
def test_wrappers_are_optional(tmp_path):
    original = state_dict("posmlp_nano_128")
    models = []
    for i, content in enumerate((original, {"state_dict": original}, {"model": original})):
        torch.save(content, tmp_path / f"{i}.pth.tar")
        models.append(nano().eval())
        load_checkpoint(models[-1], tmp_path / f"{i}.pth.tar")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(models[0](x), models[1](x)) and torch.equal(models[0](x), models[2](x))


def original_block(channels, gate):
    """A block of the original whose linear layers do nothing, around a gate's parameters."""
    prefix = "levels.0.encoder.0."
    return {
        f"{prefix}proj_c_e.weight": torch.eye(2 * channels).double(),
        f"{prefix}proj_c_e.bias": torch.zeros(2 * channels).double(),
        f"{prefix}proj_c_s.weight": torch.eye(channels).double(),
        **{f"{prefix}gate_unit.{name}": value for name, value in gate.items()},
    }


def run_block(state, window, x, **options):
    """Our gate, between the linear layers of a converted block: `x [B, h, w, 2C]`."""
    prefix = "levels.0.blocks.0."
    gate = PosSGU(x.shape[-1], window, dtype=torch.float64, **options)
    gate.load_state_dict(
        {n.removeprefix(f"{prefix}gate."): v for n, v in state.items() if n.startswith(f"{prefix}gate.")}
    )
    z = gate(F.linear(x, state[f"{prefix}fc1.weight"], state[f"{prefix}fc1.bias"]))
    return F.linear(z, state[f"{prefix}fc2.weight"])


@needs_golden
@pytest.mark.parametrize(
    "file",
    ["gqpe_w7", "gqpe_w14", "gqpe_far_center", "gqpe_isotropic", "lrpe_w7", "glrpe_w7", "lrpe_m_w5"],
)
def test_every_encoding_converts(file):
    arrays, meta = load(file)
    gate = {k.removeprefix("param."): v for k, v in arrays.items() if k.startswith("param.")}
    gate |= {"pos.rel_indices": torch.zeros(1), "pos.window_relative_position_index": torch.zeros(1)}
    state = from_original(original_block(meta["channels"], gate))
    encoding = meta["encoding"] + ("" if meta["generalized"] else "_isotropic") + "_m" * meta["dense"]
    window = (meta["window"],) * 2
    x = arrays["x"].double().flatten(0, 1).unflatten(1, window)
    z = run_block(state, window, x, groups=meta["groups"], encoding=encoding)
    expected = arrays["y"].double().flatten(0, 1).unflatten(1, window)
    assert (z - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_sgu_converts():
    torch.manual_seed(0)
    matrix, bias = torch.randn(9, 9).double(), torch.randn(9).double()
    weight, shift = torch.randn(6).double(), torch.randn(6).double()
    gate = {"proj_list.0.weight": matrix, "proj_list.0.bias": bias}
    gate |= {"norm_list.0.weight": weight, "norm_list.0.bias": shift}
    x = torch.randn(2, 3, 3, 12).double()
    z = run_block(from_original(original_block(6, gate)), 3, x, groups=1, encoding="sgu")
    x1, x2 = x.flatten(1, 2).chunk(2, -1)
    expected = (matrix @ F.layer_norm(x1, (6,), weight, shift) + bias[:, None]) * x2
    assert torch.allclose(z.flatten(1, 2), expected)


def test_unsymmetric_spread_converts():
    """The original scores `-1/2 d'A d + d'A c` in its pair of coordinates, for any A."""
    torch.manual_seed(0)
    spread = torch.eye(2).double() + 0.3 * torch.randn(3, 2, 2).double()
    center = torch.randn(3, 2).double()
    gate = {"pos.attention_centers": center, "pos.attention_spreads": spread}
    state = from_original(original_block(6, gate), symmetric=False)
    prefix = "levels.0.blocks.0.gate."
    table = gqpe_table(state[f"{prefix}center"], state[f"{prefix}factor"], 4)
    row, col = torch.meshgrid(torch.arange(-3.0, 4).double(), torch.arange(-3.0, 4).double(), indexing="ij")
    pair = torch.stack([col, -row], -1)
    score = -0.5 * torch.einsum("hwi,sij,hwj->shw", pair, spread, pair)
    score = score + torch.einsum("hwi,sij,sj->shw", pair, spread, center)
    assert torch.allclose(table.flatten(1).log_softmax(1), score.flatten(1).log_softmax(1))
    gate["pos.attention_spreads"] = -spread
    with pytest.raises(ValueError, match="must be positive definite"):
        from_original(original_block(6, gate), symmetric=False)


def test_absolute_embedding_converts():
    """The original views its [1, N, C] as a map, channels first."""
    state = original_block(
        6, {"pos.attention_centers": torch.zeros(2, 2), "pos.attention_spreads": torch.ones(2)}
    )
    state["absolute_pos_embed"] = torch.randn(1, 16, 6)
    converted = from_original(state)["stem.position.weight"]
    assert torch.equal(converted, state["absolute_pos_embed"].reshape(1, 6, 4, 4))


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("name", ["posmlp_nano", "posmlp_nano_lrpe_m", "posmlp_nano_sgu"])
def test_saving_and_loading(tmp_path, name, ending):
    if ending == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"weights{ending}"
    model = create_model(name, absolute_embedding=True)
    model(torch.randn(4, 3, 32, 32))  # running statistics that are not the initial ones
    save_checkpoint(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = create_model(name, path, absolute_embedding=True)
    for (key, value), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    path.write_text("old")

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(create_model("posmlp_nano"), path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .safetensors, .pt or .pth, got 'weights.onnx'"):
        save_checkpoint(create_model("posmlp_nano"), tmp_path / "weights.onnx")


def saved(tmp_path, content):
    torch.save(content, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def refuse(model, path, error, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_checkpoint(model, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Stranger:
    """Something that only unsafe loading would bring back."""


def test_files_that_hold_no_weights(tmp_path):
    model = create_model("posmlp_nano")
    refuse(model, tmp_path / "none.pt", FileNotFoundError, "no checkpoint at .*none.pt")
    refuse(model, tmp_path, FileNotFoundError, "no checkpoint at")
    for name, content in (("a.pt", b"no pickle"), ("b.pt", b""), ("c.pth.tar", b"PK\x03\x04 broken")):
        (tmp_path / name).write_bytes(content)
        refuse(model, tmp_path / name, ValueError, f"{name} is not a checkpoint that can be read")
    refuse(model, saved(tmp_path, [1, 2]), ValueError, "holds no state dict but a list")
    refuse(model, saved(tmp_path, {}), ValueError, "holds no state dict but a dict")
    refuse(model, saved(tmp_path, {"epoch": 3}), ValueError, "epoch are no tensors")
    refuse(model, saved(tmp_path, {"model": Stranger()}), ValueError, "not a checkpoint that can be read")
    whole = saved(tmp_path, create_model("posmlp_nano").state_dict()).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    refuse(model, tmp_path / "cut.pt", ValueError, "cut.pt is not a checkpoint that can be read")


def test_corrupt_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\xff" * 64)
    refuse(create_model("posmlp_nano"), path, ValueError, "not a checkpoint that can be read")


def test_another_architecture_says_what_differs(tmp_path):
    model = create_model("posmlp_nano")
    path = saved(tmp_path, create_model("posmlp_nano", num_classes=3).state_dict())
    refuse(model, path, ValueError, r"head.weight must be \[10, 96\], got \[3, 96\]; head.bias must be")
    state = model.state_dict()
    state["extra"] = state.pop("norm.weight")
    refuse(model, saved(tmp_path, state), ValueError, "norm.weight is missing; extra is unexpected")
    path = saved(tmp_path, create_model("posmlp_nano", dims=(24, 48)).state_dict())
    refuse(model, path, ValueError, r"stem.conv1.weight must be \[24, 3, 3, 3\], got \[12, .*and \d+ more")
    refuse(model, saved(tmp_path, {"weight": torch.ones(2)}), ValueError, "is missing")


@needs_golden
def test_an_original_of_another_size_says_what_differs(tmp_path):
    original = state_dict("posmlp_nano_128")
    refuse(create_model("posmlp_tiny"), saved(tmp_path, original), ValueError, "holds another model: .* more")
    del original["levels.0.encoder.0.proj_c_e.bias"]
    refuse(nano(), saved(tmp_path, original), ValueError, "original's names but not its layout")


def test_not_strict_loads_what_fits(tmp_path):
    other = create_model("posmlp_nano", num_classes=3)
    path = saved(tmp_path, other.state_dict())
    model = create_model("posmlp_nano")
    head = model.head.weight.clone()
    differences = load_checkpoint(model, path, strict=False)
    assert differences == [
        "head.weight must be [10, 96], got [3, 96]",
        "head.bias must be [10], got [3]",
    ]
    assert torch.equal(model.head.weight, head) and torch.equal(
        model.stem.conv1.weight, other.stem.conv1.weight
    )
    with pytest.raises(ValueError, match="holds another model"):
        load_checkpoint(model, saved(tmp_path, {"weight": torch.ones(2)}), strict=False)


def test_safetensors_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install posmlp-kernels\[models\]"):
        save_checkpoint(create_model("posmlp_nano"), tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install posmlp-kernels\[models\]"):
        load_checkpoint(create_model("posmlp_nano"), tmp_path / "weights.safetensors")
