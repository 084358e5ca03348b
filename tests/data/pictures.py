"""Image files of noise, and the members of shards."""

from __future__ import annotations

import io

import numpy as np
import pytest


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
