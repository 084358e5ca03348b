"""What an ablation gave: tables as Markdown, and every run as CSV."""

from __future__ import annotations

import csv
import io
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from posmlp_kernels import PosSGU

from ..card import ModelCard
from ..cost import complexity, total
from ..model import PosMLP
from ..registry import create_model
from ..tables import markdown, short
from ..train.folder import RunFolder
from .plan import Plan, Run
from .runs import Outcome
from .scales import Elsewhere
from .tables import TABLES, Row

_WIDTH = 110  # of the text, in characters
_ENCODING = ("center", "factor", "scale", "table", "matrix")  # a gate's parameters that mix tokens


@dataclass(frozen=True)
class Size:
    """Of a row's model: parameters, multiply-accumulates of an image, and numbers of all gates' encodings."""

    parameters: int
    macs: int
    numbers: int


@dataclass(frozen=True)
class Results:
    """What the runs of a plan came to, and what must be said beside it.

    Args:
        outcomes: of every run.
        images: in training and validation.
        versions: of packages.
    """

    plan: Plan
    outcomes: Sequence[tuple[Run, Outcome]]
    images: tuple[int, int]
    versions: Mapping[str, str]

    def of(self, row: Row) -> list[Outcome]:
        """A row's outcomes, seed by seed."""
        return [outcome for run, outcome in self.outcomes if run.row == row.name]

    def size(self, row: Row) -> Size:
        run = next(run for run, _ in self.outcomes if run.row == row.name)
        card = ModelCard.load(RunFolder(run.settings.out).weights("last"))
        with torch.device("meta"):
            model = create_model(card.model, **card.options)
        cost = total(complexity(model, card.side))
        return Size(cost.parameters, cost.macs, encoding_numbers(model))


def encoding_numbers(model: PosMLP) -> int:
    """The parameters of all gates' encodings, biases and norms left out."""
    gates = [module for module in model.modules() if isinstance(module, PosSGU)]
    parameters = (getattr(gate, name, None) for gate in gates for name in _ENCODING)
    return sum(p.numel() for p in parameters if p is not None)


def as_markdown(results: Results, command: str) -> str:
    """The tables, under what they are and how they came about."""
    parts = [f"# Ablations on {results.plan.data}", _preface(results), f"```bash\n{command}\n```"]
    for name, rows in results.plan.rows().items():
        table = TABLES[name]
        write = _transfer_table if name == "transfer" else _training_table
        parts += [f"## {table.title}", textwrap.fill(table.text, _WIDTH), markdown(*write(results, rows))]
    return "\n\n".join(parts) + "\n"


def as_csv(results: Results) -> str:
    """A line for each run of each table's rows; what a row varies is one column."""
    text = io.StringIO()
    fields = ("table", "row", "model", "seed", "top1", "loss", "parameters", "macs", "numbers", "elsewhere")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    for table, rows in results.plan.rows().items():
        for row in rows:
            size, label = results.size(row), ", ".join(row.cells.values()).replace("`", "")
            for seed, outcome in enumerate(results.of(row)):
                elsewhere = "; ".join(f"{place}: {top1:.3f}" for place, top1 in outcome.elsewhere.items())
                writer.writerow(
                    [table, label, row.name, seed, f"{outcome.top1:.3f}", f"{outcome.loss:.5f}",
                     size.parameters, size.macs, size.numbers, elsewhere]
                )  # fmt: skip
    return text.getvalue()


def _preface(results: Results) -> str:
    plan, (training, validation) = results.plan, results.images
    recipe, side = plan.recipe, plan.models.side
    digits = "scikit-learn's handwritten digits, a small real data set and not ImageNet: "
    seeds = "one seed" if plan.seeds == 1 else f"mean and standard deviation of {plan.seeds} seeds"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    text = (
        f"Trained on {training} images and judged on {validation} others, {side} x {side} pixels"
        f"{', of ' + digits if plan.data == 'digits' else ': '}"
        "the tables say how rows compare here, and not what they would reach on other data. Top-1 in percent "
        f"(one image is {100 / validation:.2f}) and cross entropy, {seeds}, after the last of "
        f"{recipe.total_epochs} epochs. All rows have the same recipe, seeds, and order and distortions of "
        f"the images; encodings learn at {recipe.position_lr:g} times the rate of weights, free matrices at "
        f"that of weights. MACs count the position maps as the paper does, entry by entry."
    )
    return textwrap.fill(text, _WIDTH) + f"\n\nVersions: {versions}."


def _training_table(results: Results, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header, table = [*rows[0].cells, "numbers, all gates", "parameters", "MACs", "top-1", "loss"], []
    for row in rows:
        size, outcomes = results.size(row), results.of(row)
        counts = [f"{size.numbers:,}", f"{size.parameters:,}", short(size.macs)]
        scores = [_spread([o.top1 for o in outcomes], 2), _spread([o.loss for o in outcomes], 3)]
        table.append([*row.cells.values(), *counts, *scores])
    return header, table


def _transfer_table(results: Results, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    scale = results.plan.models
    places = [str(place) for place in scale.elsewhere]
    header, table = [*rows[0].cells, str(Elsewhere(scale.side, scale.posmlp.windows)), *places], []
    for row in rows:
        outcomes = results.of(row)
        scores = [[o.top1 for o in outcomes], *([o.elsewhere[p] for o in outcomes] for p in places)]
        table.append([*row.cells.values(), *(_spread(values, 2) for values in scores)])
    return header, table


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
