"""What the figures show, as tensors: gates, training curves, predictions. No figure is drawn here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posmlp_kernels import PosSGU

if TYPE_CHECKING:
    from ..model import PosMLP

_FLATTEST = (
    1e-12  # least eigenvalue of an inverse covariance that is drawn; its ellipse is a million tokens long
)


@dataclass(frozen=True)
class GateView:
    """What a gate's positions say at one moment, copied to the CPU.

    Args:
        window: `(h, w)`.
        softmax: whether the rows of the mixing matrix are normalised.
        table: the relative table `[S, 2h-1, 2w-1]`, or None.
        matrix: the free matrix `[N, N]`, or None.
        bias: `[h, w]`, or None.
        center: `[S, 2]`, where a quadratic encoding's Gaussians lie relative to the query; None for others.
        precision: `[S, 2, 2]`, their inverse covariances; None for others.
    """

    window: tuple[int, int]
    softmax: bool
    table: Tensor | None
    matrix: Tensor | None
    bias: Tensor | None
    center: Tensor | None = None
    precision: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, gate: PosSGU) -> GateView:
        """Raises: `ValueError` for a window without two dimensions, or parameters that are not finite."""
        if len(gate.window) != 2:
            raise ValueError(f"window must be two-dimensional to be drawn, got {list(gate.window)}")
        for name, value in gate.named_parameters():
            if not value.isfinite().all():
                raise ValueError(f"{name} of a gate must be finite to be drawn, got NaN or infinity")
        center, precision = _quadratic(gate)
        parts = (gate.relative_table(), gate.matrix, gate.bias, center, precision)
        table, matrix, bias, center, precision = (
            None if part is None else part.detach().float().cpu().clone() for part in parts
        )
        bias = None if bias is None else bias.view(gate.window)
        return cls(gate.window, gate.softmax, table, matrix, bias, center, precision)

    @property
    def groups(self) -> int:
        """How many patterns there are: those of the free matrix alone are one."""
        return 1 if self.table is None else len(self.table)

    @property
    def middle(self) -> tuple[int, int]:
        """The token in the middle of the window."""
        return self.window[0] // 2, self.window[1] // 2

    def patterns(self, query: tuple[int, int] | None = None) -> Tensor:
        """A query's row of the mixing matrix by group: what it takes from each token, `[S, h, w]`.

        The window is whole. One that sticks out of the map has the same values where it has tokens; under a
        softmax they are then divided by their sum. Raises: `ValueError` for a query outside the window.
        """
        h, w = self.window
        row, column = self.middle if query is None else query
        if not (0 <= row < h and 0 <= column < w):
            raise ValueError(
                f"query must be a token of the {h}x{w} window, counted from 0, got {row} {column}"
            )
        logits = torch.zeros(1, h, w)
        if self.table is not None:
            logits = self.table[:, h - 1 - row : 2 * h - 1 - row, w - 1 - column : 2 * w - 1 - column]
        if self.matrix is not None:
            logits = logits + self.matrix[row * w + column].view(h, w)
        return logits.flatten(1).softmax(-1).view_as(logits) if self.softmax else logits

    def displacements(self, query: tuple[int, int] | None = None) -> Tensor:
        """`[h, w, 2]`, from a query to each token of the window, in tokens."""
        row, column = self.middle if query is None else query
        rows, columns = torch.arange(self.window[0]) - row, torch.arange(self.window[1]) - column
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).float()

    def ellipses(self, sigma: float, points: int = 73) -> Tensor:
        """`[S, points, 2]`, closed curves around the centres, relative to the query, in tokens.

        They hold the places `sigma` standard deviations away, `(p - c)^T Sigma^-1 (p - c) = sigma^2`.
        Only quadratic encodings have them.
        """
        values, axes = torch.linalg.eigh(self.precision)
        angles = torch.linspace(0, 2 * math.pi, points)
        circle = torch.stack([angles.cos(), angles.sin()])  # [2, points]
        curves = (axes * values.clamp_min(_FLATTEST).rsqrt().unsqueeze(1)) @ circle  # [S, 2, points]
        return self.center.unsqueeze(1) + sigma * curves.mT


def _quadratic(gate: PosSGU) -> tuple[Tensor | None, Tensor | None]:
    """Centre `[S, 2]` and inverse covariance `[S, 2, 2]` of a quadratic encoding's Gaussians."""
    if gate.encoding == "gqpe":
        return gate.center, gate.factor @ gate.factor.mT
    if gate.encoding == "gqpe_isotropic":  # a^2 (c . delta) - |delta|^2 / 2, its square completed
        eye = torch.eye(2, device=gate.center.device, dtype=gate.center.dtype)
        return gate.scale.square().unsqueeze(1) * gate.center, eye.expand(gate.groups, 2, 2)
    return None, None


@dataclass(frozen=True)
class LevelView:
    """A level's number, its stride (pixels between neighbouring tokens), and the gates of its blocks."""

    number: int
    stride: int
    gates: tuple[GateView, ...]

    @property
    def last(self) -> GateView:
        return self.gates[-1]


def view_levels(model: PosMLP) -> list[LevelView]:
    """All levels of a model. Raises: what `GateView.of` raises."""
    return [
        LevelView(number, info["reduction"], tuple(GateView.of(block.gate) for block in level.blocks))
        for number, (level, info) in enumerate(zip(model.levels, model.feature_info, strict=True))
    ]


@dataclass(frozen=True)
class Predictions:
    """Test images `[n, 1, H, W]`, their classes, and a model's probabilities `[n, classes]`."""

    pixels: Tensor
    labels: Tensor
    probabilities: Tensor

    @property
    def predicted(self) -> Tensor:
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        return (self.predicted == self.labels).float().mean().item()

    def hardest(self) -> list[int]:
        """All images, those with the least probability for their own class first."""
        own = self.probabilities.gather(1, self.labels.unsqueeze(1)).squeeze(1)
        return own.argsort(stable=True).tolist()

    def typical(self) -> list[int]:
        """The first image of every class."""
        return [int((self.labels == label).nonzero()[0]) for label in self.labels.unique()]

    def one_of_each(self) -> list[int]:
        """The same, but the hardest image stands for its class."""
        hardest = self.hardest()[0]
        return [hardest if self.labels[i] == self.labels[hardest] else i for i in self.typical()]


@dataclass
class History:
    """A training's course, a value per epoch; accuracies are shares."""

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]]) -> History:
        """From the log of a run, as it goes for the averaged weights, if there are any."""
        kind = "ema" if "ema_top1" in rows[0] else "val"
        columns = ("train_loss", f"{kind}_loss", f"{kind}_top1")
        train, test, accuracy = ([row[name] for row in rows] for name in columns)
        return cls(train, test, [percent / 100 for percent in accuracy])
