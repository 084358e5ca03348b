"""The demo's figures: what a gate attends to, its bias, the training curves, predictions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .panels import Cell, Panel, draw_cell, draw_sheet
from .style import BLUE, MUTED, ORANGE, frame, grid, heading, new_figure
from .views import GateView, History, Predictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_patterns(before: GateView, after: GateView, path: Path) -> None:
    """`patterns.png`: the pattern of every group, before and after training."""
    title = "Where the middle token of a window looks, group by group"
    draw_sheet(path, title, "", [_pattern_cell(before, after, after.groups)], width=math.inf)


def draw_bias(before: GateView, after: GateView, path: Path) -> None:
    """`bias.png`: the bias of every token of the window, before and after training."""
    first = "before training" if before.bias.any() else "before training: zero"
    panels = [Panel(before.bias, first), Panel(after.bias, "after training")]
    cell = Cell([panels], signed=True, bar="added to the mixed tokens", side=2.8)
    draw_sheet(path, "The bias b, one number per token of the window", "", [cell])


def draw_training(history: History, path: Path) -> None:
    """`training.png`: loss and accuracy by epoch."""
    with new_figure(path, (9.0, 3.4)) as figure:
        place = {"left": 0.06, "right": 0.98, "top": 0.88, "bottom": 0.15, "wspace": 0.18}
        losses, accuracy = figure.subplots(1, 2, gridspec_kw=place)
        _losses(losses, history)
        _accuracy(accuracy, history)


def draw_predictions(predictions: Predictions, path: Path) -> None:
    """`predictions.png`: the two hardest test images, then one of every class."""
    chosen = predictions.hardest()[:2] + predictions.typical()
    columns = (len(chosen) + 1) // 2
    with new_figure(path, (1.5 * columns, 4.2)) as figure:
        heading(figure, "Unseen digits: the two hardest, then one of each class")
        place = {"left": 0.02, "right": 0.98, "top": 0.82, "bottom": 0.02, "wspace": 0.12, "hspace": 0.25}
        _predictions(figure.subplots(2, columns, gridspec_kw=place).ravel(), predictions, chosen)


def draw_summary(
    before: GateView, after: GateView, history: History, predictions: Predictions, path: Path
) -> None:
    """`summary.png`: all of it on one wide page."""
    left, right = 0.03, 0.975
    share, count = predictions.accuracy, len(predictions.labels)
    with new_figure(path, (12.0, 7.1), dpi=100) as figure:
        figure.text(left, 0.94, "PosMLP learns where to look", size=18, weight="bold")
        story = (
            f"posmlp_nano on handwritten digits, {share:.1%} of {count} unseen images right. How much the "
            "token in the orange frame takes from\neach place of its window, in every group of channels: "
            "near and round at first, then whatever the task asks for."
        )
        figure.text(left, 0.915, story, size=10.5, color=MUTED, va="top", linespacing=1.5)
        draw_cell(figure, _pattern_cell(before, after, min(8, after.groups), side=1.2), left=0.36, top=1.22)
        bias = Cell([[Panel(after.bias)]], "Bias b after training", signed=True, side=2.05)
        draw_cell(figure, bias, left=0.36, top=4.25)
        low = {"top": 0.365, "bottom": 0.075}
        _accuracy(figure.add_gridspec(1, 1, left=0.325, right=0.61, **low).subplots(), history)
        figure.text(0.66, 0.378, "Unseen digits, the hardest included", size=11, weight="bold")
        cells = figure.add_gridspec(
            2, 5, left=0.66, right=right, wspace=0.12, hspace=0.05, top=0.35, bottom=0.05
        ).subplots()
        _predictions(cells.ravel(), predictions, predictions.one_of_each())


def _pattern_cell(before: GateView, after: GateView, groups: int, side: float = 1.1) -> Cell:
    """The middle token's patterns in two rows, before and after training."""
    first, last = (list(view.patterns()[:groups]) for view in (before, after))
    rows = [
        [Panel(values, f"group {i}", before.middle) for i, values in enumerate(first, 1)],
        [Panel(values, mark=after.middle) for values in last],
    ]
    return Cell(rows, labels=("before", "after"), bar="weight in a row of P", side=side)


def _losses(axis: Axes, history: History) -> None:
    epochs = range(1, len(history.train_loss) + 1)
    axis.plot(epochs, history.train_loss, color=MUTED, label="training, distorted images")
    axis.plot(epochs, history.test_loss, color=BLUE, label="test")
    axis.set(title="Loss", xlabel="epoch", ylim=(0, None))
    axis.legend(loc="upper right")
    grid(axis)


def _accuracy(axis: Axes, history: History) -> None:
    values = [100 * value for value in history.test_accuracy]
    axis.plot(range(1, len(values) + 1), values, color=BLUE)
    axis.plot(len(values), values[-1], "o", color=ORANGE, clip_on=False, zorder=5)
    axis.annotate(
        f"{values[-1]:.1f} %", (len(values), values[-1]), (0, -16), textcoords="offset points",
        color=ORANGE, ha="right", weight="bold",
    )  # fmt: skip
    axis.set(title="Test accuracy, %", xlabel="epoch", ylim=(0, 102))
    grid(axis)


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
        frame(axis)
