"""Image files of noise, the members of shards, and a recipe and a card for small images."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest

from posmlp.card import ModelCard

RECIPE = SimpleNamespace(
    auto_augment="rand-m6-n3-mstd1", hflip=0.5, color_jitter=0.0, reprob=0.3,
    scale=(0.3, 1.0), ratio=(0.8, 1.2),
)  # fmt: skip
CARD = ModelCard("posmlp_nano", side=16)


def samples(name: str, labels: list[int]) -> dict[str, bytes]:
    members = {}
    for number, label in enumerate(labels):
        members[f"{number:03d}.png"] = picture(f"{name}:{number}")
        members[f"{number:03d}.cls"] = f"{label}\n".encode()
    return members


def picture(name: str, side: int = 12) -> bytes:
    """A PNG file of noise that follows from the name."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra")
    image.fromarray(pixels).save(out, "png")
    return out.getvalue()
