"""`posmlp eval`: its scores, its tables and picture, and which classes are which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from posmlp import create_model, save_checkpoint
from posmlp.card import ModelCard
from posmlp.cli import main
from posmlp.data import Batch, write_image
from posmlp.evaluate import class_numbers, evaluate, per_class_table
from posmlp.train.world import World

ALONE = World(0, 1, torch.device("cpu"))
CLASSES = ["black", "grey", "white"]


class Lookup(nn.Module):
    """The logits of an image are its own pixels."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)


def batches(logits: torch.Tensor, labels: torch.Tensor, size: int = 7) -> list[Batch]:
    parts = zip(logits.split(size), labels.split(size), torch.arange(len(labels)).split(size), strict=True)
    return [Batch(x.view(len(x), 1, 1, -1), y, i, ()) for x, y, i in parts]


def test_scores_are_those_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 9, generator=generator)
    labels = torch.randint(9, (50,), generator=generator)
    scores = evaluate(Lookup(), batches(logits, labels), ALONE, 9)
    order = logits.argsort(1, descending=True)
    assert scores.count == 50
    assert scores.top1 == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert scores.top5 == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    for true, guess in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        scores.confusion[true, guess] -= 1
    assert not scores.confusion.any()


def test_evaluating_leaves_the_mode_alone():
    model = create_model("posmlp_nano", in_chans=1, num_classes=3)
    images = torch.zeros(2, 32 * 32)
    batch = Batch(images.view(2, 1, 32, 32), torch.tensor([0, 1]), torch.arange(2), ("a.png cannot be read",))
    for mode in (True, False):
        statistics = model.train(mode).stem.norm1.running_mean.clone()
        scores = evaluate(model, [batch], ALONE, 3)
        assert model.training is mode and model.stem.norm1.training is mode
        assert torch.equal(model.stem.norm1.running_mean, statistics)
        assert scores.broken == ("a.png cannot be read",)


def test_classes_go_by_name_where_there_are_names():
    named = ModelCard("posmlp_nano", classes=["ant", "bee", "cat"])
    assert class_numbers(["cat", "ant"], named, 3).tolist() == [2, 0]
    with pytest.raises(ValueError, match="do not have dog"):
        class_numbers(["cat", "dog"], named, 3)
    assert class_numbers(["x", "y"], ModelCard("posmlp_nano"), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="3 classes"):
        class_numbers(["x", "y"], ModelCard("posmlp_nano"), 3)


def test_the_table_names_the_commonest_mistake():
    logits = F.one_hot(torch.tensor([0, 0, 1, 2, 2, 2]), 4).float()
    scores = evaluate(Lookup(), batches(logits, torch.tensor([0, 0, 0, 1, 1, 2])), ALONE, 4)
    lines = per_class_table(scores, [*CLASSES, "unseen"]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == CLASSES  # one without images has no line
    assert re.search(r"black +3 +66\.7 % .*grey \(1\)$", lines[1])
    assert re.search(r"grey +2 +0\.0 % .*white \(2\)$", lines[2])
    assert re.search(r"white +1 +100\.0 % +100\.0 %$", lines[3])


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of class folders, one of whose images is no image."""
    pytest.importorskip("PIL", reason="needs pillow, of the demo extra")
    for level, name in enumerate(CLASSES):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number in range(3):
            write_image(folder / f"{number}.png", torch.full((32, 32), level / 2))
    (tmp_path / "data" / "grey" / "broken.png").write_bytes(b"no image")
    return tmp_path / "data"


@pytest.fixture
def weights(tmp_path) -> str:
    path = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_checkpoint(create_model("posmlp_nano", in_chans=1, num_classes=3), path)
    options = {"in_chans": 1, "num_classes": 3}
    ModelCard("posmlp_nano", options=options, classes=CLASSES, in_chans=1, side=32).save(path)
    return str(path)


def test_the_command(data, weights, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the demo extra")
    picture = tmp_path / "confusion.png"
    command = ["eval", str(data), "--weights", weights, "--batch-size", "4"]
    assert main([*command, "--per-class", "--confusion", str(picture)]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^9 images, top-1 [\d.]+ %, top-5 100\.00 %, loss [\d.]+$", shown.out, re.M)
    assert "1 skipped" in shown.out and "broken.png" in shown.err
    assert all(name in shown.out for name in CLASSES)
    assert picture.stat().st_size > 5000
    assert main([*command, "--val-split", "0.34"]) == 0
    assert re.match(r"[34] images", capsys.readouterr().out)


def test_a_checkpoint_without_a_card_takes_its_model_by_name(data, tmp_path, capsys):
    path = tmp_path / "plain.pt"
    torch.save({"state_dict_ema": create_model("posmlp_nano").state_dict()}, path)
    assert main(["eval", str(data), "--weights", str(path), "--model", "posmlp_nano"]) == 2
    assert "10 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["nowhere"], "nowhere"),
        (["DATA", "--weights", "none.safetensors"], "none.safetensors"),
        (["DATA", "--confusion", "picture.xyz"], "xyz"),
        (["DATA", "--val-split", "2"], "2"),
        (["DATA", "--size", "0"], "--size"),
    ],
)
def test_mistakes_take_one_line(change, named, data, weights, capsys):
    arguments = [str(data) if word == "DATA" else word for word in change]
    try:
        status = main(["eval", "--weights", weights, *arguments])
    except SystemExit as exit_:
        status = exit_.code
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped")]
    assert status == 2 and len(errors) == 1 and errors[0].startswith("posmlp: error: ") and named in errors[0]
