"""The figure of a run on a GPU: every gate beside the copy rate, and the models' images a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posmlp.data import optional
from posmlp.visualize import BLUE, INK, MUTED, ORANGE

from .gate_cases import BACKWARD, FORWARD
from .gpu_targets import parts, share
from .plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {  # contender: colour and marker
    "cuda": (BLUE, "o"),
    "triton": (BLUE, "D"),
    "cpu": (BLUE, "s"),
    "plain, compiled": ("#c9a96a", "s"),
    "plain": ("#c9a96a", "x"),
    "original": (ORANGE, "^"),
}


def draw(run: dict, path: Path) -> None:
    """Write the figure as an image file."""
    pyplot = optional("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    rows = [(row, part["dtype"]) for part in parts(run, "gate") for row in part["rows"] if row["times"]]
    models = [row for part in parts(run, "models") for row in part["rows"] if row["times"]]
    most = max(len(rows) // 2, *(2 * len(row["times"]) for row in models), 4)
    with pyplot.rc_context(STYLE):
        size = {"figsize": (5 * (2 + len(models)), 2 + 0.2 * most), "layout": "constrained"}
        figure, axes = pyplot.subplots(1, 2 + len(models), squeeze=False, **size)
        for axis, direction in zip(axes[0], (FORWARD, BACKWARD), strict=False):
            _gates(axis, [(row, dtype) for row, dtype in rows if row["direction"] == direction])
            axis.set_title(direction)
        for axis, row in zip(axes[0][2:], models, strict=True):
            _models(axis, row)
        figure.suptitle(run["machine"]["processor"])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _gates(axis: Axes, rows: list[tuple[dict, str]]) -> None:
    for name, (colour, marker) in _MARKS.items():
        points = [(share(row, name, "copy"), i) for i, (row, _) in enumerate(rows) if name in row["times"]]
        if points:
            axis.plot(*zip(*points, strict=True), marker, color=colour, label=name, markersize=5)
    axis.axvline(1, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axis.set_yticks(range(len(rows)), [f"{row['case']}, {dtype}" for row, dtype in rows], fontsize=8)
    axis.set(xlabel="necessary bytes / second, as a share of a copy's (1)", xlim=(0, None))
    axis.invert_yaxis()
    if rows:
        axis.legend(fontsize=8)


def _models(axis: Any, row: dict) -> None:
    names = list(row["times"])
    rates = [row["batch"] / row["times"][name]["median"] for name in names]
    colours = [BLUE if name.startswith("posmlp") else MUTED for name in names]
    bars = axis.barh(range(len(names)), rates, color=colours, height=0.62)
    axis.bar_label(bars, [f"{rate:.0f}" for rate in rates], padding=4, fontsize=8, color=INK)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(
        title=f"{row['what']}, batch {row['batch']}", xlabel="images a second", xlim=(0, 1.2 * max(rates))
    )
    axis.invert_yaxis()
