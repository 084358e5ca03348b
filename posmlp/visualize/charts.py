"""Figures of a whole model: how far its gates reach by depth, and what they do to an image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..data import optional
from .effect import Effect, upsample
from .extent import Extent, cumulated
from .page import Plate
from .style import (
    BLUE, MARGIN, MUTED, ORANGE, WEIGHTS, add_axes, colours, frame, heading, heading_height, new_figure,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_extents(extents: Sequence[Extent], before: Sequence[Extent], folder: Path) -> Plate:
    """`extent.png`: the extent of every gate over its depth, and that of all gates up to there."""
    note = "Root mean square distance between the token in the middle of a window and what it takes, in input pixels."
    width, left, side = 10.4, 0.75, 4.15
    top = heading_height(note, width) + 0.5
    with new_figure(folder / "extent.png", (width, top + 3.4)) as figure:
        heading(figure, "How far the gates reach", note)
        each = add_axes(figure, left, top, side, 2.75)
        path = add_axes(figure, width - side - MARGIN, top, side, 2.75)
        _each(each, extents, before)
        _path(path, extents, before)
        for axis in (each, path):
            _levels(axis, extents)
    return Plate(
        folder / "extent.png",
        "Receptive extent by depth",
        "Left: how far the gate of each block reaches, in pixels of the input: the root mean square distance "
        "from the token in the middle of a window to what it takes, weighted by |P|; a dot per group, the "
        "line over all groups, and dashed what taking the same from the whole window would give. Right: the "
        "same for a path through all gates up to a depth, which takes a random group in each: means add and "
        "variances add. Residual connections and convolutions are left out, and every step starts in the "
        "middle of a window, so borders do not show: windows that stay in place keep real paths inside.",
        "Two charts over the depth of the model: extent of each gate, and of all gates up to there, in pixels",
    )


def draw_effects(image: Tensor, effects: Sequence[Effect], folder: Path, number: int, name: str) -> Plate:
    """`effect_1.png`: an image `[C, H, W]` in [0, 1], and magnitudes before and after each level's gate."""
    rows = ("X1, to be mixed", "P X1 + b, mixed", "Z, gated by X2")
    note = "Magnitudes, means over channels; each map from its least (light) to its largest value, printed below it."
    side, gap, text, label = 1.75, 0.12, 0.42, 0.35
    left, big = MARGIN + 2.9, 2.6
    width = left + label + len(effects) * (side + gap) + MARGIN
    top = heading_height(note, width) + 0.3
    path = folder / f"effect_{number}.png"
    with new_figure(path, (width, top + 3 * (side + text))) as figure:
        heading(figure, "What the gates do to an image", note)
        _picture(add_axes(figure, MARGIN, top, big, big), image)
        for column, effect in enumerate(effects):
            maps = (effect.tokens, effect.mixed, effect.gated)
            for row, (values, title) in enumerate(zip(maps, rows, strict=True)):
                x, y = left + label + column * (side + gap), top + row * (side + text)
                axis = add_axes(figure, x, y, side, side)
                _magnitude(axis, values, image.shape[-2:])
                if row == 0:
                    axis.set_title(f"level {effect.level}", size=10, loc="center")
                if column == 0:
                    axis.set_ylabel(title, weight="bold", labelpad=6)
    return Plate(
        path,
        f"The gates' effect on {name}",
        "The last gate of each level at work: the magnitude of its tokens X1, of the mixed tokens P X1 + b, and of "
        "the result Z = (P X1 + b) * X2, as means over channels, scaled up to the image. Mixing blurs and "
        "moves; gating keeps what X2 lets through. Each map has its own scale, whose ends are printed below.",
        f"{name} and three maps for each of {len(effects)} levels: before mixing, mixed, and gated",
    )


def _each(axis: Axes, extents: Sequence[Extent], before: Sequence[Extent]) -> None:
    """A dot per group, a line over all; one that a window's uniform weights would give, for comparison."""
    depth = range(1, len(extents) + 1)
    for block, step in zip(depth, extents, strict=True):
        alpha = max(0.25, min(0.8, 8 / len(step.square)))
        values = step.by_group
        axis.plot(
            [block] * len(values), values, "o", color=BLUE, markersize=4, alpha=alpha, markeredgewidth=0
        )
    if before:
        axis.plot(depth, [step.overall for step in before], color=MUTED, linewidth=1.4, label="before")
    axis.plot(
        depth, [step.overall for step in extents], "-o", color=ORANGE, markersize=3.5, label="all groups"
    )
    axis.plot(
        depth, [step.uniform for step in extents], color=MUTED, linestyle=(0, (3, 2)), linewidth=1.0,
        drawstyle="steps-mid", label="uniform over the window",
    )  # fmt: skip
    axis.set(title="Each gate, pixels", xlabel="block")
    axis.legend(loc="upper left", fontsize=9)


def _path(axis: Axes, extents: Sequence[Extent], before: Sequence[Extent]) -> None:
    depth = range(1, len(extents) + 1)
    if before:
        axis.plot(depth, cumulated(before), color=MUTED, linewidth=1.4, label="before")
    axis.plot(depth, cumulated(extents), "-o", color=ORANGE, markersize=3.5, label="after")
    axis.set(title="All gates up to a block, pixels", xlabel="block")
    if before:
        axis.legend(loc="upper left", fontsize=9)


def _levels(axis: Axes, extents: Sequence[Extent]) -> None:
    """Shared marks of both charts: a band for every second level, whole blocks, and room for the legend."""
    start = 0.5
    for level, steps in groupby(extents, lambda step: step.level):
        end = start + len(list(steps))
        if level % 2:
            axis.axvspan(start, end, color="#f1f3f5", linewidth=0, zorder=0)
        axis.text(
            (start + end) / 2, 1.0, f"level {level}" if end - start > 3 or len(extents) < 12 else str(level),
            size=9, color=MUTED, ha="center", va="top", transform=axis.get_xaxis_transform(),
        )  # fmt: skip
        start = end
    axis.set(xlim=(0.5, start), ylim=(0, axis.get_ylim()[1] * 1.3 or 1.0))
    axis.xaxis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _picture(axis: Axes, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title("image", size=10, loc="center")
    frame(axis)


def _magnitude(axis: Axes, values: Tensor, size: Sequence[int]) -> None:
    low, high = values.min().item(), values.max().item()
    axis.imshow(upsample(values, size).numpy(), cmap=colours(WEIGHTS), vmin=low, vmax=high)
    axis.set_xlabel(f"{low:.2g} to {high:.2g}", size=8.5, color=MUTED, labelpad=3)
    frame(axis)
