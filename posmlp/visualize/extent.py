"""How far gates reach: the extent of each, and of all up to a depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .views import GateView, LevelView


@dataclass(frozen=True)
class Extent:
    """How far a gate's middle token reaches, group by group, in pixels of the model's input.

    Args:
        level: the number of the gate's level.
        mean: `[S, 2]`, the mean displacement from the query to what it takes.
        square: `[S]`, the mean squared displacement.
        uniform: the root mean square displacement if the query took the same from its whole window.
        window: the longer side of the window.
    """

    level: int
    mean: Tensor
    square: Tensor
    uniform: float
    window: int

    @property
    def by_group(self) -> Tensor:
        """`[S]`, root mean square displacements."""
        return self.square.sqrt()

    @property
    def overall(self) -> float:
        """The root mean square displacement over all groups."""
        return self.square.mean().sqrt().item()


def extent(view: GateView, level: int = 0, stride: int = 1) -> Extent:
    """The extent of the gate of the middle token, whose window lies around it: no border distorts it.

    A displacement `delta` weighs `|P|`, divided by its sum over the window. It is counted from the query and
    not from the pattern's own centre, so a pattern that looks far aside reaches far. A gate that only
    takes the query itself, or nothing at all, has extent 0. This is the mean attention distance of
    Dosovitskiy et al. (ICLR 2021, fig. 7) with the root mean square for the mean, because squares add up.
    """
    weights = view.patterns().abs().double()  # [S, h, w]
    weights = weights / weights.sum((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    steps = stride * view.displacements().double()
    square = steps.square().sum(-1)  # [h, w]
    return Extent(
        level,
        torch.einsum("shw,hwd->sd", weights, steps),
        (weights * square).sum((1, 2)),
        square.mean().sqrt().item(),
        stride * max(view.window),
    )


def extents(levels: Sequence[LevelView]) -> list[Extent]:
    """Of every gate, in the order of their depth."""
    return [extent(gate, level.number, level.stride) for level in levels for gate in level.gates]


def cumulated(extents: Sequence[Extent]) -> list[float]:
    """The root mean square displacement of a path through all gates up to each depth, in pixels.

    A path takes one step in every gate, in a group drawn at random, with the chances of that group's
    pattern. Steps are independent, so their means add, and their variances add. Residual connections,
    which skip steps, and the convolutions of stem and downsampling are left out. Every step starts in the
    middle of a window: windows that neither overlap nor move keep a real path inside.
    """
    mean, variance, out = torch.zeros(2, dtype=torch.float64), 0.0, []
    for step in extents:
        here = step.mean.mean(0)
        mean = mean + here
        variance += (step.square.mean() - here.square().sum()).item()
        out.append((mean.square().sum().item() + max(0.0, variance)) ** 0.5)
    return out
