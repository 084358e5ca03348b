"""What a training run is: its recipe and its settings, as plain values. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


def _option(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text, and for numbers their limits `least` and `most`."""
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are those of PosMLP-T on ImageNet-1k.

    Every field is an option of `posmlp train`, whose help says what it is.
    Raises: `ValueError` for a value out of its limits.
    """

    epochs: int = _option(300, "of the cosine, warm-up included", least=1)
    warmup_epochs: int = _option(10, "in which the learning rate rises", least=0)
    cooldown_epochs: int = _option(10, "at the final learning rate, after the cosine", least=0)
    batch_size: int = _option(128, "images a process takes at once", least=1)
    accumulate: int = _option(1, "batches whose gradients make one update", least=1)
    lr: float = _option(2e-3, "highest learning rate, for updates of --lr-batch images", least=0.0)
    lr_batch: int = _option(
        512, "the learning rate grows linearly from here with an update's images", least=1
    )
    warmup_lr: float = _option(1e-5, "learning rate of the first update", least=0.0)
    min_lr: float = _option(1e-6, "learning rate at the end", least=0.0)
    position_lr: float = _option(1.0, "factor on the learning rate of the encodings", least=0.0)
    weight_decay: float = _option(0.067, "of weights; biases, norms and encodings have none", least=0.0)
    eps: float = _option(1e-5, "of AdamW", least=0.0)
    clip_grad: float = _option(1.0, "largest norm of the gradient; 0: not clipped", least=0.0)
    drop: float = _option(0.0233, "dropout", least=0.0, most=1.0)
    drop_path: float = _option(0.1, "stochastic depth of the last block", least=0.0, most=1.0)
    auto_augment: str = _option("rand-m6-n3-mstd1", "timm's name of a policy; '' for none")
    scale: tuple[float, float] = _option(
        (0.08, 1.0), "shares of an image's area that a crop takes", least=0.0
    )
    ratio: tuple[float, float] = _option((0.75, 4 / 3), "aspect ratios of a crop", least=0.0)
    hflip: float = _option(0.5, "probability of a mirror image", least=0.0, most=1.0)
    color_jitter: float = _option(0.0, "brightness, contrast, saturation; without a policy only", least=0.0)
    reprob: float = _option(0.0, "probability of random erasing", least=0.0, most=1.0)
    mixup: float = _option(0.5, "alpha of mixup; 0: none", least=0.0)
    cutmix: float = _option(1.0, "alpha of cutmix; 0: none", least=0.0)
    smoothing: float = _option(0.1, "of the labels", least=0.0, most=1.0)
    ema: float = _option(0.99992, "decay of the averaged weights; 0: none", least=0.0, most=1.0)
    crop: float = _option(0.9, "share of the resized image that evaluation looks at", least=0.01, most=1.0)
    precision: str = _option("bfloat16", "of the forward pass: bfloat16 (autocast) or float32")
    seed: int = _option(0, "of weights, order, distortions and dropout", least=0)

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            least, most = option.metadata.get("least"), option.metadata.get("most")
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if least is not None and not least <= number <= (float("inf") if most is None else most):
                    upper = "" if most is None else f" and at most {most}"
                    raise ValueError(f"{option.name} must be at least {least}{upper}, got {value}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            object.__setattr__(self, name, (low, high))  # JSON gives a list
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"{name} must rise, from more than 0, got {low} to {high}")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision must be bfloat16 or float32, got {self.precision!r}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than epochs = {self.epochs}, got {self.warmup_epochs}"
            )
        if self.batch_size % 2 and (self.mixup or self.cutmix):
            raise ValueError(f"batch_size must be even for mixup and cutmix, got {self.batch_size}")

    def changed(self, **changes: Any) -> Recipe:
        """Another recipe; with other epochs, warm-up and cool-down keep their share unless they are given."""
        if "epochs" in changes:
            for name in ("warmup_epochs", "cooldown_epochs"):
                share = getattr(self, name) / self.epochs
                changes.setdefault(name, int(share * changes["epochs"]))
        return replace(self, **changes)

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.cooldown_epochs


# The original's "small" saw 60 images a GPU on four GPUs; "base" has no recipe of its own.
RECIPES = {
    "tiny": Recipe(),
    "small": Recipe(lr=1e-3, lr_batch=240, batch_size=60),
    "digits": Recipe(
        epochs=20, warmup_epochs=2, cooldown_epochs=0, batch_size=64, lr=4e-3, lr_batch=64, warmup_lr=1e-3,
        min_lr=0.0, position_lr=10.0, weight_decay=0.05, drop=0.0, drop_path=0.05, auto_augment="",
        scale=(0.7, 1.0), ratio=(0.85, 1.18), hflip=0.0, mixup=0.0, cutmix=0.0, smoothing=0.05, ema=0.9,
        crop=1.0, precision="float32",
    ),
}  # fmt: skip


def recipe_name(data: str, model: str) -> str:
    """The recipe that suits a data set and a model."""
    if data == "digits":
        return "digits"
    return "small" if model.startswith(("posmlp_small", "posmlp_base")) else "tiny"


@dataclass(frozen=True)
class Settings:
    """One run, all that its `config.json` holds.

    Args:
        data: what `posmlp.data.open_data` takes.
        out: the run's folder.
        model: a name from `list_models()`.
        recipe: how it is trained.
        options: further arguments of `create_model`.
        img_size: side of the images; None is the model's own.
        windows: side of the windows, one, or one a level; None are the model's own.
        in_chans: 1 or 3; None is 1 for "digits", else 3.
        weights: a checkpoint to start from, at any windows and image size.
        interpolate_free: resize free token-mixing matrices of these weights too.
        val_split: share of the images held out, where the data has no part for validation.
        workers: processes that load images, for each training process.
        device: None is a GPU if there is one.
        threads: of the CPU; None is torch's choice.
        compile: run the model through `torch.compile`.

    Raises: `ValueError` for a number that is too small.
    """

    data: str
    out: str
    model: str = "posmlp_tiny"
    recipe: Recipe = field(default_factory=Recipe)
    options: Mapping[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    windows: Sequence[int] | None = None
    in_chans: int | None = None
    weights: str | None = None
    interpolate_free: bool = False
    val_split: float | None = None
    workers: int = 0
    device: str | None = None
    threads: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("img_size", 1), ("windows", 1), ("workers", 0), ("threads", 1)):
            value = getattr(self, name)
            for number in value if isinstance(value, (tuple, list)) else (value,):
                if number is not None and number < least:
                    raise ValueError(f"{name} must be at least {least}, got {number}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Raises: `ValueError` for text that holds no settings."""
        try:
            values = json.loads(text)
            return cls(**values | {"recipe": Recipe(**values["recipe"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no settings of a run: {error}") from error
