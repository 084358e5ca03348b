"""The built-in images: scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .extras import optional
from .split import stratified

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Images:
    """Pictures `[n, 1, side, side]` with values in [0, 1], and their classes `[n]`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(side: int = 32, test_share: float = 0.2) -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits, upsampled from 8x8 (bilinear), as training and test images.

    The split is part of the task, so it is fixed; every digit has the same share of both parts.
    """
    digits = optional("sklearn.datasets").load_digits()
    labels = torch.as_tensor(digits.target, dtype=torch.long)
    pixels = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [n, 1, 8, 8]
    pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
    train, test = stratified(labels, test_share)
    return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])


class Digits:
    """The training or the test part of `load_digits`, as a `Source`."""

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, part: str) -> None:
        images = load_digits()[("train", "test").index(part)]
        self.labels = images.labels.numpy()
        self._part = part
        self._pixels = (images.pixels[:, 0] * 255).round().to(torch.uint8).numpy()  # [n, 32, 32]

    def name(self, index: int) -> str:
        return f"digits:{self._part}/{index}"

    def open(self, index: int) -> Image:
        return optional("PIL.Image").fromarray(np.ascontiguousarray(self._pixels[index])).convert("RGB")
