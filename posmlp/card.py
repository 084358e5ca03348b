"""The model card: what a file of weights does not say, and classifying an image with it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .files import write_text


@dataclass(frozen=True)
class ModelCard:
    """A model's name and options, its classes, and how an image reaches it.

    It lies beside the weights, with their name and the ending `.json`.

    Args:
        model: a name from `list_models()`.
        options: what `create_model` gets besides the name.
        classes: a name per class; empty where a class has only its number.
        in_chans: channels of an image, 1 (grey) or 3 (colour).
        side: of the square image that the model gets, in pixels.
        crop: the share of the resized image's shorter side that is kept.
        mean, std: of each channel, for values in [0, 1].
        interpolation: "bilinear" or "bicubic".
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
    in_chans: int = 3
    side: int = 224
    crop: float = 1.0
    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)
    interpolation: str = "bicubic"

    @classmethod
    def default(cls, name: str) -> ModelCard:
        """The card of a model by name alone: ImageNet's channels and values. Raises: `ValueError`."""
        from .registry import default_cfg

        config = default_cfg(name)
        keys = ("mean", "std", "interpolation")
        return cls(
            name,
            in_chans=config["input_size"][0],
            side=config["input_size"][-1],
            crop=config["crop_pct"],
            **{key: config[key] for key in keys},
        )

    @staticmethod
    def path(weights: str | Path) -> Path:
        """Where the card of a file of weights lies."""
        return Path(weights).with_suffix(".json")

    def class_name(self, index: int) -> str:
        """What a class is called, its number if it has no name."""
        return self.classes[index] if index < len(self.classes) else str(index)

    def save(self, weights: str | Path) -> None:
        """Write the card beside a file of weights."""
        write_text(self.path(weights), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, weights: str | Path) -> ModelCard | None:
        """The card beside a file of weights, or None. Raises: `ValueError` for a file that is no card."""
        path = cls.path(weights)
        if not path.is_file():
            return None
        try:
            card = cls(**json.loads(path.read_text(encoding="utf-8")))
            card._check()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a model card: {error}") from error
        return card

    def _check(self) -> None:
        if not isinstance(self.options, dict) or not isinstance(self.model, str):
            raise ValueError("model must be a name, and options must be names with values")
        if not isinstance(self.classes, list) or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes must be a list of names, got {self.classes!r}")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) not in (1, self.in_chans) or not all(isinstance(v, (int, float)) for v in value):
                raise ValueError(f"{name} must be one number, or one per channel, got {value!r}")
        if self.in_chans not in (1, 3):
            raise ValueError(f"in_chans must be 1 or 3, got {self.in_chans!r}")
        if not isinstance(self.side, int) or self.side < 1 or not 0 < self.crop <= 1:
            raise ValueError(f"side must be positive and crop in (0, 1], got {self.side} and {self.crop}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be bilinear or bicubic, got {self.interpolation!r}")
