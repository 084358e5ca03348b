"""Which parameters are trained how, and the learning rate over the updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..data import optional
from .recipe import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Parameters by what they are: weights decay, biases and norms do not, encodings have their own rate."""
    positions = model.no_weight_decay()
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "plain": [], "positions": []}
    for name, parameter in model.named_parameters():
        is_encoding = name in positions and not name.endswith("bias")
        kind = "positions" if is_encoding else "plain" if parameter.dim() < 2 else "weights"
        groups[kind].append(parameter)
    return [
        {"params": groups["weights"], "weight_decay": recipe.weight_decay, "lr_scale": 1.0},
        {"params": groups["plain"], "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": groups["positions"], "weight_decay": 0.0, "lr_scale": recipe.position_lr},
    ]


def make_optimizer(model: nn.Module, recipe: Recipe, images: int) -> torch.optim.AdamW:
    """AdamW for updates of `images` images."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=scaled_lr(recipe, images), eps=recipe.eps)


def scaled_lr(recipe: Recipe, images: int) -> float:
    """The highest learning rate for updates of `images` images (Goyal et al. 2017: linear)."""
    return recipe.lr * images / recipe.lr_batch


class Schedule:
    """timm's cosine with warm-up and cool-down, by update; it keeps nothing but what the recipe says."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> None:
        self._timm, _ = optional("timm.scheduler", "train").create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            cooldown_epochs=recipe.cooldown_epochs,
            warmup_lr=min(recipe.warmup_lr, optimizer.defaults["lr"]),
            min_lr=recipe.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )

    def set(self, update: int) -> None:
        """Set the learning rates of an update, counted from 0."""
        self._timm.step_update(update)


def gradient_norm(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """The gradient's norm, after which it is at most `limit` long (0: left as it is)."""
    return nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
