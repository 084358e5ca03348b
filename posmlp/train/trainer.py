"""The training loop.

Everything random is a function of the seed and of the place in the run (epoch, update, process, image), so
that a run resumed from any update takes the same steps as one that was never stopped, and no generator's
state has to be kept.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..card import ModelCard
from ..data import optional
from ..data.loader import Batch, EvaluationLoader, TrainingLoader
from ..evaluate import evaluate
from .folder import RunFolder
from .optimizer import Schedule, gradient_norm, make_optimizer
from .recipe import Recipe
from .report import Report
from .signals import Signals
from .world import World

UPDATES_UNREAD = 10  # on a GPU, reading every loss at once would keep it waiting for the CPU
SECONDS_UNSAVED = 600.0  # within a long epoch


class StoppedError(Exception):
    """The run was asked to stop, and has saved its state. Args: the signal's number."""


@dataclass
class Place:
    """Where a run is: `epoch` and the updates done in it, and sums over these, of this process."""

    epoch: int = 0
    update: int = 0
    loss: float = 0.0
    images: int = 0
    broken: int = 0
    seconds: float = 0.0


class Trainer:
    """One training run.

    Args:
        model: on its device; trained in place.
        card: how images reach it, saved beside its weights.
        training, validation: loaders of this process.
        world: the processes that train together.
        folder: where the run is kept; every process has it, the first one writes.
        report: what is shown.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        recipe: Recipe,
        training: TrainingLoader,
        validation: EvaluationLoader,
        world: World,
        folder: RunFolder,
        report: Report,
        compile: bool = False,
    ) -> None:
        self.model, self.card, self.recipe = model, card, recipe
        self.training, self.validation = training, validation
        self.world, self.folder, self.report = world, folder, report
        timm_data, timm_utils = optional("timm.data", "train"), optional("timm.utils", "train")
        self.ema = timm_utils.ModelEmaV3(model, recipe.ema) if recipe.ema else None
        self.parallel = world.parallel(model)  # after the copy: only the trained model needs others' images
        if compile:
            # Near convolutions Inductor takes [B, H, W, C] for [B, C, H, W], and copies it by columns.
            on_cpu = world.device.type == "cpu"
            self.parallel.compile(options={"layout_optimization": False} if on_cpu else None)
        self.optimizer = make_optimizer(model, recipe, training.images_per_update)
        self.schedule = Schedule(self.optimizer, recipe, training.updates)
        mixes = recipe.mixup > 0 or recipe.cutmix > 0
        self.mixup = (
            timm_data.Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=model.num_classes
            )
            if mixes
            else None
        )
        self.place, self.rows, self.best = Place(), [], -math.inf
        self.saved = time.monotonic()

    # ---- the run ----

    def run(self) -> list[dict[str, float]]:
        """Train to the end; returns the log, a row an epoch.

        Raises: `FloatingPointError` at a loss or gradient that is not finite, `StoppedError` after SIGTERM or
        SIGINT, once the state is saved.
        """
        with Signals() as signals, self.report.progress(self.recipe.total_epochs, self.training.updates):
            while self.place.epoch < self.recipe.total_epochs:
                self._train_epoch(signals)
                self._end_epoch()
        return self.rows

    def _train_epoch(self, signals: Signals) -> None:
        self.parallel.train()
        batches = self.training.epoch(self.place.epoch, self.place.update)
        unread: list[Tensor] = []
        patience = UPDATES_UNREAD if self.world.device.type == "cuda" else 1
        start = time.perf_counter()
        while self.place.update < self.training.updates:
            unread.append(self._update(batches))
            self.place.update += 1
            if len(unread) < patience and self.place.update < self.training.updates:
                continue
            self._read(unread)
            unread.clear()
            now = time.perf_counter()
            self.place.seconds += now - start
            start = now
            self._show()
            due = time.monotonic() - self.saved > SECONDS_UNSAVED
            stop, save = self.world.any(signals.received is not None, due)
            if stop or save:
                self._save_state()
            if stop:
                raise StoppedError(signals.received or signal.SIGTERM)  # or another process was asked

    def _update(self, batches: Iterator[Batch]) -> Tensor:
        """One update of the weights; returns its loss and its gradient's norm, still on the device."""
        recipe, update = self.recipe, self.place.epoch * self.training.updates + self.place.update
        self.schedule.set(update)
        loss = torch.zeros((), device=self.world.device)
        for part, batch in enumerate(islice(batches, recipe.accumulate)):
            seed_all(recipe.seed, update, part, self.world.rank)
            self.report.broken(batch.broken)
            self.place.broken += len(batch.broken)
            self.place.images += len(batch.labels)
            last = part == recipe.accumulate - 1
            alone = nullcontext() if last or self.world.size == 1 else self.parallel.no_sync()
            with alone:
                part_loss = self._loss(batch) / recipe.accumulate
                part_loss.backward()
            loss += part_loss.detach()
        norm = gradient_norm(self.model.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return torch.stack([loss, norm])

    def _loss(self, batch: Batch) -> Tensor:
        pixels, labels = (t.to(self.world.device, non_blocking=True) for t in (batch.pixels, batch.labels))
        smoothing = self.recipe.smoothing
        if self.mixup is not None:
            (pixels, labels), smoothing = self.mixup(pixels, labels), 0.0  # it has smoothed the labels
        enabled = self.recipe.precision == "bfloat16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled):
            logits = self.parallel(pixels)
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)

    def _read(self, unread: list[Tensor]) -> None:
        """Add up what the last updates returned. Raises: `FloatingPointError`."""
        for behind, (loss, norm) in enumerate(torch.stack(unread).tolist(), start=1 - len(unread)):
            for name, value in (("loss", loss), ("norm of the gradient", norm)):
                if not math.isfinite(value):
                    raise FloatingPointError(self._not_finite(name, value, self.place.update + behind))
            self.place.loss += loss

    def _not_finite(self, name: str, value: float, update: int) -> str:
        done = self.folder.state.is_file()
        good = f"the last good state is {self.folder.state}" if done else "nothing had been saved yet"
        return (
            f"the {name} is {value} at update {update} of {self.training.updates} in epoch "
            f"{self.place.epoch + 1}, learning rate {self._lr():.3g}; {good}"
        )

    # ---- after an epoch ----

    def _end_epoch(self) -> None:
        row = self._row()
        self.rows.append(row)
        best = max(row["val_top1"], row.get("ema_top1", -math.inf))
        averaged = self.ema is not None and best == row["ema_top1"]
        is_best, self.best = best > self.best, max(best, self.best)
        self.place = Place(epoch=self.place.epoch + 1)
        if self.world.is_first:
            self.folder.write_weights("last", self.model, self.card)
            if self.ema is not None:
                self.folder.write_weights("ema", self.ema.module, self.card)
            if is_best:
                self.folder.write_weights("best", self.ema.module if averaged else self.model, self.card)
            self.folder.write_log(self.rows)
        self._save_state()
        self.report.epoch(row, self.place.epoch * self.training.updates)

    def _row(self) -> dict[str, float]:
        place = self.place
        sums = torch.tensor([place.loss, place.images, place.broken], dtype=torch.float64)
        loss, images, broken = self.world.sum(sums).tolist()
        row = {
            "epoch": place.epoch + 1,
            "lr": self._lr(),
            "train_loss": loss / self.training.updates / self.world.size,
        }
        models = {"val": self.model} | ({} if self.ema is None else {"ema": self.ema.module})
        for name, model in models.items():
            scores = evaluate(
                model, self.validation, self.world, self.model.num_classes, self.recipe.precision
            )
            self.report.broken(scores.broken)
            row["broken"] = int(broken) + scores.skipped  # which both models are
            row |= {f"{name}_loss": scores.loss, f"{name}_top1": scores.top1, f"{name}_top5": scores.top5}
        return row | {"images_per_second": images / place.seconds, "seconds": place.seconds}

    def _show(self) -> None:
        place = self.place
        speed = place.images * self.world.size / max(place.seconds, 1e-9)
        self.report.update(place.epoch, place.update, place.loss / place.update, speed)

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    # ---- resuming ----

    def _save_state(self) -> None:
        """Write all that the rest of the run depends on. All processes take part, the first one writes."""
        place = vars(self.place).copy()
        sums = ("loss", "images", "broken")
        values = self.world.sum(torch.tensor([place[name] for name in sums], dtype=torch.float64)).tolist()
        place |= {"loss": values[0], "images": int(values[1]), "broken": int(values[2])}
        if self.world.is_first:
            self.folder.write_state(
                {
                    "place": place, "rows": self.rows, "best": self.best, "model": self.model.state_dict(),
                    "ema": None if self.ema is None else self.ema.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "images_per_update": self.training.images_per_update,
                }
            )  # fmt: skip
        self.saved = time.monotonic()
        self.world.wait()

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises: `ValueError` for one of another model or recipe."""
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.place, self.rows, self.best = Place(**state["place"]), state["rows"], state["best"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.folder.state} is the state of another run: {error}") from error
        if state["images_per_update"] != self.training.images_per_update:
            raise ValueError(
                f"updates must be of {state['images_per_update']} images (batch size x accumulation x "
                f"processes) as in {self.folder.state}, got {self.training.images_per_update}"
            )
        self.place.loss /= self.world.size
        if not self.world.is_first:  # the first one has counted for all
            self.place.images = self.place.broken = 0


def seed_all(*place: int) -> None:
    """Seed what draws mixup, dropout and stochastic depth, from a place in the run."""
    words = np.random.SeedSequence(place).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
