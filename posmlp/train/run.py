"""One training run from its settings: `train`, and `posmlp train`."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..card import ModelCard
from ..data import optional
from ..data.loader import EvaluationLoader, TrainingLoader
from ..data.sources import Source, open_data
from ..data.transforms import evaluation_transform, training_transform
from ..model import PosMLP
from ..predict import find_device
from ..registry import create_model
from ..transfer import transfer_weights
from .folder import RunFolder
from .optimizer import scaled_lr
from .recipe import RECIPES, Recipe, Settings, recipe_name
from .report import Report
from .trainer import StoppedError, Trainer
from .world import World

NEEDS = ("timm", "torchvision", "safetensors", "tensorboard", "rich")
# What may change when a run is resumed: the weights do not depend on it.
_FREE = ("out", "workers", "device")


def train(settings: Settings, resume: bool = False, shown: bool = True) -> list[dict[str, float]]:
    """Train as the settings say; what comes of it is in the folder `settings.out`.

    Started by torchrun, the process takes its part in a run of several; see `World`.

    Args:
        resume: go on from the folder's state, if it has one.
        shown: print lines and a progress bar.

    Returns: the log, a row an epoch, as in `log.csv`.
    Raises: `ValueError`, `OSError` before the first step for settings, data or weights that do not fit;
        `ImportError` naming the extra to install; `FloatingPointError` at a loss that is not finite;
        `StoppedError` after SIGTERM or SIGINT, with the state saved.
    """
    for name in NEEDS:
        optional(name, "train")
    world = World.join(find_device(settings.device))
    threads = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        return _train(settings, resume, shown, world)
    finally:
        torch.set_num_threads(threads)
        world.leave()


def _train(settings: Settings, resume: bool, shown: bool, world: World) -> list[dict[str, float]]:
    training, validation = open_data(settings.data, settings.val_split)
    card = make_card(settings, training)
    recipe, folder = settings.recipe, RunFolder(settings.out)
    state = folder.read_state() if resume else None
    torch.manual_seed(recipe.seed)
    model, notes = make_model(settings, card)
    model.to(world.device)
    loaders = _loaders(settings, card, training, validation, world)
    if world.is_first:
        if state is None:
            folder.clear()
            folder.write_weights("initial", model, card)
        folder.write_settings(settings)
    update = 0 if state is None else state["place"]["epoch"] * loaders[0].updates
    report = Report(shown and world.is_first, folder.path if world.is_first else None, update)
    trainer = Trainer(model, card, recipe, *loaders, world, folder, report, compile=settings.compile)
    if state is not None:
        trainer.resume(state)
    _announce(report, settings, trainer, (len(training.labels), len(validation.labels)), notes)
    return trainer.run()


def make_card(settings: Settings, source: Source) -> ModelCard:
    """The card of the model to train, from the model's name, the settings and the data's classes."""
    card = ModelCard.default(settings.model)
    channels = settings.in_chans or (1 if settings.data == "digits" else 3)
    options = {**settings.options, "in_chans": channels, "num_classes": len(source.classes)}
    if settings.img_size is not None:
        options["img_size"] = settings.img_size
    if settings.windows is not None:
        windows = tuple(settings.windows)
        options["windows"] = windows[0] if len(windows) == 1 else windows
    grey = {"mean": (0.5,), "std": (0.5,)} if channels == 1 else {}
    return dataclasses.replace(
        card,
        options=options,
        classes=list(source.classes),
        in_chans=channels,
        side=settings.img_size or card.side,
        crop=settings.recipe.crop,
        **grey,
    )


def make_model(settings: Settings, card: ModelCard) -> tuple[PosMLP, list[str]]:
    """The model to train, and what was changed in the weights it starts from."""
    recipe = settings.recipe
    model = create_model(card.model, drop_rate=recipe.drop, drop_path_rate=recipe.drop_path, **card.options)
    if settings.weights is None:
        return model, []
    return model, transfer_weights(model, settings.weights, interpolate_free=settings.interpolate_free)


def _loaders(
    settings: Settings, card: ModelCard, training: Source, validation: Source, world: World
) -> tuple[TrainingLoader, EvaluationLoader]:
    recipe = settings.recipe
    common = {
        "batch": recipe.batch_size, "rank": world.rank, "world": world.size, "workers": settings.workers,
        "pin_memory": world.device.type == "cuda",
    }  # fmt: skip
    return (
        TrainingLoader(
            training,
            training_transform(recipe, card),
            seed=recipe.seed,
            accumulate=recipe.accumulate,
            **common,
        ),
        EvaluationLoader(validation, evaluation_transform(card), **common),
    )


def _announce(
    report: Report, settings: Settings, trainer: Trainer, images: tuple[int, int], notes: list[str]
) -> None:
    recipe, world, loader = settings.recipe, trainer.world, trainer.training
    parameters = sum(p.numel() for p in trainer.model.parameters())
    report.say(
        f"{settings.model}, {parameters:,} parameters, {trainer.card.side} x {trainer.card.side}, "
        f"{len(trainer.card.classes)} classes; {images[0]} images to train, {images[1]} to validate"
    )
    for note in notes:
        report.say(note)
    each = loader.images_per_update
    processes = f"{world.size} process{'es' if world.size > 1 else ''}"
    report.say(
        f"{recipe.total_epochs} epochs of {loader.updates} updates of {each} images "
        f"({recipe.batch_size} x {recipe.accumulate} x {processes}); "
        f"learning rate {scaled_lr(recipe, each):.3g} = {recipe.lr:.3g} x {each} / {recipe.lr_batch}"
    )
    if trainer.place != type(trainer.place)():
        report.say(f"resumed in epoch {trainer.place.epoch + 1}, after {trainer.place.update} updates of it")


# ---- the command ----


def run(options: Mapping[str, Any], recipe: str | None, resume: bool) -> int:
    """`posmlp train`. Returns the exit status: 0, or 128 and the number of the signal that stopped it.

    Args:
        options: of the fields of `Settings` and `Recipe`, those that were given on the command line.
        recipe: a name of `RECIPES`; None takes what suits the data and the model.

    Raises: what `train` raises, and `ValueError` for options that contradict the run to be resumed.
    """
    settings = resolve(options, recipe, resume)
    try:
        train(settings, resume)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that loads images was lost ({error}); --resume goes on") from error
    except StoppedError as stop:
        print(f"stopped; `posmlp train --resume --out {shlex.quote(settings.out)}` goes on")
        return 128 + int(stop.args[0])
    return 0


def resolve(options: Mapping[str, Any], recipe: str | None, resume: bool) -> Settings:
    """Settings from what was given and from what the folder holds."""
    out = options.get("out") or str(Path("runs") / options.get("model", Settings.model))
    here = None
    if Path(out).is_dir():
        here = RunFolder(out).read_settings()
    if here is not None and not resume:
        raise ValueError(f"{out} holds a run already; --resume goes on with it, --out names another folder")
    if here is not None:
        return _same_run(here, {**options, "out": out}, recipe)
    if "data" not in options:
        raise ValueError("DATA is missing" + (f", and {out} holds no run to resume" if resume else ""))
    model = options.get("model", Settings.model)
    changes, others = _recipe_and_rest(options)
    defaults = {
        "workers": 0 if options["data"] == "digits" else default_workers(),
        "threads": torch.get_num_threads(),  # sums in another order end in other weights
    }
    given = {"out": out, "recipe": RECIPES[recipe or recipe_name(options["data"], model)].changed(**changes)}
    return Settings(**defaults | others | given)


def _recipe_and_rest(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {field.name for field in dataclasses.fields(Recipe)}
    changes = {name: value for name, value in options.items() if name in names}
    return changes, {name: value for name, value in options.items() if name not in names}


def _same_run(here: Settings, options: Mapping[str, Any], recipe: str | None) -> Settings:
    """The settings in a folder, if the given ones agree with them."""
    changes, given = _recipe_and_rest(options)
    given |= changes if recipe is None else vars(RECIPES[recipe].changed(**changes))
    known = vars(here) | vars(here.recipe)
    for name, value in given.items():
        if name in _FREE:
            continue
        mine, theirs = (list(v) if isinstance(v, (tuple, list)) else v for v in (value, known[name]))
        if mine != theirs:
            raise ValueError(
                f"{name} must be {theirs!r} as in {here.out}, whose run is resumed, got {mine!r}"
            )
    return dataclasses.replace(here, **{name: options[name] for name in _FREE if name in options})


def default_workers() -> int:
    """Processes that load images for each training process: its share of the processors, less its own."""
    sees_affinity = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if sees_affinity else os.cpu_count() or 1
    return max(0, min(8, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
