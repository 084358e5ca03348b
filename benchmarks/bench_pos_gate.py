"""The gate on the four PosMLP-T shapes, against what a user would pick instead and the machine's limits.

    python -m benchmarks.bench_pos_gate [--out FILE]

Every row is checked for correctness before it is timed. The limit of a row is the larger of its flops at the
sgemm rate and its necessary bytes at the copy rate, both measured in the same run; a backward counts three
times the forward's flops.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from posmlp.original_style import OriginalStyleGate, interleaved
from posmlp_kernels import PosSGU, pos_gate

from . import baselines
from .timing import copy_rate, machine, measure, sgemm_rate


@dataclass(frozen=True)
class Stage:
    """A gate of PosMLP-T at 224 x 224."""

    name: str
    map: int
    window: int
    channels: int
    groups: int

    def flops(self, batch: int) -> float:
        return 2.0 * batch * self.map**2 * self.window**2 * self.channels

    def limit(self, batch: int, sgemm: float, copy: float, backward: bool) -> float:
        """Seconds that the machine needs at least."""
        elements = batch * self.map**2 * self.channels * (8 if backward else 3)
        return max(self.flops(batch) * (4 if backward else 1) / sgemm, 4 * elements / copy)


STAGES = (
    Stage("stage 1", 56, 14, 192, 8),
    Stage("stage 2", 28, 14, 384, 16),
    Stage("stage 3", 14, 14, 768, 32),
    Stage("stage 4", 7, 7, 768, 64),
)
COLUMNS = ("ours", "ours, gelu", "plain", "plain, P given", "original", "limit")


def contenders(stage: Stage, batch: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of x `[B, H, W, 2C]` that all compute the same gate, after they have been checked to."""
    torch.manual_seed(0)
    layer = PosSGU(2 * stage.channels, stage.window, groups=stage.groups)
    torch.nn.init.normal_(layer.bias)
    original = OriginalStyleGate.like(layer)
    given = baselines.mixing(layer.relative_table().detach(), stage.window)
    settings = {"window": stage.window, "softmax": True}
    functions = {
        "ours": lambda x: pos_gate(x, layer.relative_table(), layer.bias, **settings),
        "plain": lambda x: baselines.gate(
            x, baselines.mixing(layer.relative_table(), stage.window), layer.bias, stage.window
        ),
        "plain, P given": lambda x: baselines.gate(x, given, layer.bias, stage.window),
        "original": original,
        "ours, gelu": lambda x: pos_gate(
            x, layer.relative_table(), layer.bias, activation="gelu", **settings
        ),
    }
    check(functions, stage, batch)
    return functions


def check(functions: dict[str, Callable[[Tensor], Tensor]], stage: Stage, batch: int) -> None:
    """Raise unless every contender computes what ours does (the original's channels lie otherwise)."""
    x = torch.randn(batch, stage.map, stage.map, 2 * stage.channels)
    order = interleaved(stage.channels, stage.groups)
    x_original = x.unflatten(-1, (2, -1))[..., order].flatten(-2)
    with torch.no_grad():
        expected = functions["ours"](x)
        for name in ("plain", "plain, P given", "original"):
            z = functions[name](x_original if name == "original" else x)
            wanted = expected[..., order] if name == "original" else expected
            error = ((z - wanted).abs().max() / wanted.abs().max()).item()
            if error > 1e-5:
                raise AssertionError(f"{name} differs from ours on {stage.name}: {error:.1e}")


def run(batch: int) -> dict:
    """All rows, and the ceilings that they were measured beside."""
    sgemm, copy = sgemm_rate(), copy_rate()
    rows = []
    for stage in STAGES:
        functions = contenders(stage, batch)
        x = torch.randn(batch, stage.map, stage.map, 2 * stage.channels)
        dz = torch.randn(batch, stage.map, stage.map, stage.channels)
        for backward in (False, True):
            row = {"case": stage.name, "direction": "forward + backward" if backward else "forward"}
            row["limit"] = 1e3 * stage.limit(batch, sgemm, copy, backward)
            for name, function in functions.items():
                if backward and name == "plain, P given":
                    continue
                time = measure(_step(function, x, dz) if backward else _inference(function, x))
                row[name], row[f"{name}, spread"] = 1e3 * time.median, 1e3 * time.spread
            rows.append(row)
            print_row(row)
    return {"machine": machine(), "batch": batch, "sgemm": sgemm, "copy": copy, "unit": "ms", "rows": rows}


def _inference(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def work() -> object:
        with torch.no_grad():
            return function(x)

    return work


def _step(function: Callable[[Tensor], Tensor], x: Tensor, dz: Tensor) -> Callable[[], object]:
    x = x.detach().requires_grad_()

    def work() -> object:
        x.grad = None
        return function(x).backward(dz)

    return work


def print_row(row: dict) -> None:
    cells = " ".join(f"{row[name]:>14.2f}" if name in row else f"{'':>14}" for name in COLUMNS)
    print(f"{row['case']:<8} {row['direction']:<19}{cells}", flush=True)


def markdown(results: dict) -> str:
    """The table of the README."""
    lines = [
        "| gate of PosMLP-T | ours | best plain PyTorch | original, eager | of the machine's limit |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours = row["ours"]
        lines.append(
            f"| {row['case']}, {row['direction']} | {ours:.1f} ms | {row['plain'] / ours:.1f} x as long "
            f"| {row['original'] / ours:.1f} x as long | {100 * row['limit'] / ours:.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    print(f"{'ms':<28}" + " ".join(f"{name:>14}" for name in COLUMNS))
    results = run(arguments.batch)
    rates = f"sgemm {results['sgemm'] / 1e9:.0f} GF/s, copy {results['copy'] / 1e9:.1f} GB/s"
    print(f"{rates}, {results['machine']['threads']} threads\n\n{markdown(results)}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
