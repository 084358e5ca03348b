"""The figures: the gate beside its ceilings, time over size, and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posmlp.data import optional
from posmlp.visualize import BLUE, INK, MUTED, ORANGE

from .targets import ORIGINAL, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAND = "#c9a96a"
_GRID = "#e3e8ec"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c3cad1",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
_GATES = {  # contender: its name in a legend, colour, marker
    "ours": ("this package", BLUE, "o"),
    "plain": ("best plain PyTorch", _SAND, "s"),
    "original": ("original, eager", ORANGE, "^"),
}
_MODELS = {
    OURS: ("PosMLP-T\nthis package", BLUE),
    "convnext_tiny": ("ConvNeXt-T", MUTED),
    "swin_tiny_patch4_window7_224": ("Swin-T", MUTED),
    "gmlp_s16_224": ("gMLP-S/16", MUTED),
    ORIGINAL: ("PosMLP-T\noriginal's style", ORANGE),
}


def draw(gate: dict, models: dict, folder: Path) -> None:
    """`benchmark_gate.png`, `benchmark_scaling.png` and `benchmark_models.png`."""
    pyplot = optional("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"gate": (_gate, gate), "scaling": (_scaling, gate), "models": (_models, models)}
    with pyplot.rc_context(STYLE):
        for name, (drawing, results) in drawings.items():
            figure = drawing(pyplot, results)
            figure.savefig(folder / f"benchmark_{name}.png", dpi=130)
            pyplot.close(figure)


def _gate(pyplot: Any, results: dict) -> Any:
    """The rate of every case as a share of sgemm's, a panel for each direction."""
    size = {"figsize": (10, 1.6 + 0.14 * len(results["rows"])), "layout": "constrained"}
    figure, axes = pyplot.subplots(1, 2, sharey=True, **size)
    for axis, direction in zip(axes, ("forward", "forward + backward"), strict=True):
        rows = [row for row in results["rows"] if row["direction"] == direction]
        for name, (label, colour, marker) in _GATES.items():
            shares = [
                (i, row["flops"] / row["times"][name]["median"] / row["ceilings"]["gemm"])
                for i, row in enumerate(rows)
                if name in row["times"]
            ]
            if shares:
                places, values = zip(*shares, strict=True)
                axis.plot(values, places, marker, color=colour, label=label, markersize=6)
        _ceiling(axis, 1, "sgemm")
        if "onednn" in results["ceilings"]:
            rates = {name: rate["median"] for name, rate in results["ceilings"].items()}
            _ceiling(axis, rates["onednn"] / rates["gemm"], "oneDNN")
        axis.set(title=direction, xlabel="flops / second, as a share of sgemm's (1)", xlim=(0, None))
        axis.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axis.set_ylim(len(rows) - 0.4, -1.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_GATES))
    return figure


def _ceiling(axis: Axes, share: float, name: str) -> None:
    axis.axvline(share, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.text(share, -0.85, name, fontsize=8, color=MUTED, ha="center", bbox=on_white)


def _scaling(pyplot: Any, results: dict) -> Any:
    """Forward times over batch, map and window, on logarithmic axes."""
    scaling = results["scaling"]
    size = {"figsize": (4 * max(1, len(scaling)), 4.2), "layout": "constrained"}
    figure, axes = pyplot.subplots(1, max(1, len(scaling)), sharey=True, squeeze=False, **size)
    for axis, (label, rows) in zip(axes[0], scaling.items(), strict=False):
        sizes = [row["size"] for row in rows]
        for name, (text, colour, marker) in _GATES.items():
            times = [1e3 * row["times"][name]["median"] for row in rows]
            axis.plot(sizes, times, marker + "-", color=colour, label=text, markersize=5)
        limits = [1e3 * _limit(row) for row in rows]
        axis.plot(
            sizes,
            limits,
            ":",
            color=INK,
            label="limit: the fastest product's flops, or a copy's bytes",
        )
        what, _, fixed = label.partition(" (")
        axis.set(xscale="log", yscale="log", xlabel=what)
        axis.set_title(fixed.removesuffix(")"), fontsize=9, fontweight="normal", color=MUTED)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0][0].set_ylabel("forward, milliseconds")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _limit(row: dict) -> float:
    ceilings = row["ceilings"]
    product = max(ceilings["gemm"], ceilings.get("onednn", 0))
    return max(row["flops"] / product, row["bytes"] / ceilings["copy"])


def _models(pyplot: Any, results: dict) -> Any:
    """Time an image in every setting, and peak memory."""
    rows = results["rows"]
    panels = [(f"{row['what']}, batch {row['batch']}", row, "times") for row in rows]
    panels += [
        (f"peak memory, training, batch {row['batch']}", row, "memory") for row in rows if "memory" in row
    ]
    size = {"figsize": (3.1 * len(panels), 3.4), "layout": "constrained"}
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, squeeze=False, **size)
    for axis, (title, row, what) in zip(axes[0], panels, strict=True):
        names = [name for name in _MODELS if name in row["times"]]
        if what == "times":
            values = [1e3 * row["times"][name]["median"] / row["batch"] for name in names]
            _bars(axis, names, values, "{:.0f}")
            axis.set_xlabel("milliseconds an image")
        else:
            _bars(axis, names, [(row["memory"][name] or 0) / 2**30 for name in names], "{:.1f}")
            axis.set_xlabel("GiB")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", visible=False)
        axis.set_yticks(range(len(names)), [_MODELS[name][0] for name in names])
        axis.tick_params(axis="y", length=0)
    axes[0][0].invert_yaxis()
    return figure


def _bars(axis: Axes, names: list[str], values: list[float], shown: str) -> None:
    bars = axis.barh(range(len(names)), values, color=[_MODELS[name][1] for name in names], height=0.62)
    axis.bar_label(bars, [shown.format(value) for value in values], padding=4, fontsize=9, color=INK)
    axis.set_xlim(0, 1.18 * max(values))
