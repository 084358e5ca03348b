"""What a loader's workers do: read an image, distort it, and put it into a batch with others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

_TRIES = 100  # neighbours that may stand in for an unreadable image


@dataclass(frozen=True)
class Batch:
    """Images and what is known of them.

    Args:
        pixels: `[n, C, side, side]`.
        labels: `[n]`, their classes.
        indices: `[n]`, their places in the source.
        broken: a message for every image that could not be read.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    broken: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory; `DataLoader` calls this."""
        pinned = (tensor.pin_memory() for tensor in (self.pixels, self.labels, self.indices))
        return Batch(*pinned, self.broken)


class Sample(NamedTuple):
    pixels: Tensor | None  # None if it could not be read
    label: int
    index: int
    broken: tuple[str, ...]


class EvaluationImages(Dataset):
    """Samples by their place in a source."""

    def __init__(self, source: Source, transform: Callable[[Image], Tensor]) -> None:
        self._source, self._transform = source, transform

    def __getitem__(self, index: int) -> Sample:
        try:
            picture = self._source.open(index)
        except ValueError as error:
            return Sample(None, 0, index, (str(error),))
        return Sample(self._transform(picture), int(self._source.labels[index]), index, ())


class TrainingImages(EvaluationImages):
    """Samples by epoch and place: randomly transformed, and another one where one cannot be read."""

    def __init__(self, source: Source, transform: Callable[[Image], Tensor], seed: int) -> None:
        super().__init__(source, transform)
        self._seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        count, broken = len(self._source.labels), ()
        with seeded(self._seed, epoch, index):
            for place in range(index, index + min(_TRIES, count)):
                sample = super().__getitem__(place % count)
                broken += sample.broken
                if sample.pixels is not None:
                    break
        return sample._replace(broken=broken)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """All generators of the CPU start from `key`, and afterwards go on from where they were before."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would also reach the GPUs
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_)


def collate(samples: Sequence[Sample]) -> Batch:
    read = [sample for sample in samples if sample.pixels is not None]
    return Batch(
        torch.stack([sample.pixels for sample in read]) if read else torch.empty(0),
        torch.tensor([sample.label for sample in read], dtype=torch.long),
        torch.tensor([sample.index for sample in read], dtype=torch.long),
        tuple(message for sample in samples for message in sample.broken),
    )
