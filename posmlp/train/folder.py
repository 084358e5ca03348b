"""The folder of a run: settings, log, weights, and the state to resume from. Files appear whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..card import ModelCard
from ..files import write_text, write_whole
from ..weights import save_checkpoint
from .recipe import Settings


class RunFolder:
    """Args: `path`, made if it is missing. Raises: `OSError` where it cannot be."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.config, self.log, self.state = (
            self.path / name for name in ("config.json", "log.csv", "state.pt")
        )

    def clear(self) -> None:
        """Remove what an earlier run has left, so that nobody resumes it by mistake."""
        weights = (self.weights(name) for name in ("initial", "last", "ema", "best"))
        ours = [self.config, self.state, self.log, *weights, *self.path.glob("events.out.tfevents.*")]
        for path in ours:
            path.unlink(missing_ok=True)

    def read_settings(self) -> Settings | None:
        """The settings of the run that is here, or None. Raises: `ValueError` for a damaged file."""
        if not self.config.is_file():
            return None
        try:
            return Settings.from_json(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config} cannot be read: {error}") from error

    def write_settings(self, settings: Settings) -> None:
        write_text(self.config, settings.to_json())

    def write_log(self, rows: Sequence[dict[str, float]]) -> None:
        """`log.csv`, a row an epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.log, text.getvalue())

    def weights(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def write_weights(self, name: str, model: nn.Module, card: ModelCard) -> None:
        """`last`, `best` or `ema`, with its card."""
        card.save(self.weights(name))
        save_checkpoint(model, self.weights(name))

    def write_state(self, state: dict[str, Any]) -> None:
        """What `--resume` goes on from, the last thing written after an epoch: all else follows from it."""
        write_whole(self.state, lambda file: torch.save(state, file))

    def read_state(self) -> dict[str, Any] | None:
        """The state, or None where the run has not come to its first. Raises: `ValueError` if damaged."""
        if not self.state.is_file():
            return None
        try:
            return torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may break the reader anywhere
            raise ValueError(f"{self.state} is not a state that can be resumed: {error}") from error
