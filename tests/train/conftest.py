"""A small data set of image files, and settings that train on it in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posmlp.data import write_image
from posmlp.train.recipe import RECIPES, Settings

CLASSES = ("dark", "light")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Two classes, noise about two greys: 2 x 20 images of 20 x 16 pixels in `train/`, 2 x 7 in `val/`."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("val", 7)):
        for level, name in zip((0.3, 0.7), CLASSES, strict=True):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = level + 0.15 * torch.randn(1, 20, 16, generator=generator)
                write_image(folder / f"{number:02}.png", pixels)
    return root


@pytest.fixture
def settings(images, tmp_path) -> Settings:
    """Four epochs of five updates of 8 images, with everything random that a recipe has."""
    for package in ("timm", "torchvision", "tensorboard", "rich", "safetensors"):
        pytest.importorskip(package, reason="needs the train extra")
    recipe = RECIPES["digits"].changed(
        epochs=4, batch_size=8, auto_augment="rand-m6-n3-mstd1", hflip=0.5, mixup=0.5, cutmix=1.0, drop=0.1
    )
    return Settings(
        str(images), str(tmp_path / "run"), "posmlp_nano", recipe,
        options={"dims": (16, 32), "depths": 1}, img_size=16, windows=(4, 2), in_chans=1, threads=1,
    )  # fmt: skip
