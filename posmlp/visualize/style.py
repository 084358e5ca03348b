"""The look that all figures share: colours, type, frames and colour bars.

matplotlib is imported only when a figure is drawn, and never its window system.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, BLUE, ORANGE, LINE = "#1f2d3a", "#6b7885", "#1f6f9f", "#d9692a", "#c3cad1"
WEIGHTS = ("#f6f7f5", "#a9cfe0", "#3f8fb5", "#1b5579", "#0a2740")  # a colour map from nothing to much
SIGNED = ("#0f4c75", "#7fb2cf", "#f6f7f5", "#eeb089", "#a8441a")  # blue for negative, orange for positive
DPI = 160
MARGIN = 0.2  # inches around a figure
_STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
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


@contextmanager
def new_figure(path: Path, size: tuple[float, float], dpi: int = DPI) -> Iterator[Figure]:
    """A figure in the house's style, `size` in inches, written when the block ends."""
    with optional("matplotlib").rc_context(_STYLE):
        figure = optional("matplotlib.figure").Figure(figsize=size, dpi=dpi, facecolor="white")
        yield figure
        figure.savefig(path)


def colours(stops: Sequence[str]) -> Any:
    """The colour map that runs through `stops`."""
    return optional("matplotlib.colors").LinearSegmentedColormap.from_list("posmlp", stops)


def wrap(note: str, width: float) -> str:
    """A note in lines that fit into `width` inches of a figure."""
    return textwrap.fill(note, max(20, int(width * 14)))


def heading_height(note: str, width: float) -> float:
    """Inches that `heading` takes at the top of a figure."""
    lines = wrap(note, width - 2 * MARGIN).count("\n") + 1 if note else 0
    return MARGIN + 0.32 + 0.19 * lines


def heading(figure: Figure, text: str, note: str = "") -> None:
    """A title at the top left, and below it a smaller note on how to read the figure."""
    width, height = figure.get_size_inches()
    left = MARGIN / width
    figure.text(left, 1 - 0.15 / height, text, size=13, weight="bold", va="top")
    lines = wrap(note, width - 2 * MARGIN)
    figure.text(left, 1 - 0.44 / height, lines, size=9.5, color=MUTED, va="top", linespacing=1.4)


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes whose place is given in inches from the figure's top left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def frame(axis: Axes, mark: Sequence[int] | None = None) -> None:
    """No ticks, all four sides, and an orange square around the marked cell of an image."""
    axis.set(xticks=[], yticks=[])
    axis.spines[["top", "right"]].set_visible(True)
    if mark is not None:
        row, column = mark
        box = optional("matplotlib.patches").Rectangle(
            (column - 0.5, row - 0.5), 1, 1, fill=False, color=ORANGE, linewidth=1.6
        )
        axis.add_patch(box)


def grid(axis: Axes) -> None:
    """Faint horizontal lines, and whole numbers below."""
    axis.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def colour_bar(figure: Figure, image: Any, axis: Axes, label: str) -> None:
    """The scale of an image's colours, in axes of its own."""
    bar = figure.colorbar(image, cax=axis)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(label, color=MUTED, size=9)
