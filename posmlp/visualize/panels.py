"""Rows of small images that share a scale, and sheets of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..data import optional
from .style import (
    INK,
    MARGIN,
    MUTED,
    SIGNED,
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
    from matplotlib.figure import Figure

# Inches: between panels, a line of text above them, a row's name, and a colour bar with its numbers.
GAP, TITLE, CELL_TITLE, LABEL, BAR, BAR_TEXT = 0.1, 0.2, 0.25, 0.32, 0.1, 0.75
TALLEST_BAR = 4.0


@dataclass(frozen=True)
class Panel:
    """A small image `[h, w]` with a title, a marked cell, and curves over it.

    Args:
        center: `[2]`, a dot, in (row, col); one outside the image becomes a ring on its edge.
        curves: solid, then dashed ones, `[points, 2]` each.
    """

    values: Tensor
    title: str = ""
    mark: tuple[int, int] | None = None
    center: Tensor | None = None
    curves: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Cell:
    """Rows of panels on one scale, with a colour bar.

    Args:
        rows: all equally long, but for the last.
        labels: a name a row, or none.
        signed: colours for both signs; otherwise from 0 up, by a value's root, so that faint ones show.
        side: a panel's width in inches.
        bar: what the colours mean.
    """

    rows: Sequence[Sequence[Panel]]
    title: str = ""
    labels: Sequence[str] = ()
    signed: bool = False
    bar: str = ""
    side: float = 1.0

    @property
    def left(self) -> float:
        """Inches to the left of the panels."""
        return LABEL if self.labels else 0.0

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        columns = len(self.rows[0])
        width = self.left + columns * (self.side + GAP) + BAR + BAR_TEXT
        return width, self._top + sum(self.heights) + GAP * (len(self.rows) - 1)

    @property
    def panel_height(self) -> float:
        """Inches: less than a panel's width for flat windows, but enough for a row's name."""
        height, width = self.rows[0][0].values.shape
        return self.side * min(1.0, max(0.5, height / width))

    @property
    def heights(self) -> list[float]:
        """Of each row, with the titles of its panels."""
        return [self.panel_height + TITLE * any(panel.title for panel in row) for row in self.rows]

    @property
    def _top(self) -> float:
        return CELL_TITLE if self.title else 0.0

    def places(self, left: float, top: float) -> Iterator[tuple[Panel, float, float]]:
        """Every panel and its top left corner, for a cell at a place of the figure."""
        below = top + self._top
        for row, height in zip(self.rows, self.heights, strict=True):
            below += height
            for column, panel in enumerate(row):
                yield panel, left + self.left + column * (self.side + GAP), below - self.panel_height
            below += GAP


def draw_sheet(path: Path, title: str, note: str, cells: Sequence[Cell], width: float = 10.0) -> None:
    """A figure of cells, from left to right as long as `width` inches hold them."""
    lines = _flow(cells, width - 2 * MARGIN)
    width = max(5.5, max(sum(cell.size[0] for cell in line) for line in lines) + 2 * MARGIN)
    top = heading_height(note, width) + 0.05
    space = 0.25  # between lines
    height = top + sum(max(cell.size[1] for cell in line) + space for line in lines) - space + MARGIN
    with new_figure(path, (width, height)) as figure:
        heading(figure, title, note)
        for line in lines:
            left = MARGIN
            for cell in line:
                draw_cell(figure, cell, left, top)
                left += cell.size[0]
            top += max(cell.size[1] for cell in line) + space


def draw_cell(figure: Figure, cell: Cell, left: float, top: float) -> None:
    """A cell whose top left corner is given in inches from the figure's."""
    scale = _scale(cell)
    places = list(cell.places(left, top))
    if cell.title:
        width, height = figure.get_size_inches()
        figure.text(
            (left + cell.left) / width,
            1 - (top + 0.02) / height,
            cell.title,
            size=11,
            weight="bold",
            va="top",
        )
    for panel, x, y in places:
        axis = add_axes(figure, x, y, cell.side, cell.panel_height)
        image = _draw_panel(axis, panel, scale)
    for row, label in zip(cell.rows, cell.labels, strict=False):
        y = next(y for panel, _, y in places if panel is row[0])
        _row_name(figure, label, left + 0.12, y + cell.panel_height / 2)
    first, last = places[0][2], places[-1][2] + cell.panel_height
    bar = add_axes(figure, left + cell.size[0] - BAR - BAR_TEXT, first, BAR, min(last - first, TALLEST_BAR))
    colour_bar(figure, image, bar, cell.bar)
    if cell.signed:
        bar.yaxis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(4, symmetric=True))
    bar.yaxis.set_major_formatter(
        optional("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:.2g}")
    )


def _scale(cell: Cell) -> dict[str, Any]:
    """How `imshow` colours the cell's values."""
    limit = max(panel.values.abs().max().item() for row in cell.rows for panel in row) or 1.0
    if cell.signed:
        return {"cmap": colours(SIGNED), "vmin": -limit, "vmax": limit}
    norm = optional("matplotlib.colors").PowerNorm(0.5, vmin=0, vmax=limit)
    return {"cmap": colours(WEIGHTS), "norm": norm}


def _draw_panel(axis: Axes, panel: Panel, scale: dict[str, Any]) -> Any:
    image = axis.imshow(panel.values.numpy(), interpolation="nearest", **scale)
    axis.set_title(panel.title, size=9, color=MUTED, loc="center", weight="normal", pad=4)
    frame(axis, panel.mark)
    height, width = panel.values.shape
    halo = [optional("matplotlib.patheffects").withStroke(linewidth=2.4, foreground="white")]
    for curve, style in zip(panel.curves, ("-", (0, (3, 2))), strict=False):
        axis.plot(curve[:, 1], curve[:, 0], color=INK, linewidth=1.0, linestyle=style, path_effects=halo)
    if panel.center is not None:
        row, column = panel.center.tolist()
        inside = -0.5 <= row <= height - 0.5 and -0.5 <= column <= width - 0.5
        row, column = min(max(row, -0.5), height - 0.5), min(max(column, -0.5), width - 0.5)
        axis.plot(
            column, row, "o", markersize=4, color=INK, markerfacecolor=INK if inside else "white",
            clip_on=False, zorder=6, path_effects=halo,
        )  # fmt: skip
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return image


def _row_name(figure: Figure, text: str, x: float, y: float) -> None:
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, rotation=90, ha="center", va="center", weight="bold")


def _flow(cells: Sequence[Cell], width: float) -> list[list[Cell]]:
    """Lines of cells, each as full as `width` inches allow."""
    lines: list[list[Cell]] = []
    for cell in cells:
        if not lines or sum(other.size[0] for other in [*lines[-1], cell]) > width:
            lines.append([])
        lines[-1].append(cell)
    return lines
