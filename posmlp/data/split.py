"""Splitting images into a training and a validation part."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the images to train with and to hold out, of `labels [n]`: the same share of every class.

    A class of two images or more has at least one in each part. The same seed gives the same split.
    """
    generator = torch.Generator().manual_seed(seed)
    train, held_out = [], []
    counts = labels.bincount().tolist()
    for members in labels.argsort(stable=True).split(counts):
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(len(members) * share)), len(members) - 1)
        held_out.append(members[:count])
        train.append(members[count:])
    return torch.cat(train), torch.cat(held_out)
