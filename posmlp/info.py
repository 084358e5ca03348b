"""`posmlp info`: what a model costs, its shapes, and what runs its gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posmlp_kernels import PosSGU, explain

from .cost import Cost, complexity, total
from .model import PosMLP
from .predict import find_device
from .registry import create_model, default_cfg, list_models
from .tables import aligned, by, short
from .window_choices import describe_choices


def run(
    name: str | None = None,
    size: int | None = None,
    batch: int = 1,
    windows: Sequence[int] | None = None,
    device: str | None = None,
) -> None:
    """Print the list of models, or a description of one.

    Raises: `ValueError` for an unknown name or windows that do not fit the model's levels.
    """
    print(models() if name is None else describe(name, size, batch, windows, device))


def models() -> str:
    """A line per model: its name and parameters."""
    with torch.device("meta"):
        counts = {name: _parameters(create_model(name)) for name in list_models()}
    return aligned([("model", "parameters"), *((name, short(count)) for name, count in counts.items())])


def describe(
    name: str,
    size: int | None = None,
    batch: int = 1,
    windows: Sequence[int] | None = None,
    device: str | None = None,
) -> str:
    """Parameters, MACs and shapes by part, and each level's gate with its back end.

    Where the size or the windows are not the model's own, also what other windows would cost.
    """
    options = {} if windows is None else {"windows": windows[0] if len(windows) == 1 else tuple(windows)}
    place = find_device(device)
    with torch.device("meta"):
        model = create_model(name, **options)
    own_size = default_cfg(name)["input_size"][-1]
    size = size or own_size
    costs = complexity(model, size)
    parts = [("part", "parameters", "MACs", "output [B, C, H, W]")]
    parts += [_row(cost, batch) for cost in [*costs, total(costs)]]
    lines = [f"{name}, {batch} x {model.in_chans} x {size} x {size}; MACs are of one image", ""]
    lines += [aligned(parts), ""]
    if windows is not None or size != own_size:
        asked = None if windows is None else [level.blocks[0].gate.window for level in model.levels]
        lines += [describe_choices(name, size, asked), ""]
    return "\n".join([*lines, "gates", "", _gates(model, costs, batch, place)])


def _gates(model: PosMLP, costs: Sequence[Cost], batch: int, place: torch.device) -> str:
    """Each level's gate, then which back end runs it; levels that get the same answer share it."""
    answers: dict[str, list[str]] = {}
    shapes = [("level", "blocks", "map", "window", "groups", "C", "encoding")]
    levels = [cost for cost in costs if cost.name.startswith("levels.")]
    for number, (level, cost) in enumerate(zip(model.levels, levels, strict=True)):
        gate, sides = level.blocks[0].gate, cost.shape[1:]
        shapes.append(
            (str(number), str(len(level.blocks)), by(sides), by(gate.window), str(gate.groups),
             str(gate.dim // 2), gate.encoding)
        )  # fmt: skip
        answers.setdefault(_explain(gate, batch, sides, place), []).append(str(number))
    lines = [aligned(shapes)]
    for answer, numbers in answers.items():
        lines += ["", f"back ends of level{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}", answer]
    return "\n".join(lines)


def _explain(gate: PosSGU, batch: int, sides: Sequence[int], place: torch.device) -> str:
    gate = gate.to_empty(device=place)  # no values are read
    x = torch.empty(gate.dim, device=place).expand(batch, *sides, gate.dim)
    return explain(x, **gate.gate_arguments())


def _row(cost: Cost, batch: int) -> tuple[str, ...]:
    shape = [batch, *cost.shape]
    return cost.name, short(cost.parameters), short(cost.macs), str(shape)


def _parameters(model: PosMLP) -> int:
    return sum(p.numel() for p in model.parameters())
