"""Writes a model as one file that a C++ program runs without Python: torch.export, then AOTInductor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from posmlp import create_model
from posmlp.card import ModelCard
from posmlp.cli import MISTAKES, fail
from posmlp.data import find_images, read_image
from posmlp.files import write_whole
from posmlp.predict import load_model
from posmlp_kernels import use_backend


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 after an error, which has one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint (default: random weights)")
    parser.add_argument("--model", metavar="NAME", help="default: as the .json file beside the weights says")
    parser.add_argument("--images", nargs="+", default=(), metavar="PATH", help="written to OUT/images.bin")
    parser.add_argument("--out", default="build", metavar="FOLDER", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    try:
        model, card = find_model(arguments.weights, arguments.model)
        out.mkdir(parents=True, exist_ok=True)
        if arguments.images:
            write_images(arguments.images, card, out / "images.bin")
        write_package(model, card, out / "model.pt2")
    except MISTAKES as error:
        return fail(error)
    print(f"{out / 'model.pt2'} holds {card.model} for images [{card.in_chans}, {card.side}, {card.side}]")
    return 0


def find_model(weights: str | None, name: str | None) -> tuple[nn.Module, ModelCard]:
    """A model in eval mode and its card. Raises: what `load_model` raises."""
    if weights is not None:
        return load_model(weights, name)
    card = ModelCard.default(name or "posmlp_nano")
    return create_model(card.model).eval(), card


def write_images(paths: Sequence[str], card: ModelCard, file: Path) -> None:
    """Write image files as the model wants them, `[n, in_chans, side, side]` in float32, without a header."""
    pixels = torch.stack([read_image(path, card) for path in find_images(paths)])
    write_whole(file, lambda out: out.write(pixels.numpy().tobytes()))


def write_package(model: nn.Module, card: ModelCard, file: Path) -> None:
    """Compile a model for batches of any size of the card's images, with what run.cpp asks about them.

    The gate's compiled CPU op stays a call, which the program's library answers.
    Raises: `NotImplementedError` where that op is not built.
    """
    images = torch.zeros(2, card.in_chans, card.side, card.side)  # an example of 1 would fix the batch to 1
    with torch.inference_mode(), use_backend("cpu"):
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    notes = {"image": " ".join(map(str, images.shape[1:])), "classes": "\n".join(card.classes)}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(file), inductor_configs={"aot_inductor.metadata": notes}
    )


if __name__ == "__main__":
    sys.exit(main())
