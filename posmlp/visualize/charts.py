"""Figures of a whole model: how far its gates reach by depth, and what they do to an image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .effect import Effect, upsample
from .extent import Extent, cumulated
from .page import Plate
from .style import (
    BLUE,
    MARGIN,
    MUTED,
    ORANGE,
    WEIGHTS,
    add_axes,
    colours,
    frame,
    grid,
    heading,
    heading_height,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_extents(extents: Sequence[Extent], before: Sequence[Extent], folder: Path) -> Plate:
    """`extent.png`: the extent of every gate over its depth, and that of all gates up to there."""
    note = "Root mean square distance from a window's middle token to what it takes, in pixels of the input."
    width, left, side, high = 10.4, 0.6, 4.35, 2.75
    top = heading_height(note, width) + 0.6
    with new_figure(folder / "extent.png", (width, top + high + 0.55)) as figure:
        heading(figure, "How far the gates reach", note)
        each = add_axes(figure, left, top, side, high)
        path = add_axes(figure, width - side - MARGIN, top, side, high)
        _each(each, extents, before)
        _path(path, extents, before)
    return Plate(
        folder / "extent.png",
        "Receptive extent by depth",
        "Left: how far the gate of each block reaches, in pixels of the input: the root mean square distance "
        "from the token in the middle of a window to what it takes, weighted by |P|; a dot per group, the "
        "line over all groups, and dashed what taking the same from the whole window would give. Right: the "
        "same for a path through all gates up to a depth, which takes a random group in each: means add and "
        "variances add. Residual connections and convolutions are left out, and every step starts in the "
        "middle of a window, so borders do not show: real paths do not leave windows that stay in place, "
        "even where the line rises above the window's side.",
        "Two charts over the model's depth, in pixels: the extent of each gate, and of all gates up to there",
    )


def draw_effects(image: Tensor, effects: Sequence[Effect], folder: Path, number: int, name: str) -> Plate:
    """`effect_1.png`: an image `[C, H, W]` in [0, 1], and magnitudes before and after each level's gate."""
    names = ("image and windows", "X1, to be mixed", "P X1 + b, mixed", "Z, gated by X2")
    note = (
        "Means of magnitudes over channels; each map from its least to its largest value, printed below it."
    )
    side, gap, text, label = 2.2, 0.1, 0.3, 0.4
    width = MARGIN + label + len(names) * (side + gap) - gap + MARGIN
    top = heading_height(note, width) + 0.35
    path = folder / f"effect_{number}.png"
    with new_figure(path, (width, top + len(effects) * (side + text) + 0.05)) as figure:
        heading(figure, "What the gates do to an image", note)
        for row, effect in enumerate(effects):
            axes = [
                add_axes(figure, MARGIN + label + i * (side + gap), top + row * (side + text), side, side)
                for i in range(len(names))
            ]
            _picture(axes[0], image, effect)
            for axis, values in zip(axes[1:], (effect.tokens, effect.mixed, effect.gated), strict=True):
                _magnitude(axis, values, image.shape[-2:])
            if row == 0:
                for axis, title in zip(axes, names, strict=True):
                    axis.set_title(title, size=10, loc="center")
    return Plate(
        path,
        f"The gates' effect on {name}",
        "The last gate of each level at work: the image with the borders of the gate's windows, then the "
        "magnitude of its tokens X1, of the mixed tokens P X1 + b, and of the result Z = (P X1 + b) * X2, as "
        "means over channels, scaled up to the image. Mixing spreads and moves what is there; gating keeps "
        "what X2 lets through. Each map has its own scale, whose ends are printed below it.",
        f"{name} and three maps for each of {len(effects)} levels: before mixing, mixed, and gated",
    )


def _each(axis: Axes, extents: Sequence[Extent], before: Sequence[Extent]) -> None:
    """A dot per group, a line over all, and what uniform weights over the window would give."""
    depth = range(1, len(extents) + 1)
    for block, step in zip(depth, extents, strict=True):
        values, alpha = step.by_group, max(0.25, min(0.8, 8 / len(step.square)))
        axis.plot([block] * len(values), values, "o", color=BLUE, markersize=4, alpha=alpha, mew=0)
    if before:
        axis.plot(depth, [step.overall for step in before], color=MUTED, linewidth=1.4, label="before")
    name = "after" if before else "all groups"
    axis.plot(depth, [step.overall for step in extents], "-o", color=ORANGE, markersize=3.5, label=name)
    axis.plot([], [], "o", color=BLUE, markersize=4, mew=0, label="a group")
    _steps(axis, [step.uniform for step in extents], "uniform over the window")
    _axis(axis, extents, "Each gate")


def _path(axis: Axes, extents: Sequence[Extent], before: Sequence[Extent]) -> None:
    depth = range(1, len(extents) + 1)
    if before:
        axis.plot(depth, cumulated(before), color=MUTED, linewidth=1.4, label="before")
    axis.plot(
        depth,
        cumulated(extents),
        "-o",
        color=ORANGE,
        markersize=3.5,
        label="after" if before else "all groups",
    )
    _steps(axis, [step.window for step in extents], "side of the window")
    _axis(axis, extents, "All gates up to a block")


def _axis(axis: Axes, extents: Sequence[Extent], title: str) -> None:
    """What both charts share: blocks below, levels above, a band for every second level."""
    grid(axis)
    start = 0.5
    for level, steps in groupby(extents, lambda step: step.level):
        end = start + len(list(steps))
        if level % 2:
            axis.axvspan(start, end, color="#f1f3f5", linewidth=0, zorder=0)
        name = f"level {level}" if (end - start) / len(extents) > 0.15 else str(level)
        axis.text(
            (start + end) / 2, 1.02, name, size=9, color=MUTED, ha="center",
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        start = end
    axis.set_title(f"{title}, pixels", pad=22)
    axis.set(xlim=(0.5, start), ylim=(0, axis.get_ylim()[1] * 1.3), xlabel="block")
    axis.legend(loc="upper left", fontsize=9, ncols=2)


def _steps(axis: Axes, values: Sequence[float], label: str) -> None:
    """A dashed line, level over each block, to compare with."""
    edges = [i + 0.5 for i in range(len(values) + 1)]
    axis.stairs(values, edges, baseline=None, color=MUTED, linestyle=(0, (3, 2)), linewidth=1.0, label=label)


def _picture(axis: Axes, image: Tensor, effect: Effect) -> None:
    """The image under the borders of a level's windows."""
    axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    height, width = image.shape[-2:]
    rows, columns = effect.borders()
    for share in rows:
        axis.axhline(share * height - 0.5, color=ORANGE, linewidth=1.0)
    for share in columns:
        axis.axvline(share * width - 0.5, color=ORANGE, linewidth=1.0)
    axis.set_ylabel(f"level {effect.level}", weight="bold", labelpad=6)
    frame(axis)


def _magnitude(axis: Axes, values: Tensor, size: Sequence[int]) -> None:
    low, high = values.min().item(), values.max().item()
    axis.imshow(upsample(values, size).numpy(), cmap=colours(WEIGHTS), vmin=low, vmax=high)
    axis.set_xlabel(f"{low:.2g} to {high:.2g}", size=8.5, color=MUTED, labelpad=3)
    frame(axis)
