"""Images on their way into a model: timm's distortions for training, and none for evaluation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from data_support import CARD, RECIPE, picture

from posmlp.data import (
    EvaluationLoader,
    TrainingLoader,
    evaluation_transform,
    open_all,
    open_data,
    read_image,
    training_transform,
)  # fmt: skip


@pytest.fixture
def images(make_folders):
    return open_all(str(make_folders({"cat": 14, "dog": 13})))


def pixels(batches) -> torch.Tensor:
    return torch.cat([batch.pixels for batch in batches])


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("policy", ["", "rand-m9-n3-mstd1-inc1", "v0", "augmix-m3"])
def test_every_policy_serves_grey_and_colour(in_chans, policy, images):
    pytest.importorskip("timm", reason="needs the train extra")
    recipe = SimpleNamespace(**vars(RECIPE) | {"auto_augment": policy, "color_jitter": 0.4, "reprob": 1.0})
    card = replace(CARD, in_chans=in_chans, side=32, interpolation="bilinear")
    batches = list(TrainingLoader(images, training_transform(recipe, card), batch=9, seed=0).epoch(0))
    assert all(batch.pixels.shape == (9, in_chans, 32, 32) for batch in batches)
    assert pixels(batches).abs().max() <= 1 and pixels(batches).std() > 0.1
    if in_chans == 3 and policy != "augmix-m3":
        assert not torch.equal(pixels(batches)[:, 0], pixels(batches)[:, 1])


@pytest.mark.parametrize("in_chans", [1, 3])
def test_without_distortions_training_sees_what_evaluation_sees(in_chans, images):
    pytest.importorskip("timm", reason="needs the train extra")
    still = SimpleNamespace(
        auto_augment="", hflip=0.0, color_jitter=0.0, reprob=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)
    )
    colours = {"mean": (0.4,), "std": (0.2,)} if in_chans == 1 else {"mean": (0.1, 0.2, 0.3), "std": (0.5,)}
    # In grey only at its own size, because grey is then made after resizing.
    for interpolation, side in (("bilinear", 12), ("bicubic", 20))[:in_chans]:
        card = replace(CARD, in_chans=in_chans, side=side, interpolation=interpolation, **colours)
        expected = evaluation_transform(card)(images.open(3))
        torch.testing.assert_close(training_transform(still, card)(images.open(3)), expected)
        still.hflip = 1.0
        torch.testing.assert_close(training_transform(still, card)(images.open(3)), expected.flip(2))
        still.hflip = 0.0


@pytest.mark.parametrize(
    "policy", ["nonsense", "rand-x9", "rand-mlots", "augmix-q1", "rand-tnone", "rand-m", "v0-"]
)
def test_unknown_policies(policy):
    pytest.importorskip("timm", reason="needs the train extra")
    with pytest.raises(ValueError, match=f"auto_augment must be .*{policy}"):
        training_transform(SimpleNamespace(**vars(RECIPE) | {"auto_augment": policy}), CARD)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_evaluation_prepares_as_prediction_does(in_chans, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture("a", 40))
    (tmp_path / "all" / "one").mkdir(parents=True)
    path.rename(tmp_path / "all" / "one" / "a.png")
    card = replace(CARD, in_chans=in_chans, crop=0.8)
    (batch,) = EvaluationLoader(open_all(str(tmp_path / "all")), evaluation_transform(card), batch=1)
    assert torch.equal(batch.pixels[0], read_image(tmp_path / "all" / "one" / "a.png", card))


def test_the_digits_can_be_trained_on():
    pytest.importorskip("timm", reason="needs the train extra")
    pytest.importorskip("sklearn", reason="needs the demo extra")
    train, _ = open_data("digits")
    card = replace(CARD, in_chans=1, side=32, interpolation="bilinear")
    batch = next(TrainingLoader(train, training_transform(RECIPE, card), batch=32, seed=0).epoch(0))
    assert batch.pixels.shape == (32, 1, 32, 32) and batch.labels.unique().numel() > 5


def test_a_picture_may_be_left_without_bits():
    """Policies ask for none where their strength is low; Pillow used to make that black, and now refuses."""
    policies = pytest.importorskip("timm.data.auto_augment", reason="needs the train extra")
    image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra")
    training_transform(RECIPE, CARD)
    operation = policies.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert set(operation(image.linear_gradient("L")).tobytes()) == {0, 128}
