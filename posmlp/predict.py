"""`posmlp predict`: classes and probabilities of image files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .card import ModelCard
from .cli import fail
from .data import find_images, read_image
from .registry import create_model, list_models
from .weights import load_checkpoint


def run(
    images: Sequence[str],
    weights: str,
    model: str | None = None,
    topk: int = 1,
    size: int | None = None,
    device: str | None = None,
) -> int:
    """Print a line per image; images that cannot be read get theirs on stderr. Returns the exit status.

    Raises: what `load_model`, `find_device` and `find_images` raise, before anything is printed.
    """
    place = find_device(device)
    paths = find_images(images)
    network, card = load_model(weights, model)
    network.to(place)
    if size is not None:
        card = dataclasses.replace(card, side=size)
    width = max(len(str(path)) for path in paths)
    status = 0
    for path in paths:
        try:
            pixels = read_image(path, card)
        except (ValueError, OSError) as error:
            status = fail(error)
            continue
        probabilities = classify(network, pixels.unsqueeze(0).to(place))[0]
        best = probabilities.topk(min(topk, len(probabilities)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = "  ".join(f"{card.class_name(index)} {share:6.1%}" for index, share in pairs)
        print(f"{path!s:<{width}}  {found}", flush=True)
    return status


def load_model(weights: str | Path, name: str | None = None) -> tuple[nn.Module, ModelCard]:
    """The model of a file of weights, in eval mode, and its card.

    The card beside the weights says which model it is, unless `name` does.
    Raises: `FileNotFoundError`; `ValueError` where nothing says which model it is, for an unknown name, a
        damaged file, or weights of another model.
    """
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no checkpoint at {weights}")
    card = ModelCard.load(weights)
    if name is not None and (card is None or card.model != name):
        card = ModelCard.default(name)
    if card is None:
        raise ValueError(f"no {ModelCard.path(weights)} says which model {weights} holds; give --model NAME")
    try:
        model = create_model(card.model, **card.options)
    except (TypeError, ValueError) as error:
        if card.model not in list_models():
            raise
        raise ValueError(f"{ModelCard.path(weights)} is not a model card: {error}") from error
    load_checkpoint(model, weights)
    return model.eval(), card


def find_device(name: str | None) -> torch.device:
    """The device of a name, or the best there is. Raises: `ValueError` for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no values")
    return device


@torch.inference_mode()
def classify(model: nn.Module, pixels: Tensor) -> Tensor:
    """`[n, in_chans, side, side] -> [n, classes]`, probabilities on the CPU."""
    return model(pixels).float().softmax(1).cpu()
