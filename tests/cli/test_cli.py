"""The command line: help, mistakes in one line, and the three commands on real files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posmlp import create_model, save_checkpoint
from posmlp.card import ModelCard
from posmlp.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of (random) weights with its card, as the demo writes them."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    torch.manual_seed(0)
    save_checkpoint(create_model("posmlp_nano", in_chans=1), path)
    classes = [str(digit) for digit in range(10)]
    ModelCard("posmlp_nano", options={"in_chans": 1}, classes=classes, in_chans=1, side=32).save(path)
    return path


@pytest.fixture
def image(tmp_path) -> Path:
    pytest.importorskip("PIL", reason="needs pillow, of the demo extra")
    from posmlp.data import write_image

    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    write_image(path, torch.rand(1, 32, 32))
    return path


def one_line_error(capsys, arguments: list[str]) -> str:
    """The error of a command that must fail with status 2 and one line on stderr."""
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("posmlp: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", [[], ["demo"], ["predict"], ["info"], ["visualize"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "usage: posmlp" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    help_ = "try: posmlp.cli.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    code = f"import sys, posmlp.cli\n{help_}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "posmlp", "nonsense"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["demo", "--epochs", "0"], "--epochs"),
        (["demo", "--epochs", "many"], "many"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--unknown"], "--unknown"),
        (["predict", "a.png"], "--weights"),
        (["predict", "a.png", "--weights", "no_such_file.safetensors"], "no_such_file"),
        (["info", "posmlp_tinny"], "posmlp_tiny"),
        (["info", "posmlp_tiny", "--windows", "14", "14"], "windows"),
        (["info", "posmlp_tiny", "--size", "-3"], "--size"),
        (["info", "posmlp_tiny", "--size", "2147483647"], "--size"),
        (["demo", "--threads", "100000"], "--threads"),
        (["info", "posmlp_tiny", "--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_take_one_line(arguments, named, capsys):
    assert named in one_line_error(capsys, arguments)


def test_mistakes_in_files(weights, image, tmp_path, capsys):
    given = ["--weights", str(weights)]
    assert "nowhere.png" in one_line_error(capsys, ["predict", str(tmp_path / "nowhere.png"), *given])
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in one_line_error(capsys, ["predict", str(empty), *given])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    assert "broken" in one_line_error(
        capsys, ["predict", str(image), "--weights", str(broken), "--model", "posmlp_nano"]
    )
    other = one_line_error(capsys, ["predict", str(image), *given, "--model", "posmlp_tiny"])
    assert "holds another model" in other


def test_mistakes_in_cards(weights, image, tmp_path, capsys):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    given = ["predict", str(image), "--weights", str(copy)]
    assert "--model" in one_line_error(capsys, given)  # nothing says which model it is
    good = json.loads(weights.with_suffix(".json").read_text())
    changes = (
        {"model": "posmlp_unknown"}, {"model": 3}, {"classes": 5}, {"options": {"wings": 2}}, {"side": "a"},
        {"side": 0}, {"in_chans": 2}, {"mean": [0, 0]}, {"interpolation": "guess"}, {"more": 1},
    )  # fmt: skip
    for text in ("[]", "no json", *(json.dumps(good | change) for change in changes)):
        copy.with_suffix(".json").write_text(text)
        one_line_error(capsys, given)


def test_predict_files_and_folders(weights, image, capsys):
    assert main(["predict", str(image), str(image.parent), "--weights", str(weights), "--topk", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith(str(image)) for line in lines)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", lines[0])]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.2


def test_predict_with_a_checkpoint_of_the_original(image, tmp_path, capsys):
    """Weights in the original's layout have no card: `--model` says what they are, classes are numbers."""
    path = tmp_path / "original.pth.tar"
    state = _in_the_originals_names(create_model("posmlp_nano").state_dict())
    torch.save({"state_dict": {}, "state_dict_ema": state}, path)
    command = ["predict", str(image), "--weights", str(path)]
    assert main([*command, "--model", "posmlp_nano"]) == 0
    assert re.fullmatch(r".*a\.png  \d +[\d.]+%\n", capsys.readouterr().out)
    assert "--model" in one_line_error(capsys, command)


def _in_the_originals_names(state: dict) -> dict:
    names = (
        (r"^stem\.conv(\d)", lambda m: f"patch_embed.projs.{int(m[1]) - 1}"),
        (r"^stem\.norm(\d)", lambda m: f"patch_embed.norms.{int(m[1]) - 1}"),
        (r"\.downsample\.", ".pool."),
        (r"\.blocks\.", ".encoder."),
        (r"\.fc1\.", ".proj_c_e."),
        (r"\.fc2\.", ".proj_c_s."),
        (r"\.gate\.center$", ".gate_unit.pos.attention_centers"),
        (r"\.gate\.factor$", ".gate_unit.pos.attention_spreads"),
        (r"\.gate\.bias$", ".gate_unit.pos.token_proj_n_bias"),
    )
    renamed = {}
    for name, value in state.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        renamed[name] = value.view(1, -1, 1) if name.endswith("token_proj_n_bias") else value
    return renamed


def test_an_unreadable_image_does_not_stop_the_others(weights, image, capsys):
    broken = image.parent / "broken.png"
    broken.write_bytes(b"no image")
    assert main(["predict", str(image.parent), "--weights", str(weights)]) == 2
    printed = capsys.readouterr()
    assert str(image) in printed.out and "broken.png" not in printed.out
    assert "broken.png" in printed.err and printed.err.count("\n") == 1


def test_info_lists_and_describes(capsys):
    assert main(["info"]) == 0
    listed = capsys.readouterr().out
    assert "posmlp_tiny" in listed and "gmlp_s16_sgu" in listed
    assert main(["info", "posmlp_tiny", "--size", "384", "--windows", "12", "12", "24", "12"]) == 0
    described = capsys.readouterr().out
    assert "20.93 M" in described and "reference" in described
    assert re.search(r"<- runs", described)


def test_images_reach_the_model_as_in_torchvision(tmp_path):
    """Resize, centre crop and normalisation are those that ImageNet models are evaluated with."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = pytest.importorskip("PIL.Image")
    from posmlp.data import read_image

    card = ModelCard.default("posmlp_tiny")
    path = tmp_path / "wide.png"
    pixels = (torch.rand(150, 301, 3) * 255).byte()
    image.frombytes("RGB", (301, 150), bytes(pixels.flatten().tolist())).save(path)
    expected = transforms.Compose(
        [
            transforms.Resize(int(224 / 0.9), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(card.mean, card.std),
        ]
    )(image.open(path))
    torch.testing.assert_close(read_image(path, card), expected)


def test_the_digits_are_split_once_and_evenly():
    pytest.importorskip("sklearn", reason="needs the demo extra")
    from posmlp.data import load_digits

    train, test = load_digits()
    assert len(train) + len(test) == 1797 and train.pixels.shape[1:] == (1, 32, 32)
    assert all(34 <= count <= 37 for count in test.labels.bincount().tolist())
    assert train.pixels.min() >= 0 and train.pixels.max() <= 1
    seen = {bytes((pixels * 16).byte().flatten().tolist()) for pixels in train.pixels}
    assert sum(bytes((p * 16).byte().flatten().tolist()) in seen for p in test.pixels) == 0
    torch.testing.assert_close(load_digits()[1].pixels, test.pixels, rtol=0, atol=0)


def test_demo_writes_what_predict_reads(tmp_path, capsys):
    for package in ("sklearn", "matplotlib", "PIL", "rich"):
        pytest.importorskip(package, reason="needs the demo extra")
    out = tmp_path / "demo"
    assert main(["demo", "--epochs", "1", "--out", str(out)]) == 0
    assert "test accuracy" in capsys.readouterr().out
    figures = {"patterns.png", "bias.png", "training.png", "predictions.png", "summary.png"}
    assert figures | {"weights.safetensors", "weights.json"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "weights.json").read_text())["model"] == "posmlp_nano"
    assert main(["predict", str(out / "digits"), "--weights", str(out / "weights.safetensors")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_demo_learns_the_digits(tmp_path):
    """The whole demo, as `make demo` runs it: the main promise of the README."""
    pytest.importorskip("sklearn", reason="needs the demo extra")
    from posmlp.demo import run

    assert run(out=str(tmp_path)) >= 0.985


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("matplotlib", ["demo"]),
        ("sklearn", ["demo"]),
        ("PIL", ["predict", "a.png"]),
        ("matplotlib", ["visualize", "--weights", "w.pth"]),
    ],
)
def test_missing_packages_are_named_with_their_extra(package, command, weights, image, tmp_path):
    if command[0] == "predict":
        command = ["predict", str(image), "--weights", str(weights)]
    blocked = f"import sys; sys.modules[{package!r}] = None; from posmlp.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", blocked, *command], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "posmlp-kernels[demo]" in done.stderr and done.stderr.count("\n") == 1
