"""Batches of images, the same whatever the number of workers and processes, and wherever a run was resumed.

All that is random is a function of (seed, epoch, image): the order of an epoch, and what befalls each image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .samples import Batch, EvaluationImages, TrainingImages, collate
from .sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image


class TrainingLoader:
    """Shuffled and distorted batches, epoch by epoch; what is left over waits for another epoch's order.

    Args:
        source: the images.
        transform: `RGB image -> [C, side, side]`; may draw from the generators of Python, numpy and torch.
        batch: images in a batch.
        seed: of the order and the distortions.
        rank, world: of `world` processes, this is the `rank`th.
        accumulate: batches in an update. `world` or `accumulate` times `batch` images are those that one
            process would see in an update of one batch of that many.
        workers: processes that read ahead; 0 reads in this one.
        pin_memory: put batches where a GPU can fetch them by itself.

    Raises: `ValueError` where an epoch has no update.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image], Tensor],
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        count, per_update = len(source.labels), batch * world * accumulate
        self.updates, self.images_per_update = count // per_update, per_update
        if not self.updates:
            raise ValueError(
                f"an update of {batch} images x {world} processes x {accumulate} accumulated is more than "
                f"the {count} training images; lower --batch-size"
            )
        self._accumulate = accumulate
        self._plan = _Plan(count, batch, seed, rank, world, self.updates * accumulate)
        images = TrainingImages(source, transform, seed)
        self._loader = _loader(images, self._plan, workers, pin_memory)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from update `start` on, `accumulate` for each update.

        In the place of an unreadable image comes the next readable one of the source.
        Raises: `ValueError` if a hundred in a row are unreadable, `RuntimeError` if a worker was killed.
        """
        self._plan.epoch, self._plan.start = epoch, start * self._accumulate
        for batch in self._loader:
            if len(batch) < self._plan.batch:
                raise ValueError(f"too many images in a row cannot be read; the last: {batch.broken[-1]}")
            yield batch


class EvaluationLoader:
    """Every image once: this process has images `rank`, `rank + world`, and so on, in order.

    Unreadable images are left out and reported. No batch is empty; there are none where `world` is
    greater than the number of images. Arguments as for `TrainingLoader`.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image], Tensor],
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        places = range(rank, len(source.labels), world)
        plan = BatchSampler(places, batch, drop_last=False)
        self._loader = _loader(EvaluationImages(source, transform), plan, workers, pin_memory)

    def __iter__(self) -> Iterator[Batch]:
        """Raises: `ValueError` where none of the images can be read."""
        held = None
        for batch in self._loader:
            if held is None:
                held = batch
            elif len(held) and len(batch):
                yield held
                held = batch
            else:  # one of them is empty, but for its messages
                held = replace(held if len(held) else batch, broken=held.broken + batch.broken)
        if held is not None:
            if not len(held):
                raise ValueError(f"none of the images can be read; the last: {held.broken[-1]}")
            yield held


class _Plan:
    """The places of an epoch's images, as `(epoch, index)` so that workers need no state; a batch sampler."""

    def __init__(self, count: int, batch: int, seed: int, rank: int, world: int, batches: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.world, self.batches = rank, world, batches
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        for step in range(self.start, self.batches):
            first = (step * self.world + self.rank) * self.batch
            yield [(epoch, index) for index in order[first : first + self.batch].tolist()]


def _loader(images: Dataset, plan: BatchSampler | _Plan, workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        images,
        batch_sampler=plan,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # it would draw from torch's own
    )
