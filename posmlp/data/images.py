"""Image files: finding, reading and writing them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from torch import Tensor

from .extras import optional

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..card import ModelCard

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


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

    Raises: `ValueError` naming a file that is no readable image, `FileNotFoundError`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image at {path}")
    return prepare(open_picture(path, str(path)), card)


def open_picture(file: str | Path | IO[bytes], name: str) -> Image:
    """An image in RGB, turned as its EXIF data say. Raises: `ValueError` naming an unreadable one."""
    image = optional("PIL.Image")
    try:
        with image.open(file) as picture:
            return optional("PIL.ImageOps").exif_transpose(picture).convert("RGB")
    except image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large an image") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may break a decoder anywhere
        raise ValueError(f"{name} is not an image that can be read") from error


def prepare(picture: Image, card: ModelCard) -> Tensor:
    """An image as a model wants it: `[in_chans, side, side]`, resized, cropped and normalised.

    The shorter side becomes `side / crop`, and the square in the middle is taken.
    """
    picture = picture.convert("L" if card.in_chans == 1 else "RGB")
    scaled = int(card.side / card.crop)
    short = min(picture.size)
    size = tuple(max(scaled, int(length * scaled / short)) for length in picture.size)
    if size != picture.size:
        image = optional("PIL.Image")
        picture = picture.resize(size, image.Resampling[card.interpolation.upper()])
    left, top = (round((length - card.side) / 2) for length in size)
    picture = picture.crop((left, top, left + card.side, top + card.side))

    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return normalise(data.view(card.side, card.side, -1).permute(2, 0, 1).float() / 255, card)


def normalise(pixels: Tensor, card: ModelCard) -> Tensor:
    """`[*, in_chans, H, W]`, values in [0, 1] -> with the mean and deviation that a model expects."""
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (card.mean, card.std))
    return (pixels - mean) / std


def write_image(path: str | Path, pixels: Tensor) -> None:
    """Write `[1, H, W]` or `[H, W]` values in [0, 1] as a grey image of 8 bits."""
    height, width = pixels.shape[-2:]
    data = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1)
    image = optional("PIL.Image").frombytes("L", (width, height), bytes(data.tolist()))
    image.save(path)
