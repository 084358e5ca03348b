"""`posmlp visualize`: figures of a file of weights, and one page that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..card import ModelCard
from ..cost import complexity, total
from ..data import optional, read_image
from ..model import PosMLP
from ..predict import find_device, load_model
from ..registry import create_model
from ..weights import load_checkpoint
from .charts import draw_effects, draw_extents
from .effect import gate_effects
from .extent import extents
from .gates import Query, draw_bias_maps, draw_free_rows, draw_groups, draw_query_patterns
from .page import Plate, write_page
from .views import LevelView, view_levels


def run(
    weights: str,
    before: str | None = None,
    out: str = "pictures",
    model: str | None = None,
    levels: Sequence[int] | None = None,
    groups: int = 8,
    query: Sequence[int] | None = None,
    image: Sequence[str] = (),
    device: str | None = None,
) -> int:
    """Write the figures of a file of weights into the folder `out`, and `index.html`, which holds them all.

    Args:
        weights: a checkpoint of ours or of the original's code.
        before: another one of the same model, to compare with.
        model: its name, where no card beside the weights says it.
        levels: those to show, counted from 0; None for all.
        groups: the most to show in the figure of patterns.
        query: row and column of the token whose patterns are shown; None for the middle of each window.
        image: files of images to run the model on.
        device: where it runs.

    Returns: 0. Raises: `ValueError` for a level, group count or query that does not exist, or weights that
        are not finite; what `load_model`, `find_device` and `read_image` raise. A file is written only after.
    """
    for name in ("matplotlib", "PIL"):
        optional(name)
    network, card = load_model(weights, model)
    views = view_levels(network)
    chosen = _choose(views, levels)
    _check(chosen, groups, query)
    earlier = [] if before is None else view_levels(_load_like(card, before))
    place = find_device(device)
    network.to(place)
    pictures = [(Path(name).name, read_image(name, card)) for name in image]
    numbers = [level.number for level in chosen]
    effects = [gate_effects(network, pixels.to(place), numbers) for _, pixels in pictures]

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    then = [earlier[number] for number in numbers] if earlier else []
    plates = _draw_gates(chosen, then, folder, groups, None if query is None else (query[0], query[1]))
    plates.append(draw_extents(extents(views), extents(earlier), folder))
    for i, ((name, pixels), effect) in enumerate(zip(pictures, effects, strict=True), 1):
        plates.append(draw_effects(_picture(pixels, card), effect, folder, i, name))
    _write_page(folder, network, card, views, plates, weights, before)
    print(f"{len(plates)} figures are in {folder}, and all of them in {folder / 'index.html'}")
    return 0


def _draw_gates(
    levels: Sequence[LevelView], before: Sequence[LevelView], folder: Path, groups: int, query: Query
) -> list[Plate]:
    plates = [draw_query_patterns(levels, before, folder, groups, query)]
    plates += [draw_groups(level, folder, query) for level in levels if level.last.table is not None]
    plates += [draw_free_rows(level, folder) for level in levels if level.last.matrix is not None]
    bias = draw_bias_maps(levels, before, folder)
    return plates if bias is None else [*plates, bias]


def _choose(views: Sequence[LevelView], levels: Sequence[int] | None) -> list[LevelView]:
    if levels is None:
        return list(views)
    if not levels or not all(0 <= level < len(views) for level in levels):
        raise ValueError(f"levels must be some of 0 to {len(views) - 1}, got {list(levels)}")
    return [views[level] for level in sorted(set(levels))]


def _check(chosen: Sequence[LevelView], groups: int, query: Sequence[int] | None) -> None:
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if query is None:
        return
    if len(query) != 2:
        raise ValueError(f"query must be a row and a column, got {list(query)}")
    for level in chosen:
        h, w = level.last.window
        if not (0 <= query[0] < h and 0 <= query[1] < w):
            raise ValueError(
                f"query must be a token of the {h}x{w} windows of level {level.number}, counted from 0, "
                f"got {query[0]} {query[1]}"
            )


def _load_like(card: ModelCard, weights: str) -> PosMLP:
    """Another file's weights in the model that a card names."""
    network = create_model(card.model, **card.options)
    load_checkpoint(network, weights)
    return network


def _picture(pixels: Tensor, card: ModelCard) -> Tensor:
    """A normalised image's values in [0, 1] again."""
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (card.mean, card.std))
    return (pixels * std + mean).clamp(0, 1)


def _write_page(
    folder: Path,
    network: PosMLP,
    card: ModelCard,
    views: Sequence[LevelView],
    plates: Sequence[Plate],
    weights: str,
    before: str | None,
) -> None:
    lead = "What the gates of the model have learned, Z = (P X1 + b) * X2 with P from positions alone."
    facts = [*_facts(network, card, views), ("weights", weights)]
    facts += [] if before is None else [("before", before)]
    write_page(folder / "index.html", f"{card.model}: where its tokens look", lead, facts, plates)


def _facts(network: PosMLP, card: ModelCard, views: Sequence[LevelView]) -> list[tuple[str, str]]:
    cost = total(complexity(network, card.side))
    shifted = any(any(block.gate.shift) for level in network.levels for block in level.blocks)

    def by_level(values: Iterable[object]) -> str:
        return ", ".join(map(str, values))

    return [
        ("model", card.model),
        ("parameters", f"{cost.parameters / 1e6:.2f} M"),
        ("multiply-accumulates", f"{cost.macs / 1e6:,.2f} M for {card.side} x {card.side} pixels"),
        ("encoding", network.encoding),
        ("groups, by level", by_level(view.last.groups for view in views)),
        ("blocks", by_level(len(view.gates) for view in views)),
        ("windows, in tokens", by_level("{} x {}".format(*view.last.window) for view in views)),
        ("windows shift", "in every second block" if shifted else "nowhere"),
        ("pixels a token", by_level(view.stride for view in views)),
    ]
