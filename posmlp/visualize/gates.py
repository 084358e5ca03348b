"""Figures of what gates hold: patterns of a query token, all groups of a level, bias maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .page import Plate
from .panels import Cell, Panel, draw_sheet
from .views import GateView, LevelView

_COLUMNS = 8
MOST_GROUPS = 64  # in a figure of all groups
_QUERIES = 4  # along each side of a window, where the patterns of many queries are shown

Query = tuple[int, int] | None


class _Texts(NamedTuple):
    """What a figure of one level says: its title, the note below it, its caption, what the colours mean."""

    title: str
    note: str
    caption: str
    bar: str


_GAUSSIANS = _Texts(
    "patterns and their Gaussians",
    "Frame: the query. Dot: the centre; ring: it lies beyond. Solid, dashed: 1 and 2 standard deviations.",
    "Every channel group's pattern for the query (orange frame), with the Gaussian that it comes from: the "
    "dot is the centre, relative to the query, and a ring on the edge stands for a centre beyond the window; "
    "solid and dashed ellipses lie one and two standard deviations away (covariance: the inverse of M M^T). "
    "A pattern is this Gaussian at the tokens of the window, divided by its sum.",
    "entry of P",
)
_TABLES = _Texts(
    "learned relative table",
    "The learned value of every displacement from the query (frame) to a key.",
    "The learned relative table of every group: its value for each displacement from the query, in the "
    "middle (orange frame), to a key. The pattern of a query is the part of it that its window covers.",
    "entry of R",
)
_FREE_ROWS = _Texts(
    "patterns of many queries",
    "A free matrix has a pattern of its own for every query (framed).",
    "What queries all over the window (orange frames) take from it, in the first group. With a free matrix "
    "nothing ties one query's pattern to the next one's, as a relative encoding alone would.",
    "entry of P",
)


def draw_query_patterns(
    levels: Sequence[LevelView],
    before: Sequence[LevelView],
    folder: Path,
    groups: int = 8,
    query: Query = None,
) -> Plate:
    """`patterns.png`: what a query takes from its window, by level and group, at two moments.

    Args:
        before: the same levels of other weights, or none; then the first block stands beside the last.
        groups: the first ones to show.
        query: a token, or None for the middle of each window.
    """
    cells = []
    for level, earlier in zip_longest(levels, before):
        moments = _moments(level, earlier)
        panels = [_patterns(view, query)[:groups] for _, view in moments]
        cells.append(_pattern_cell(level, [name for name, _ in moments], panels))
    signed = cells[0].signed
    note = "The query is framed. Colours show the entries of its row of P, on one scale a level" + (
        "." if signed else ", by their root, so that faint ones show."
    )
    draw_sheet(folder / "patterns.png", "What a query token takes from its window", note, cells)
    where = "the token in the middle" if query is None else f"token {query[0]}, {query[1]}"
    return Plate(
        folder / "patterns.png",
        "Aggregation patterns of a query token",
        f"How much {where} of a window (orange frame) takes from each token of that window, in every channel "
        f"group: a row of the mixing matrix P. {_compared(bool(before))} {_colours(signed)} "
        "The windows are whole: where one sticks out of the map, the tokens outside are left out"
        + ("." if signed else ", and the rest is divided by its sum."),
        f"Patterns of a query token in levels {_numbers(levels)}, a row per moment and a panel per group",
    )


def draw_groups(level: LevelView, folder: Path, query: Query = None) -> Plate:
    """`groups_level0.png`: every group of the last block's gate, up to `MOST_GROUPS`.

    Quadratic encodings show the query's patterns with centre and covariance, learned tables the table itself.
    """
    view, path = level.last, folder / f"groups_level{level.number}.png"
    gaussian = view.center is not None
    panels = (_gaussians(view, query) if gaussian else _tables(view))[:MOST_GROUPS]
    columns = _COLUMNS if len(panels) > _COLUMNS else _COLUMNS // 2
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    count = "" if view.groups == 1 else f", {_count(len(panels), view.groups)}"
    return _grid(level, rows, _GAUSSIANS if gaussian else _TABLES, count, path)


def draw_free_rows(level: LevelView, folder: Path) -> Plate:
    """`queries_level0.png`: where there is a free matrix, the patterns of queries all over the window."""
    down, across = (_spread(side) for side in level.last.window)
    queries = [[(row, column) for column in across] for row in down]
    rows = [
        [Panel(level.last.patterns(query)[0], "query {}, {}".format(*query), query) for query in line]
        for line in queries
    ]
    return _grid(level, rows, _FREE_ROWS, "", folder / f"queries_level{level.number}.png")


def _grid(level: LevelView, rows: Sequence[Sequence[Panel]], texts: _Texts, count: str, path: Path) -> Plate:
    """A figure of one level's last gate."""
    signed, columns = not level.last.softmax, len(rows[0])
    side = 3.0 if columns == 1 else 1.9 if columns <= _COLUMNS // 2 else 1.1
    cell = Cell(rows, signed=signed, bar=texts.bar, side=side)
    title = f"Level {level.number}, block {len(level.gates)}: {texts.title}{count}"
    draw_sheet(path, title, texts.note, [cell], width=11.0)
    about = f"Level {level.number}: {texts.title}"
    alt = f"{about}, {sum(map(len, rows))} panels"
    return Plate(path, about, f"{texts.caption} {_colours(signed)}", alt)


def draw_bias_maps(levels: Sequence[LevelView], before: Sequence[LevelView], folder: Path) -> Plate | None:
    """`bias.png`: the bias of every token of the window, by level, at two moments; None without biases."""
    cells = []
    for level, earlier in zip_longest(levels, before):
        moments = [(name, view) for name, view in _moments(level, earlier) if view.bias is not None]
        if moments:
            panels = [Panel(view.bias, name) for name, view in moments]
            cells.append(Cell([panels], f"Level {level.number}, {_window(level)}", signed=True, side=1.9))
    if not cells:
        return None
    note = "One number per token of the window, shared by channels and groups; one scale a level."
    draw_sheet(folder / "bias.png", "The bias b of the gates", note, cells, width=10.6)
    return Plate(
        folder / "bias.png",
        "Bias maps by level",
        "The bias b of every token of a window, added to the mixed tokens before they gate: "
        "Z = (P X1 + b) * X2. It is one number per place, the same in all channels and all windows. "
        f"{_compared(bool(before))} Orange is positive, blue negative.",
        f"Maps of the gates' biases in levels {_numbers(levels)}",
    )


def _moments(level: LevelView, before: LevelView | None) -> list[tuple[str, GateView]]:
    """What a level's figure sets side by side: before and after, or the first block and the last."""
    if before is not None:
        return [("before", before.last), ("after", level.last)]
    last = (f"block {len(level.gates)}", level.last)
    return [last] if len(level.gates) == 1 else [("block 1", level.gates[0]), last]


def _pattern_cell(level: LevelView, names: Sequence[str], panels: Sequence[Sequence[Panel]]) -> Cell:
    view, shown = level.last, len(panels[0])
    title = f"Level {level.number}, {_window(level)}"
    style = {"signed": not view.softmax, "bar": "entry of P"}
    if view.groups == 1:  # both moments in one row
        row = [Panel(row[0].values, name, row[0].mark) for name, row in zip(names, panels, strict=True)]
        return Cell([row], title, side=1.9, **style)
    rows, labels = [], []
    for start in range(0, shown, _COLUMNS):
        for i, (name, row) in enumerate(zip(names, panels, strict=True)):
            part = row[start : start + _COLUMNS]
            rows.append(part if i == 0 else [Panel(panel.values, mark=panel.mark) for panel in part])
            labels.append(name)
    return Cell(rows, f"{title}, {_count(shown, view.groups)}", labels, **style)


def _patterns(view: GateView, query: Query) -> list[Panel]:
    mark = view.middle if query is None else query
    return [Panel(values, f"group {i}", mark) for i, values in enumerate(view.patterns(query), 1)]


def _gaussians(view: GateView, query: Query) -> list[Panel]:
    """Patterns with their Gaussians' centres and ellipses of one and two standard deviations."""
    place = torch.tensor(view.middle if query is None else query)
    curves = [view.ellipses(sigma) + place for sigma in (1.0, 2.0)]
    return [
        Panel(panel.values, panel.title, panel.mark, place + center, (one, two))
        for panel, center, one, two in zip(_patterns(view, query), view.center, *curves, strict=True)
    ]


def _tables(view: GateView) -> list[Panel]:
    h, w = view.window
    names = [f"group {i}" for i in range(1, view.groups + 1)] if view.groups > 1 else [""]
    return [Panel(table, name, (h - 1, w - 1)) for table, name in zip(view.table, names, strict=True)]


def _spread(side: int) -> list[int]:
    """Places along a side, from end to end."""
    return Tensor.tolist(torch.linspace(0, side - 1, min(side, _QUERIES)).round().long())


def _window(level: LevelView) -> str:
    return "{}x{} window".format(*level.last.window)


def _count(shown: int, groups: int) -> str:
    return f"all {groups} groups" if shown == groups else f"the first {shown} of {groups} groups"


def _numbers(levels: Sequence[LevelView]) -> str:
    return ", ".join(str(level.number) for level in levels)


def _compared(before: bool) -> str:
    if before:
        return "Before and after are the two files of weights, in the last block of each level."
    return "Where a level has several blocks, its first and its last are compared."


def _colours(signed: bool) -> str:
    if signed:
        return "Orange is positive, blue negative; these rows are not normalised."
    return "Every row sums to 1, and darker is more; colours follow the root, so that faint entries show."
