"""The runs of an ablation: several at a time, each in a process with one thread, and none twice."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from ..card import ModelCard
from ..cli import MISTAKES
from ..data.loader import EvaluationLoader
from ..data.sources import open_data
from ..data.transforms import evaluation_transform
from ..evaluate import evaluate
from ..files import write_text
from ..predict import find_device
from ..registry import create_model
from ..train.folder import RunFolder
from ..train.recipe import Settings
from ..train.run import train
from ..train.trainer import StoppedError
from ..train.world import World
from ..transfer import transfer_weights
from .plan import Run
from .scales import Elsewhere


@dataclass(frozen=True)
class Outcome:
    """What a run came to after its last epoch, on the validation images.

    Args:
        top1: percent.
        loss: mean cross entropy.
        elsewhere: top-1 of the same weights at other image sizes and windows, by `str(Elsewhere)`.
    """

    top1: float
    loss: float
    elsewhere: dict[str, float]


def finished(run: Run) -> Outcome | None:
    """What a run came to, if it was done before.

    Raises: `ValueError` where its folder holds a run of other settings, or a damaged file.
    """
    path = _outcome_path(run)
    if not _begun(run) or not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        outcome = Outcome(float(values["top1"]), float(values["loss"]), dict(values["elsewhere"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not what a run came to: {error!r}") from error
    return outcome if all(str(place) in outcome.elsewhere for place in run.elsewhere) else None


def perform(run: Run) -> Outcome:
    """Train, or go on where the run was left, and look at the weights elsewhere."""
    last = train(run.settings, resume=_begun(run), shown=False)[-1]
    elsewhere = {str(place): _top1_at(run.settings, place) for place in run.elsewhere}
    outcome = Outcome(last["val_top1"], last["val_loss"], elsewhere)
    write_text(_outcome_path(run), json.dumps(dataclasses.asdict(outcome), indent=2) + "\n")
    return outcome


def perform_all(runs: Sequence[Run], jobs: int, on_end: Callable[[Run, Outcome], None]) -> None:
    """Perform runs, `jobs` at a time; `on_end` is called after each.

    Raises: `ValueError` naming the first run that failed, once the others have saved their state and stopped.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would share the state of torch's threads
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_start_worker) as pool:
        waiting, running = list(reversed(runs)), {}
        try:
            while waiting or running:
                # No more than there are processes: a run that waits in the pool could not be taken back.
                while waiting and len(running) < jobs:
                    run = waiting.pop()
                    running[pool.submit(perform, run)] = run
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    on_end(run, _result(future, run))
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # training takes it as the order to save and stop
            raise


def _result(future: Future, run: Run) -> Outcome:
    try:
        return future.result()
    except MISTAKES as error:
        raise ValueError(f"{run}: {error}") from error
    except StoppedError as stop:
        raise ValueError(f"{run}: stopped by signal {stop}; the same command goes on") from stop
    except BrokenProcessPool as error:
        raise ValueError(f"{run}, or one beside it: its process was killed") from error
    except Exception as error:
        raise RuntimeError(f"{run} failed") from error


def _start_worker() -> None:
    """One thread, and an end with the process that waits for the results, however that one ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)  # what a run has written is whole at any moment

    threading.Thread(target=follow, daemon=True).start()


def _begun(run: Run) -> bool:
    """Whether the run's folder holds this run. Raises: `ValueError` if it holds another one."""
    settings = run.settings
    here = RunFolder(settings.out).read_settings() if Path(settings.out).is_dir() else None
    if here is None:
        return False
    ours = Settings.from_json(settings.to_json())  # as a file would give it: lists for tuples
    for name in ("out", "workers", "device"):  # nothing depends on these
        here = dataclasses.replace(here, **{name: getattr(ours, name)})
    mine, theirs = ({**vars(s), **vars(s.recipe), "recipe": None} for s in (ours, here))
    for name, value in mine.items():
        if theirs[name] != value:
            raise ValueError(
                f"{settings.out} holds a run with {name} {theirs[name]!r}, not {value!r}: "
                "give the same options, or another --out"
            )
    return True


def _outcome_path(run: Run) -> Path:
    return Path(run.settings.out) / "outcome.json"


def _top1_at(settings: Settings, place: Elsewhere) -> float:
    """Top-1 of a run's last weights on the validation images at another size and windows, in percent."""
    weights = RunFolder(settings.out).weights("last")
    card = dataclasses.replace(ModelCard.load(weights), side=place.side)
    model = create_model(card.model, **card.options | {"windows": place.windows, "img_size": place.side})
    transfer_weights(model, weights, interpolate_free=True)
    device = find_device(settings.device)
    loader = EvaluationLoader(
        open_data(settings.data, settings.val_split)[1],
        evaluation_transform(card),
        batch=settings.recipe.batch_size,
        workers=settings.workers,
    )
    world = World(0, 1, device)
    return evaluate(model.to(device), loader, world, model.num_classes, settings.recipe.precision).top1
