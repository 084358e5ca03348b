"""A small training loop for images that fit into memory: what the demo needs, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Images
from .visualize.views import History


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        epochs: passes over the training images.
        batch: images in a step.
        lr: the highest learning rate, reached after `warmup` epochs; it falls to 0 along a cosine.
        position_lr: the same for the encodings, whose values are tokens and not activations.
        weight_decay: of weights; biases, norms and encodings have none.
        smoothing: of the labels.
        rotate, scale, shift: the limits of random distortions: degrees, share, share of the image's side.
        mean, std: how pixels in [0, 1] are normalised.
        seed: of the order of the images and their distortions.
    """

    epochs: int = 20
    batch: int = 64
    lr: float = 4e-3
    position_lr: float = 4e-2
    warmup: float = 2.0
    weight_decay: float = 0.05
    smoothing: float = 0.05
    rotate: float = 10.0
    scale: float = 0.1
    shift: float = 0.06
    mean: float = 0.5
    std: float = 0.5
    seed: int = 0


def fit(
    model: nn.Module,
    train: Images,
    test: Images,
    recipe: Recipe,
    on_step: Callable[[int, History], None] = lambda step, history: None,
) -> History:
    """Train a model in place with AdamW, and evaluate it after every epoch.

    `on_step` is called after every step, with the steps done and the history so far. The model is left in
    eval mode. The same recipe on the same machine gives the same weights.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = recipe.epochs * steps_per_epoch(train, recipe)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_cosine(steps, recipe.warmup * steps / recipe.epochs)
    )
    history, step = History(), 0
    for _ in range(recipe.epochs):
        model.train()
        losses = []
        for indices in _batches(len(train), recipe.batch, generator):
            pixels = normalise(distort(train.pixels[indices], recipe, generator), recipe)
            loss = F.cross_entropy(model(pixels), train.labels[indices], label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            step += 1
            on_step(step, history)
        logits = predict_logits(model, test.pixels, recipe)
        history.train_loss.append(sum(losses) / len(losses))
        history.test_loss.append(
            F.cross_entropy(logits, test.labels, label_smoothing=recipe.smoothing).item()
        )
        history.test_accuracy.append((logits.argmax(1) == test.labels).float().mean().item())
    on_step(step, history)
    return history


@torch.no_grad()
def predict_logits(model: nn.Module, pixels: Tensor, recipe: Recipe) -> Tensor:
    """`[n, 1, side, side] -> [n, classes]`, in eval mode, batch by batch."""
    model.eval()
    return torch.cat([model(normalise(batch, recipe)) for batch in pixels.split(256)])


def steps_per_epoch(train: Images, recipe: Recipe) -> int:
    return max(1, len(train) // recipe.batch)


def normalise(pixels: Tensor, recipe: Recipe) -> Tensor:
    return (pixels - recipe.mean) / recipe.std


def distort(pixels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift every image `[n, 1, side, side]` by its own random amounts."""
    rotate, scale, *shift = (torch.rand(4, len(pixels), generator=generator) * 2 - 1).unbind()
    angle, scale = rotate * math.radians(recipe.rotate), 1 + scale * recipe.scale
    cos, sin = angle.cos() * scale, angle.sin() * scale
    dx, dy = (2 * recipe.shift * amount for amount in shift)  # affine_grid's image is 2 units wide
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)  # [n, 2, 3]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Parameters by what they are: weights decay, biases and norms do not, encodings also learn faster."""
    positions = model.no_weight_decay()
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "plain": [], "positions": []}
    for name, parameter in model.named_parameters():
        is_encoding = name in positions and not name.endswith("bias")
        kind = "positions" if is_encoding else "plain" if parameter.dim() < 2 else "weights"
        groups[kind].append(parameter)
    return [
        {"params": groups["weights"], "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"params": groups["plain"], "lr": recipe.lr, "weight_decay": 0.0},
        {"params": groups["positions"], "lr": recipe.position_lr, "weight_decay": 0.0},
    ]


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """A learning rate's factor by step: up along a line, then down to 0 along half a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled indices in full batches; what is left over waits for another epoch's order."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, max(1, count // batch) * batch, batch):
        yield order[start : start + batch]
