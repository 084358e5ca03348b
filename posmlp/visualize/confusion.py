"""The confusion picture of `posmlp eval`: what each class is taken for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..data import optional
from .style import (
    INK,
    MARGIN,
    WEIGHTS,
    add_axes,
    colour_bar,
    colours,
    frame,
    heading,
    heading_height,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 40  # classes whose names and counts can be read


def shares(confusion: Tensor) -> Tensor:
    """`[classes, classes]` counts, class by prediction -> shares of a class: rows sum to 1, or are 0."""
    return confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)


def draw_confusion(confusion: Tensor, names: Sequence[str], path: str | Path) -> None:
    """Draw the counts `[classes, classes]`, class by prediction, of the classes that have images.

    Raises: `ValueError` for an ending that no picture has, `OSError` where the file cannot be written.
    """
    present = (confusion.sum(0) + confusion.sum(1)).nonzero().squeeze(1)
    confusion = confusion[present][:, present]
    names = [names[index] for index in present.tolist()]
    count = len(names)
    few = count <= NAMED
    side = max(3.6, 0.42 * count) if few else 8.0
    room = min(2.6, 0.25 + 0.085 * max(map(len, names))) if few else 0.4  # for names
    note = "A row a class, by what it was taken for; colours are shares of the row" + (
        ", numbers images." if few else "."
    )
    width = MARGIN + 0.3 + room + side + 0.85
    top = heading_height(note, width) + 0.1
    with new_figure(Path(path), (width, top + side + room + 0.45)) as figure:
        heading(figure, "Confusion", note)
        left = MARGIN + 0.3 + room
        axis = add_axes(figure, left, top, side, side)
        scale = optional("matplotlib.colors").PowerNorm(0.5, vmin=0, vmax=1)
        image = axis.imshow(shares(confusion).numpy(), cmap=colours(WEIGHTS), norm=scale)
        frame(axis)
        axis.set_xlabel("taken for", labelpad=6)
        axis.set_ylabel("class", labelpad=6)
        if few:
            _label(axis, confusion, names)
        bar = add_axes(figure, left + side + 0.15, top, 0.12, side)
        colour_bar(figure, image, bar, "")


def _label(axis: Axes, confusion: Tensor, names: Sequence[str]) -> None:
    """The names along both sides, and the counts in the cells."""
    places = range(len(names))
    axis.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0)
    axis.set_yticks(places, names)
    axis.tick_params(length=0)
    share = shares(confusion)
    for row, column in confusion.nonzero().tolist():
        colour = "white" if share[row, column] > 0.3 else INK
        axis.text(
            column, row, str(int(confusion[row, column])), ha="center", va="center", size=8, color=colour
        )
