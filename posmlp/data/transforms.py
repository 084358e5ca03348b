"""From an image to a model's input."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .extras import optional
from .images import prepare

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..card import ModelCard
    from ..train.recipe import Recipe


# What timm reads, it checks; but parts of a name without a number it passes over.
_POLICY = r"[a-z0-9]+(-([a-z]+[0-9.]+|tweights|t3aw?))*"


def training_transform(recipe: Recipe, card: ModelCard) -> Callable[[Image], Tensor]:
    """timm's distortions: `RGB image -> [in_chans, side, side]`, randomly cropped, flipped, coloured, erased.

    Grey models see images that have been distorted in colour. Raises: `ValueError` for an unknown policy.
    """
    timm = optional("timm.data", "train")
    _posterize_anything()
    try:
        if not re.fullmatch(_POLICY, recipe.auto_augment or "v0"):
            raise ValueError("not a name of this kind")
        crop, colour, tensor = timm.create_transform(
            card.side,
            is_training=True,
            scale=recipe.scale,
            ratio=recipe.ratio,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter or None,
            auto_augment=recipe.auto_augment or None,
            interpolation=card.interpolation,
            mean=_of_colours(card.mean),
            std=_of_colours(card.std),
            re_prob=recipe.reprob,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"auto_augment must be a policy of timm, such as rand-m6-n3-mstd1, got {recipe.auto_augment!r}"
        ) from error
    transforms = optional("torchvision.transforms", "train")
    if card.in_chans == 1:
        grey = transforms.Grayscale(num_output_channels=3)  # the last step normalises, and erases, three
        return transforms.Compose([crop, colour, grey, tensor, itemgetter(slice(0, 1))])
    return transforms.Compose([crop, colour, tensor])


def evaluation_transform(card: ModelCard) -> Callable[[Image], Tensor]:
    """What `read_image` does with a picture: `image -> [in_chans, side, side]`."""
    return partial(prepare, card=card)


def _posterize_anything() -> None:
    """Let timm's policies ask for a picture of no bits, which Pillow 13 refuses."""
    policies = optional("timm.data.auto_augment", "train")
    for name, operation in policies.NAME_TO_OP.items():
        if operation is policies.posterize:
            policies.NAME_TO_OP[name] = _posterize


def _posterize(picture: Image, bits: int, **options: Any) -> Image:
    return optional("timm.data.auto_augment", "train").posterize(picture, max(1, bits), **options)


def _of_colours(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(values) * (3 // len(values))
