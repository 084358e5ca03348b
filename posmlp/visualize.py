"""The demo's figures: what a gate attends to, its bias, the training curves, predictions.

matplotlib is imported only when a figure is drawn, and never its window system.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posmlp_kernels import PosSGU, mixing_matrix

from .data import optional
from .training import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, BLUE, ORANGE = "#1f2d3a", "#6b7885", "#1f6f9f", "#d9692a"
_WEIGHTS = ("#f6f7f5", "#a9cfe0", "#3f8fb5", "#1b5579", "#0a2740")  # a colour map from nothing to much
_SIGNED = ("#0f4c75", "#7fb2cf", "#f6f7f5", "#eeb089", "#a8441a")  # blue for negative, orange for positive
_STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c3cad1",
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class GateView:
    """A gate at one moment: its mixing matrix `[S, h, w, h, w]` (query, key) and bias `[h, w]`."""

    mixing: Tensor
    bias: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, gate: PosSGU) -> GateView:
        """Raises: `ValueError` for a gate without bias or with a window that is not two-dimensional."""
        if gate.bias is None or len(gate.window) != 2:
            raise ValueError("gate must have a bias and a two-dimensional window to be drawn")
        matrix = mixing_matrix(gate.relative_table(), gate.window, gate.softmax, gate.matrix)  # [S, N, N]
        return cls(matrix.view(-1, *gate.window, *gate.window).clone(), gate.bias.view(gate.window).clone())

    @property
    def query(self) -> tuple[int, int]:
        """The token in the middle of the window."""
        return self.bias.shape[0] // 2, self.bias.shape[1] // 2

    @property
    def patterns(self) -> Tensor:
        """`[S, h, w]`: how much the middle token takes from each token of the window."""
        row, column = self.query
        return self.mixing[:, row, column]


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


def draw_patterns(before: GateView, after: GateView, path: Path) -> None:
    """`patterns.png`: the pattern of every group, before and after training."""
    groups = len(after.patterns)
    with _figure(path, (1.25 * groups + 1.6, 3.3)) as figure:
        _heading(figure, "Where the middle token of a window looks, group by group")
        place = {"left": 0.07, "right": 0.93, "top": 0.78, "bottom": 0.04}
        _pattern_rows(figure, before, after, groups, place)


def draw_bias(before: GateView, after: GateView, path: Path) -> None:
    """`bias.png`: the bias of every token of the window, before and after training."""
    with _figure(path, (7.2, 3.8)) as figure:
        _heading(figure, "The bias b, one number per token of the window")
        place = {"left": 0.04, "right": 0.88, "top": 0.78, "bottom": 0.04, "wspace": 0.1}
        left, right, bar = figure.subplots(1, 3, width_ratios=[1, 1, 0.06], gridspec_kw=place)
        limit = max(before.bias.abs().max().item(), after.bias.abs().max().item(), 1e-6)
        _bias(left, before, limit, "before training" if before.bias.any() else "before training: zero")
        _colour_bar(figure, _bias(right, after, limit, "after training"), bar, "added to the mixed tokens")


def draw_training(history: History, path: Path) -> None:
    """`training.png`: loss and accuracy by epoch."""
    with _figure(path, (9.0, 3.4)) as figure:
        place = {"left": 0.06, "right": 0.98, "top": 0.88, "bottom": 0.15, "wspace": 0.18}
        losses, accuracy = figure.subplots(1, 2, gridspec_kw=place)
        _losses(losses, history)
        _accuracy(accuracy, history)


def draw_predictions(predictions: Predictions, path: Path) -> None:
    """`predictions.png`: the two hardest test images, then one of every class."""
    chosen = predictions.hardest()[:2] + predictions.typical()
    columns = (len(chosen) + 1) // 2
    with _figure(path, (1.5 * columns, 4.2)) as figure:
        _heading(figure, "Unseen digits: the two hardest, then one of each class")
        place = {"left": 0.02, "right": 0.98, "top": 0.82, "bottom": 0.02, "wspace": 0.12, "hspace": 0.25}
        _predictions(figure.subplots(2, columns, gridspec_kw=place).ravel(), predictions, chosen)


def draw_summary(
    before: GateView, after: GateView, history: History, predictions: Predictions, path: Path
) -> None:
    """`summary.png`: all of it on one wide page."""
    groups, left, right = min(8, len(after.patterns)), 0.03, 0.975
    share, count = predictions.accuracy, len(predictions.labels)
    with _figure(path, (12.0, 7.1), dpi=100) as figure:
        figure.text(left, 0.94, "PosMLP learns where to look", size=18, weight="bold")
        story = (
            f"posmlp_nano on handwritten digits, {share:.1%} of {count} unseen images right. How much the "
            "token in the orange frame takes from\neach place of its window, in every group of channels: "
            "near and round at first, then whatever the task asks for."
        )
        figure.text(left, 0.915, story, size=10.5, color=MUTED, va="top", linespacing=1.5)
        place = {"left": 0.06, "right": 0.94, "top": 0.8, "bottom": 0.455}
        _pattern_rows(figure, before, after, groups, place)

        low = {"top": 0.365, "bottom": 0.075}
        place = {"left": left, "right": 0.235, "wspace": 0.08, **low}
        square, bar = figure.add_gridspec(1, 2, width_ratios=[1, 0.06], **place).subplots()
        limit = max(after.bias.abs().max().item(), 1e-6)
        _colour_bar(figure, _bias(square, after, limit, "Bias b after training"), bar, "")
        _accuracy(figure.add_gridspec(1, 1, left=0.325, right=0.61, **low).subplots(), history)
        figure.text(0.66, 0.378, "Unseen digits, the hardest included", size=11, weight="bold")
        cells = figure.add_gridspec(
            2, 5, left=0.66, right=right, wspace=0.12, hspace=0.05, top=0.35, bottom=0.05
        ).subplots()
        _predictions(cells.ravel(), predictions, predictions.one_of_each())


@contextmanager
def _figure(path: Path, size: tuple[float, float], dpi: int = 120) -> Iterator[Figure]:
    """A figure in the house's style, written when the block ends."""
    with optional("matplotlib").rc_context(_STYLE):
        figure = optional("matplotlib.figure").Figure(figsize=size, dpi=dpi, facecolor="white")
        yield figure
        figure.savefig(path)


def _heading(figure: Figure, text: str) -> None:
    _, height = figure.get_size_inches()
    figure.text(0.02, 1 - 0.12 / height, text, size=13, weight="bold", va="top")


def _pattern_rows(
    figure: Figure, before: GateView, after: GateView, groups: int, place: dict[str, float]
) -> None:
    """Two rows of panels and their colour bar. Colours follow a weight's root, so that faint ones show."""
    widths = [1.0] * groups + [0.09]
    grid = figure.add_gridspec(2, groups + 1, width_ratios=widths, wspace=0.1, hspace=0.1, **place)
    limit = max(before.patterns[:groups].max().item(), after.patterns[:groups].max().item())
    scale = optional("matplotlib.colors").PowerNorm(0.5, vmin=0, vmax=limit)
    for row, (view, name) in enumerate(((before, "before"), (after, "after"))):
        for group in range(groups):
            axis = figure.add_subplot(grid[row, group])
            image = axis.imshow(view.patterns[group].numpy(), cmap=_colours(_WEIGHTS), norm=scale)
            _frame(axis, view.query)
            if row == 0:
                axis.set_title(
                    f"group {group + 1}", size=9.5, color=MUTED, loc="center", weight="normal", pad=5
                )
            if group == 0:
                axis.set_ylabel(name, size=11, labelpad=7, weight="bold")
    _colour_bar(figure, image, figure.add_subplot(grid[:, -1]), "weight in a row of P")


def _bias(axis: Axes, view: GateView, limit: float, title: str) -> Any:
    image = axis.imshow(view.bias.numpy(), cmap=_colours(_SIGNED), vmin=-limit, vmax=limit)
    axis.set_title(title)
    axis.set_anchor("W")
    _frame(axis)
    return image


def _losses(axis: Axes, history: History) -> None:
    epochs = range(1, len(history.train_loss) + 1)
    axis.plot(epochs, history.train_loss, color=MUTED, label="training, distorted images")
    axis.plot(epochs, history.test_loss, color=BLUE, label="test")
    axis.set(title="Loss", xlabel="epoch", ylim=(0, None))
    axis.legend(loc="upper right")
    _grid(axis)


def _accuracy(axis: Axes, history: History) -> None:
    values = [100 * value for value in history.test_accuracy]
    axis.plot(range(1, len(values) + 1), values, color=BLUE)
    axis.plot(len(values), values[-1], "o", color=ORANGE, clip_on=False, zorder=5)
    axis.annotate(
        f"{values[-1]:.1f} %", (len(values), values[-1]), (0, -16), textcoords="offset points",
        color=ORANGE, ha="right", weight="bold",
    )  # fmt: skip
    axis.set(title="Test accuracy, %", xlabel="epoch", ylim=(0, 102))
    _grid(axis)


def _predictions(axes: Iterable[Axes], predictions: Predictions, chosen: Sequence[int]) -> None:
    """An image, what it was taken for, and how surely; in orange where that is wrong."""
    for axis, index in itertools.zip_longest(axes, chosen):
        if axis is None:
            return
        if index is None:
            axis.set_axis_off()
            continue
        label, guess = int(predictions.labels[index]), int(predictions.predicted[index])
        axis.imshow(predictions.pixels[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        text = f"{guess}" if guess == label else f"{guess}, is {label}"
        text += f"  {predictions.probabilities[index, guess]:.0%}"
        colour = BLUE if guess == label else ORANGE
        axis.set_title(text, size=9.5, pad=4, color=colour, loc="center", weight="normal")
        _frame(axis)


def _frame(axis: Axes, query: Sequence[int] | None = None) -> None:
    """No ticks, all four sides, and an orange square around the query token."""
    axis.set(xticks=[], yticks=[])
    axis.spines[["top", "right"]].set_visible(True)
    if query is not None:
        row, column = query
        box = optional("matplotlib.patches").Rectangle(
            (column - 0.5, row - 0.5), 1, 1, fill=False, color=ORANGE, linewidth=1.6
        )
        axis.add_patch(box)


def _grid(axis: Axes) -> None:
    axis.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _colour_bar(figure: Figure, image: Any, axis: Axes, label: str) -> None:
    bar = figure.colorbar(image, cax=axis)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(label, color=MUTED, size=9)


def _colours(stops: Sequence[str]) -> Any:
    return optional("matplotlib.colors").LinearSegmentedColormap.from_list("posmlp", stops)
