"""How good a model is on images whose classes are known: `evaluate`, and `posmlp eval`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .card import ModelCard
from .data.loader import Batch, EvaluationLoader
from .data.sources import open_all, open_data
from .data.transforms import evaluation_transform
from .predict import find_device, load_model
from .train.world import World


@dataclass(frozen=True)
class Scores:
    """Of a model on a set of images.

    Args:
        confusion: `[classes, classes]` counts, class by prediction.
        in_top5: `[classes]` counts of images whose class is among the five most probable.
        loss: mean cross entropy.
        seconds: what it took, loading included.
        skipped: images that could not be read, and are not counted above.
        broken: messages of those that this process met.
    """

    confusion: Tensor
    in_top5: Tensor
    loss: float
    seconds: float
    skipped: int = 0
    broken: Sequence[str] = ()

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Percent; NaN without images, as `top5`."""
        return _percent(self.confusion.diagonal().sum(), self.confusion.sum())

    @property
    def top5(self) -> float:
        return _percent(self.in_top5.sum(), self.confusion.sum())

    @property
    def images_per_second(self) -> float:
        return self.count / self.seconds


def _percent(part: Tensor, whole: Tensor) -> float:
    return (100 * part.double() / whole.double()).item()


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], world: World, classes: int, precision: str = "float32"
) -> Scores:
    """Score a model, in eval mode, on the batches of all processes; every process gets the same scores.

    Args:
        batches: this process's part.
        classes: that the model knows.
        precision: "float32", or "bfloat16" for autocast.
    """
    was_training = model.training
    model.eval()
    start, broken = time.perf_counter(), []
    sizes = [classes * classes, classes, 1, 1]
    sums = torch.zeros(sum(sizes), dtype=torch.float64, device=world.device)
    confusion, in_top5, loss, skipped = sums.split(sizes)  # views
    for batch in batches:
        broken += batch.broken
        skipped += len(batch.broken)
        if not len(batch.labels):
            continue
        pixels, labels = (t.to(world.device, non_blocking=True) for t in (batch.pixels, batch.labels))
        with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(pixels).float()
        ones = torch.ones_like(labels, dtype=torch.float64)
        confusion.index_add_(0, labels * classes + logits.argmax(1), ones)
        best = logits.topk(min(5, classes)).indices
        in_top5.index_add_(0, labels, (best == labels[:, None]).any(1).double())
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
    confusion, in_top5, loss, skipped = world.sum(sums).cpu().split(sizes)
    model.train(was_training)
    return Scores(
        confusion.view(classes, classes).long(),
        in_top5.long(),
        (loss / confusion.sum()).item(),
        time.perf_counter() - start,
        int(skipped),
        tuple(broken),
    )


# ---- the command ----


def run(
    data: str,
    weights: str,
    model: str | None = None,
    val_split: float | None = None,
    size: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "float32",
    per_class: bool = False,
    confusion: str | None = None,
    device: str | None = None,
) -> int:
    """`posmlp eval`: print the scores of a checkpoint. Under torchrun the processes share the images.

    Returns: the exit status.
    Raises: `ValueError`, `OSError` for data or weights that do not fit, `ImportError` naming an extra.
    """
    world = World.join(find_device(device))
    try:
        network, card = load_model(weights, model)
        if size is not None:
            card = dataclasses.replace(card, side=size)
        source = open_all(data) if val_split is None else open_data(data, val_split)[1]
        numbers = class_numbers(source.classes, card, network.num_classes)
        part = {"rank": world.rank, "world": world.size}
        loader = EvaluationLoader(
            source, evaluation_transform(card), batch=batch_size, workers=workers, **part
        )
        batches = (dataclasses.replace(b, labels=numbers[b.labels]) for b in loader)
        scores = evaluate(network.to(world.device), batches, world, network.num_classes, precision)
    finally:
        world.leave()
    for message in scores.broken:
        print(f"skipped: {message}", file=sys.stderr)
    if not scores.count:
        raise ValueError(f"no image of {data} could be read")
    if world.is_first:
        names = [card.class_name(index) for index in range(network.num_classes)]
        for number, name in zip(numbers.tolist(), source.classes, strict=True):
            names[number] = name
        _show(scores, names, per_class, confusion)
    return 0


def class_numbers(classes: Sequence[str], card: ModelCard, known: int) -> Tensor:
    """The model's number of each of the data's classes, `[classes]`: by name, else in their order.

    Raises: `ValueError` where the model does not know a class, or without names for another number of them.
    """
    if card.classes:
        numbers = {name: number for number, name in enumerate(card.classes)}
        strangers = [name for name in classes if name not in numbers]
        if strangers:
            raise ValueError(f"the weights' classes do not have {', '.join(strangers[:5])}")
        return torch.tensor([numbers[name] for name in classes])
    if len(classes) != known:
        raise ValueError(
            f"the data must have the weights' {known} classes, which have no names, got {len(classes)}"
        )
    return torch.arange(known)


def _show(scores: Scores, names: Sequence[str], per_class: bool, confusion: str | None) -> None:
    print(
        f"{scores.count} images, top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %, loss {scores.loss:.4f}"
    )
    print(
        f"{scores.images_per_second:.1f} images/s" + (f", {scores.skipped} skipped" if scores.skipped else "")
    )
    if per_class:
        print(per_class_table(scores, names))
    if confusion is not None:
        from .visualize.confusion import draw_confusion

        draw_confusion(scores.confusion, names, confusion)
        print(f"wrote {confusion}")


def per_class_table(scores: Scores, names: Sequence[str]) -> str:
    """A line for each class that has images: how many, top-1, top-5, and what it is most often taken for."""
    width = max(len("class"), *map(len, names))
    lines = [f"{'class':<{width}}  images   top-1   top-5  most often taken for"]
    for index, name in enumerate(names):
        row = scores.confusion[index]
        if not row.any():
            continue
        others = row.clone()
        others[index] = 0
        wrong = int(others.argmax())
        taken = f"{names[wrong]} ({int(others[wrong])})" if others.any() else ""
        top1, top5 = (_percent(part, row.sum()) for part in (row[index], scores.in_top5[index]))
        lines.append(f"{name:<{width}}  {int(row.sum()):6d}  {top1:5.1f} %  {top5:5.1f} %  {taken}".rstrip())
    return "\n".join(lines)
