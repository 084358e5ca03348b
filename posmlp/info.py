"""`posmlp info`: what a model costs, its shapes, and what runs its gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posmlp_kernels import PosSGU, explain

from .cost import Cost, complexity, total
from .model import PosMLP
from .predict import find_device
from .registry import create_model, default_cfg, list_models


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
    return _table([("model", "parameters"), *((name, _short(count)) for name, count in counts.items())])


def describe(
    name: str,
    size: int | None = None,
    batch: int = 1,
    windows: Sequence[int] | None = None,
    device: str | None = None,
) -> str:
    """Parameters, MACs and shapes by part, and each level's gate with its back end."""
    options = {} if windows is None else {"windows": windows[0] if len(windows) == 1 else tuple(windows)}
    place = find_device(device)
    with torch.device("meta"):
        model = create_model(name, **options)
    size = size or default_cfg(name)["input_size"][-1]
    costs = complexity(model, size)
    parts = [("part", "parameters", "MACs", "output [B, C, H, W]")]
    parts += [_row(cost, batch) for cost in [*costs, total(costs)]]
    lines = [f"{name}, {batch} x {model.in_chans} x {size} x {size}; MACs are of one image", ""]
    lines += [_table(parts), "", "gates", ""]
    return "\n".join([*lines, _gates(model, costs, batch, place)])


def _gates(model: PosMLP, costs: Sequence[Cost], batch: int, place: torch.device) -> str:
    """Each level's gate, then which back end runs it; levels that get the same answer share it."""
    answers: dict[str, list[str]] = {}
    shapes = [("level", "blocks", "map", "window", "groups", "C", "encoding")]
    levels = [cost for cost in costs if cost.name.startswith("levels.")]
    for number, (level, cost) in enumerate(zip(model.levels, levels, strict=True)):
        gate, sides = level.blocks[0].gate, cost.shape[1:]
        window = "x".join(map(str, gate.window))
        shapes.append(
            (str(number), str(len(level.blocks)), "x".join(map(str, sides)), window, str(gate.groups),
             str(gate.dim // 2), gate.encoding)
        )  # fmt: skip
        answers.setdefault(_explain(gate, batch, sides, place), []).append(str(number))
    lines = [_table(shapes)]
    for answer, numbers in answers.items():
        lines += ["", f"back ends of level{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}", answer]
    return "\n".join(lines)


def _explain(gate: PosSGU, batch: int, sides: Sequence[int], place: torch.device) -> str:
    gate = gate.to_empty(device=place)  # no values are read
    x = torch.empty(gate.dim, device=place).expand(batch, *sides, gate.dim)
    return explain(
        x,
        gate.relative_table(),
        gate.bias,
        window=gate.window,
        softmax=gate.softmax,
        matrix=gate.matrix,
        shift=gate.shift,
        activation=gate.activation,
        norm=None if gate.norm is None else (gate.norm.weight, gate.norm.bias, gate.norm.eps),
    )


def _row(cost: Cost, batch: int) -> tuple[str, ...]:
    shape = [batch, *cost.shape]
    return cost.name, _short(cost.parameters), _short(cost.macs), str(shape)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _parameters(model: PosMLP) -> int:
    return sum(p.numel() for p in model.parameters())


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
