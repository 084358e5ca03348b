"""examples/cpp: a model exported, and run by a C++ program without Python, gives what it gives here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from posmlp import create_model, save_checkpoint
from posmlp.card import ModelCard
from posmlp.data import read_image, write_image
from posmlp_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cpp"
COMPILER = os.environ.get("CXX") or shutil.which("g++")
OPTIONS = {"depths": 1, "in_chans": 1}  # posmlp_nano with half its blocks compiles sooner
CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CARD = ModelCard("posmlp_nano", options=OPTIONS, classes=CLASSES, in_chans=1, side=32)

needs_compiler = pytest.mark.skipif(
    COMPILER is None or not shutil.which("make"), reason="there is no C++ compiler, or no make"
)
needs_library = pytest.mark.skipif("cpu" not in backends(), reason="the cpu back end was not built")


@pytest.fixture(scope="module")
def export() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_example", EXAMPLE / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model in which every parameter matters: none at its zero or one."""
    torch.manual_seed(0)
    model = create_model("posmlp_nano", **OPTIONS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Where the README's first two commands have left the model and the program."""
    out = tmp_path_factory.mktemp("cpp")
    save_checkpoint(model, out / "weights.safetensors")
    CARD.save(out / "weights.safetensors")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "export.py", "--weights", str(out / "weights.safetensors"), "--out", str(out)]
    subprocess.run(command, cwd=EXAMPLE, env=environment, check=True)
    subprocess.run(
        ["make", f"PYTHON={sys.executable}", f"OUT={out}"], cwd=EXAMPLE, env=environment, check=True
    )
    return out


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The program, in an environment that leads to nothing."""
    return subprocess.run(
        ["./run", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def write(values: Tensor, file: Path) -> None:
    file.write_bytes(values.contiguous().numpy().tobytes())


@needs_compiler
@needs_library
@pytest.mark.parametrize("batch", [1, 3])
def test_the_program_gives_the_models_logits(folder, model, batch):
    images = torch.randn(batch, 1, 32, 32, generator=torch.Generator().manual_seed(batch))
    write(images, folder / "images.bin")
    done = run(folder, "model.pt2", "images.bin", "logits.bin")
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = model(images)
    found = torch.frombuffer(bytearray((folder / "logits.bin").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(
        found.view(batch, 10), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )

    best = expected.softmax(1).max(1)
    lines = [
        f"image {i}: {CLASSES[index]} {100 * share:.1f}%"
        for i, (share, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True))
    ]
    assert done.stdout.splitlines()[:-1] == lines
    assert done.stdout.splitlines()[-1].endswith(" ms, the median of 20 runs")


@needs_compiler
@needs_library
def test_the_program_calls_the_compiled_ops_and_links_no_python(folder):
    linked = subprocess.run(["ldd", "run"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert "_C.abi3.so" in linked and "libpython" not in linked and "libtorch_python" not in linked
    package = (folder / "model.pt2").read_bytes()  # stored without compression
    assert b"posmlp_kernels::pos_gate" in package and b"posmlp_kernels::gqpe_table" in package
    done = run(folder, "model.pt2", LD_BIND_NOW="1")  # every symbol must be there at the start
    assert done.returncode == 0 and done.stdout.startswith("image 0: "), done.stderr


@needs_compiler
@needs_library
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: run MODEL [IMAGES [LOGITS]]"),
        (["none.pt2"], "no file none.pt2"),
        (["weights.json"], "weights.json is not a model that can be loaded: "),
        (["model.pt2", "none.bin"], "no file none.bin"),
        (["model.pt2", "short.bin"], "short.bin must hold images of 4096 bytes each, got 4100 bytes"),
        (["model.pt2", "empty.bin"], "empty.bin must hold images of 4096 bytes each, got 0 bytes"),
        (["model.pt2", "nan.bin"], "nan.bin must hold finite float32 numbers"),
        (["model.pt2", "good.bin", "none/logits.bin"], "cannot write none/logits.bin"),
    ],
)
def test_the_program_says_in_one_line_what_is_wrong(folder, arguments, message):
    write(torch.zeros(1025), folder / "short.bin")
    write(torch.zeros(0), folder / "empty.bin")
    write(torch.full((1024,), torch.nan), folder / "nan.bin")
    write(torch.zeros(1024), folder / "good.bin")
    done = run(folder, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"run: error: {message}") and done.stderr.count("\n") == 1, done.stderr


@needs_compiler
@needs_library
def test_a_library_that_cannot_be_loaded_is_named(folder):
    (folder / "_C.abi3.so").write_text("")  # found before the built one
    try:
        done = run(folder, LD_LIBRARY_PATH=str(folder))
    finally:
        (folder / "_C.abi3.so").unlink()
    assert done.returncode and "_C.abi3.so" in done.stderr and done.stderr.count("\n") == 1


def test_images_are_written_as_the_model_wants_them(export, tmp_path):
    pytest.importorskip("PIL", reason="needs pillow, of the demo extra")
    paths = [tmp_path / "images" / name for name in ("a.png", "b.png")]
    paths[0].parent.mkdir()
    for path in paths:
        write_image(path, torch.rand(1, 40, 48))
    export.write_images([str(tmp_path / "images")], CARD, tmp_path / "images.bin")
    found = torch.frombuffer(bytearray((tmp_path / "images.bin").read_bytes()), dtype=torch.float32)
    expected = torch.stack([read_image(path, CARD) for path in paths])
    assert torch.equal(found.view(2, 1, 32, 32), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "posmlp_huge"], "unknown model 'posmlp_huge'"),
        (["--weights", "none.pth"], "no checkpoint at none.pth"),
        (["--images", "none.png"], "no image at none.png"),
    ],
)
def test_export_says_in_one_line_what_is_wrong(export, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
