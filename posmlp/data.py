"""Images as tensors: the demo's handwritten digits, and image files.

What is not installed everywhere (scikit-learn, Pillow) is imported where it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from .card import ModelCard

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_SPLIT_SEED = 0  # the split is part of the task, so it does not follow the training's seed


@dataclass(frozen=True)
class Images:
    """Pictures `[n, 1, side, side]` with values in [0, 1], and their classes `[n]`."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def optional(name: str, extra: str = "demo") -> ModuleType:
    """Import a module that only an extra of the package installs.

    Raises: `ImportError` that names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(name.split(".")[0], name.split(".")[0])
        raise ImportError(f'{package} is missing: pip install "posmlp-kernels[{extra}]"') from error


def load_digits(side: int = 32, test_share: float = 0.2) -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits, upsampled from 8x8 (bilinear), as training and test images.

    The split is fixed, and every digit has the same share of both parts.
    """
    digits = optional("sklearn.datasets").load_digits()
    labels = torch.as_tensor(digits.target, dtype=torch.long)
    pixels = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [n, 1, 8, 8]
    pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
    train, test = _stratified(labels, test_share)
    return Images(pixels[train], labels[train]), Images(pixels[test], labels[test])


def _stratified(labels: Tensor, test_share: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    train, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(len(members) * test_share)
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train), torch.cat(test)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are named, and in the place of a folder the images below it, sorted.

    Raises: `ValueError` for a folder without images. Whether a file can be read shows when it is read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
        if not below:
            raise ValueError(f"no images in folder {path}")
        found += below
    return found


def read_image(path: str | Path, card: ModelCard) -> Tensor:
    """One image file as a model wants it: `[in_chans, side, side]`, resized, cropped and normalised.

    The shorter side becomes `side / crop`, and the square in the middle is taken.
    Raises: `ValueError` naming a file that is no readable image, `FileNotFoundError`.
    """
    picture = _open(Path(path), "L" if card.in_chans == 1 else "RGB")
    scaled = int(card.side / card.crop)
    short = min(picture.size)
    size = tuple(max(scaled, int(length * scaled / short)) for length in picture.size)
    if size != picture.size:
        image = optional("PIL.Image")
        picture = picture.resize(size, image.Resampling[card.interpolation.upper()])
    left, top = (round((length - card.side) / 2) for length in size)
    picture = picture.crop((left, top, left + card.side, top + card.side))

    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = data.view(card.side, card.side, -1).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (card.mean, card.std))
    return (pixels - mean) / std


def write_image(path: str | Path, pixels: Tensor) -> None:
    """Write `[1, H, W]` or `[H, W]` values in [0, 1] as a grey image of 8 bits."""
    height, width = pixels.shape[-2:]
    data = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1)
    image = optional("PIL.Image").frombytes("L", (width, height), bytes(data.tolist()))
    image.save(path)


def _open(path: Path, mode: str) -> Image:
    image = optional("PIL.Image")
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with image.open(path) as picture:
            return optional("PIL.ImageOps").exif_transpose(picture).convert(mode)
    except image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large an image") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may break a decoder anywhere
        raise ValueError(f"{path} is not an image that can be read") from error
