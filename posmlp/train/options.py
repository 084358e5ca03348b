"""The options of `posmlp train`: those of a run, and one for every field of the recipe. No torch here."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .recipe import RECIPES, Recipe

_DESCRIPTION = """Train a model. DATA is a folder with train/ and val/, each of class folders; or one
folder of class folders, of which --val-split is held out; or a folder of WebDataset shards, train-*.tar and
val-*.tar; or digits, scikit-learn's. The recipe is the one that suits data and model, and every part of it
can be changed. Several processes: torchrun --nproc-per-node N -m posmlp.train DATA ..."""


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand; only options that were given appear among the parsed arguments."""
    train = commands.add_parser(
        "train",
        help="train a model on a folder of images",
        description=_DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    train.add_argument("data", nargs="?", metavar="DATA", help="images to train with (see above)")
    _add_settings(train.add_argument_group("the run"))
    _add_recipe(train.add_argument_group("the recipe (default: of --recipe tiny)"))
    train.set_defaults(run=_train)


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="as `posmlp info` lists them (default: posmlp_tiny)")
    group.add_argument("--out", metavar="FOLDER", help="of the run (default: runs/ and the model's name)")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    group.add_argument("--recipe", choices=sorted(RECIPES), help="default: by data and model")
    group.add_argument("--val-split", type=float, metavar="SHARE", help="held out to validate (default: 0.1)")
    group.add_argument("--img-size", type=int, metavar="N", help="side of the images (default: the model's)")
    group.add_argument(
        "--windows", type=int, nargs="+", metavar="N", help="side of the windows: one, or one a level"
    )
    group.add_argument("--in-chans", type=int, choices=(1, 3), help="grey or colour (default: 3; digits: 1)")
    group.add_argument(
        "--weights", metavar="FILE", help="start from these, also of other windows or another image size"
    )
    group.add_argument(
        "--interpolate-free", action="store_true", help="resize free token-mixing matrices of --weights too"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images (default: by CPU)"
    )
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is)")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's choice)")
    group.add_argument("--compile", action="store_true", help="run the model through torch.compile")


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    for option in dataclasses.fields(Recipe):
        several = isinstance(option.default, tuple)
        kind = type(option.default[0] if several else option.default)
        text = f"{option.metadata['help']} (default: {_text(option.default)})".replace("%", "%%")
        group.add_argument(
            "--" + option.name.replace("_", "-"),
            type=kind,
            nargs=len(option.default) if several else None,
            metavar={int: "N", float: "X", str: "NAME"}[kind],
            help=text,
        )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) and value < 0.99 else str(value)


def _train(recipe: str | None = None, resume: bool = False, **options: Any) -> int:
    from .run import run

    return run(options, recipe, resume)
