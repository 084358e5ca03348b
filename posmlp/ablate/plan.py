"""What one call of `posmlp ablate` does, as plain values. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..train.recipe import RECIPES, Recipe, Settings
from .scales import SCALES, Elsewhere, Scale
from .tables import TABLES, Row


@dataclass(frozen=True)
class Run:
    """One training run: its row's name, its settings, and where else its weights are looked at."""

    row: str
    settings: Settings
    elsewhere: Sequence[Elsewhere]

    def __str__(self) -> str:
        return f"{self.row}, seed {self.settings.recipe.seed}"


@dataclass(frozen=True)
class Plan:
    """The tables to make, and how.

    Args:
        data: as for `posmlp train`.
        out: the folder of tables and runs.
        scale: of the models, a name of `SCALES`; None is "digits" for the digits, else "tiny".
        tables: names of `TABLES`.
        seeds: runs of every row.
        epochs, batch_size: of a run; None are those of the scale.
        val_split: share of the images held out, where the data has no part for validation.
        jobs: runs at a time, each a process with one thread; nothing depends on it.
        workers: processes that load images, for each run.
        device: None is a GPU if there is one.

    Raises: `ValueError` for numbers below 1.
    """

    data: str = "digits"
    out: str = "ablation"
    scale: str | None = None
    tables: Sequence[str] = tuple(TABLES)
    seeds: int = 3
    epochs: int | None = None
    batch_size: int | None = None
    val_split: float | None = None
    jobs: int = 2
    workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("jobs", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def models(self) -> Scale:
        """What is compared."""
        return SCALES[self.scale or ("digits" if self.data == "digits" else "tiny")]

    @property
    def recipe(self) -> Recipe:
        """Of all runs. Weights are not averaged: every row is judged by its last weights themselves."""
        given = {"epochs": self.epochs, "batch_size": self.batch_size}
        changes = {"epochs": self.models.epochs} | {k: v for k, v in given.items() if v is not None}
        return RECIPES[self.models.recipe].changed(**changes, ema=0.0)

    def rows(self) -> dict[str, list[Row]]:
        """The rows of each table asked for."""
        return {name: list(TABLES[name].rows(self.models)) for name in dict.fromkeys(self.tables)}

    def runs(self) -> list[Run]:
        """All runs that the tables need, each once."""
        rows = {row.name: row for table in self.rows().values() for row in table}
        transferred = {row.name for row in self.rows().get("transfer", ())}
        elsewhere = self.models.elsewhere
        return [
            Run(row.name, self._settings(row, seed), elsewhere if row.name in transferred else ())
            for row in rows.values()
            for seed in range(self.seeds)
        ]

    def _settings(self, row: Row, seed: int) -> Settings:
        return Settings(
            self.data,
            str(Path(self.out) / "runs" / row.name / f"seed{seed}"),
            row.model,
            dataclasses.replace(self.recipe, seed=seed),
            options=row.options,
            img_size=self.models.side,
            val_split=self.val_split,
            workers=self.workers,
            device=self.device,
            threads=1,
        )
