"""One run: what it writes, that it learns, and that it goes on exactly where it was stopped."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from posmlp import files
from posmlp.cli import main
from posmlp.predict import load_model
from posmlp.train import trainer as loop
from posmlp.train.folder import RunFolder
from posmlp.train.recipe import Settings
from posmlp.train.run import train
from posmlp.train.trainer import StoppedError

ROOT = Path(__file__).resolve().parents[2]
load_file = pytest.importorskip("safetensors.torch", reason="needs the train extra").load_file
WEIGHTS = ("last", "ema", "best", "initial")


def outcome(out: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a run, and its log but for what depends on the clock."""
    tensors = {f"{n}.{k}": v for n in WEIGHTS for k, v in load_file(Path(out) / f"{n}.safetensors").items()}
    for row in log(out):
        for name, value in row.items():
            if name not in ("seconds", "images_per_second"):
                tensors[f"{row['epoch']}.{name}"] = torch.tensor(float(value), dtype=torch.float64)
    return tensors


def log(out: str | Path) -> list[dict[str, str]]:
    with (Path(out) / "log.csv").open() as file:
        return list(csv.DictReader(file))


def scalars(out: str | Path, tag: str) -> list[float]:
    """What TensorBoard shows of a run."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(out))
    accumulator.Reload()
    return [pytest.approx(event.value) for event in accumulator.Scalars(tag)]


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture
def straight(settings, tmp_path) -> dict[str, torch.Tensor]:
    """What comes of the settings without interruption."""
    out = str(tmp_path / "straight")
    train(dataclasses.replace(settings, out=out), shown=False)
    return outcome(out)


def test_a_run_writes_what_it_promises(settings, straight):
    rows = train(settings, shown=False)
    folder = RunFolder(settings.out)
    assert Settings.from_json(folder.config.read_text()).recipe == settings.recipe
    assert [int(row["epoch"]) for row in log(settings.out)] == [1, 2, 3, 4]
    assert float(log(settings.out)[-1]["val_top1"]) == rows[-1]["val_top1"]
    assert scalars(settings.out, "val/top1") == [row["val_top1"] for row in rows]
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")], "a partial file is left"
    for name in WEIGHTS:
        model, card = load_model(folder.weights(name))
        assert card.classes == ["dark", "light"] and card.side == 16 and model.num_classes == 2
    assert_same_bits(outcome(settings.out), straight)


def test_a_new_run_leaves_other_files_alone(settings):
    """In a folder without a run: only what a run writes is replaced."""
    folder = RunFolder(settings.out)
    for name in ("precious.safetensors", "notes.txt", "last.safetensors"):
        (folder.path / name).write_text("mine")
    one = settings.recipe.changed(epochs=1)
    train(dataclasses.replace(settings, recipe=one), shown=False)
    assert (folder.path / "precious.safetensors").read_text() == "mine"
    assert (folder.path / "notes.txt").read_text() == "mine"
    load_model(folder.weights("last"))


def test_it_learns(settings):
    plain = settings.recipe.changed(epochs=8, mixup=0.0, cutmix=0.0, drop=0.0, auto_augment="", ema=0.0)
    rows = train(dataclasses.replace(settings, recipe=plain), shown=False)
    assert rows[-1]["val_top1"] == 100 and rows[-1]["train_loss"] < 0.5 < rows[0]["train_loss"]
    assert "ema_top1" not in rows[0] and not RunFolder(settings.out).weights("ema").exists()


def test_a_corrupt_image_is_named_skipped_and_counted(settings, tmp_path, capsys):
    data = tmp_path / "images"
    shutil.copytree(settings.data, data)
    for part in ("train", "val"):
        whole = (data / part / "dark" / "03.png").read_bytes()
        (data / part / "dark" / "03.png").write_bytes(whole[: len(whole) // 2])
    rows = train(dataclasses.replace(settings, data=str(data)))
    shown = capsys.readouterr().out
    for part in ("train", "val"):
        assert shown.replace("\n", "").count(str(data / part / "dark" / "03.png")) == 1, (
            "named, and only once"
        )
    assert [row["broken"] for row in rows] == [2, 2, 2, 2], "one in training, one in validation"
    assert rows[-1]["val_top1"] * 13 / 100 == pytest.approx(round(rows[-1]["val_top1"] * 13 / 100))


def test_shards_train_as_the_same_images_in_folders(settings, straight, tmp_path):
    """WebDataset shards in the order of the folders: the same bits."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for part in ("train", "val"):
        with tarfile.open(shards / f"{part}-000.tar", "w") as tar:
            for label, name in enumerate(("dark", "light")):
                for path in sorted((Path(settings.data) / part / name).iterdir()):
                    key = f"{name}{path.stem}"
                    tar.add(path, f"{key}.png")
                    info = tarfile.TarInfo(f"{key}.cls")
                    info.size = 1
                    tar.addfile(info, io.BytesIO(str(label).encode()))
    train(dataclasses.replace(settings, data=str(shards)), shown=False)
    assert_same_bits(outcome(settings.out), straight)


@pytest.mark.parametrize("at", range(0, 24, 3))
def test_a_crash_while_writing_is_resumed_to_the_same_bits(settings, straight, monkeypatch, at):
    """The process is lost right before or right after a file takes its place, at many moments of the run."""
    calls, replace = [], os.replace

    def crash(*paths: object) -> None:
        calls.append(paths)
        if len(calls) > at:
            if at % 2:
                replace(*paths)
            raise SystemExit
        replace(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", crash)
        with pytest.raises(SystemExit):
            train(settings, shown=False)
    train(settings, resume=True, shown=False)
    assert_same_bits(outcome(settings.out), straight)


def interrupted(settings: Settings, monkeypatch, update: int, act: Callable[[], None], error: type) -> None:
    """Train until `act`, called before an update of the run counted from 0, ends it."""
    updates, original = iter(range(100)), loop.Trainer._update

    def patched_update(self, batches):
        if next(updates) == update:
            act()
        return original(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "_update", patched_update)
        with pytest.raises(error):
            train(settings, shown=False)


def test_a_state_within_an_epoch_is_resumed_to_the_same_bits(settings, straight, monkeypatch):
    """States are also saved after some minutes, here after every update."""
    monkeypatch.setattr(loop, "SECONDS_UNSAVED", 0.0)
    interrupted(settings, monkeypatch, 8, sys.exit, SystemExit)
    assert RunFolder(settings.out).read_state()["place"]["update"] == 3
    train(settings, resume=True, shown=False)
    assert_same_bits(outcome(settings.out), straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_first(settings, straight, monkeypatch, number):
    interrupted(settings, monkeypatch, 7, lambda: os.kill(os.getpid(), number), StoppedError)
    assert RunFolder(settings.out).read_state()["place"]["update"] == 3
    train(settings, resume=True, shown=False)
    assert_same_bits(outcome(settings.out), straight)


def command(settings: Settings, *more: str) -> list[str]:
    recipe = (
        "--epochs",
        "6",
        "--batch-size",
        "8",
        "--precision",
        "float32",
        "--ema",
        "0.9",
        "--lr-batch",
        "8",
    )
    return [
        "train", settings.data, "--model", "posmlp_nano", "--img-size", "16", "--windows", "4", "2",
        "--out", settings.out, "--threads", "1", *recipe, *more,
    ]  # fmt: skip


def test_a_killed_process_is_resumed_to_the_same_bits(settings, tmp_path):
    """SIGKILL while images are loaded by a worker, after the first state and somewhere in an epoch."""
    state = Path(settings.out) / "state.pt"
    run = [sys.executable, "-m", "posmlp", *command(settings, "--workers", "1")]
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.communicate()
    assert state.exists() and process.returncode == -signal.SIGKILL
    assert main(["train", "--out", settings.out, "--resume", "--workers", "0"]) == 0
    straight = dataclasses.replace(settings, out=str(tmp_path / "straight"))
    assert main(command(straight, "--workers", "0")) == 0
    assert_same_bits(outcome(settings.out), outcome(straight.out))


def test_what_resume_refuses(settings, capsys):
    assert main(command(settings)) == 0
    before = RunFolder(settings.out).state.read_bytes()
    assert main(command(settings)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command(settings, "--resume"), "--lr", "0.5"]) == 2
    assert "lr must be" in capsys.readouterr().err
    assert main(command(settings, "--resume")) == 0, "nothing is left to do"
    assert main(command(settings, "--resume", "--recipe", "tiny")) == 0, "which is the recipe that it had"
    assert main(command(settings, "--resume", "--recipe", "digits")) == 2
    assert "must be" in capsys.readouterr().err
    assert RunFolder(settings.out).state.read_bytes() == before
    RunFolder(settings.out).state.write_bytes(before[:1000])
    assert main(command(settings, "--resume")) == 2
    assert "state.pt" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(settings, monkeypatch, broken):
    loss, calls = loop.Trainer._loss, iter(range(100))

    def poisoned(self, batch):
        value = loss(self, batch)
        if next(calls) != 7:
            return value
        if broken == "gradient":
            value.register_hook(lambda gradient: gradient * float("inf"))
            return value
        return value * float("nan")

    monkeypatch.setattr(loop.Trainer, "_loss", poisoned)
    with pytest.raises(FloatingPointError) as error:
        train(settings, shown=False)
    message = str(error.value)
    assert ("loss is nan" if broken == "loss" else "norm of the gradient is") in message
    assert "update 3 of 5 in epoch 2" in message and "state.pt" in message
    state = RunFolder(settings.out).read_state()
    assert state["place"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_accumulated_batches_make_one_update(settings, tmp_path):
    """Two halves of a batch and the batch itself: the same weights but for rounding, without batch norm."""
    plain = settings.recipe.changed(
        mixup=0.0, cutmix=0.0, drop=0.0, drop_path=0.0, epochs=2, precision="float32"
    )
    gmlp = dataclasses.replace(
        settings, model="gmlp_s16_sgu", options={"dims": (16,), "depths": 1, "patch_size": 4}, windows=(4,)
    )
    weights = []
    for name, change in (("whole", {"batch_size": 8}), ("halves", {"batch_size": 4, "accumulate": 2})):
        out = str(tmp_path / name)
        train(dataclasses.replace(gmlp, out=out, recipe=plain.changed(**change)), shown=False)
        weights.append(load_file(Path(out) / "last.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


def test_compiles_the_model_without_another_layout(settings, monkeypatch):
    """On a CPU, where Inductor's change of layouts copies the maps."""
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: given.append(options))
    for compile in (False, True):
        recipe = settings.recipe.changed(epochs=1)
        out = f"{settings.out}-{compile}"
        train(dataclasses.replace(settings, recipe=recipe, out=out, compile=compile))
    assert given == [{"options": {"layout_optimization": False}}]
