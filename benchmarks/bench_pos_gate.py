"""The gate against what a user would pick instead, and against the limits of the machine.

    python -m benchmarks.bench_pos_gate [--out FILE]

Every contender is checked for correctness before it is timed. "Ours" is the layer as models call it: in
inference its table is kept, in a training step it is built and differentiated. Flops are those of the mixing
product between tokens that share a window; a backward counts three times the forward's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .gate_cases import CASES, SWEEPS, Gate
from .gate_contenders import Settings, check, contender, names, yardsticks
from .targets import gate_targets, show
from .timing import Ceilings, machine, peak_memory, race, summary

_MEMORY = ("ours", "plain", "original")
_COLUMNS = ("ours", "ours, gelu", "gelu alone", "plain", "plain, P given", "original", "original, compiled")
_SHARES = ("gemm", "onednn")


@dataclass(frozen=True)
class Effort:
    """How long each contender of a case runs, and whether those by torch.compile are among them."""

    seconds: float
    rounds: int
    compiled: bool


def measure(case: Gate, backward: bool, settings: Settings, effort: Effort, ceilings: Ceilings) -> dict:
    """A row of the results: times in seconds, what the case moves and computes, the ceilings meanwhile."""
    torch._dynamo.reset()
    subjects = {name: contender(case, name, settings) for name in names(case, backward, effort.compiled)}
    check(case, subjects, backward, settings)
    works = {name: subject.work(backward) for name, subject in subjects.items()}
    works |= yardsticks(case, backward, settings) if "ours, gelu" in works else {}
    times = race(works | ceilings.works, effort.seconds, effort.rounds)
    return {
        "case": case.name,
        "direction": "forward + backward" if backward else "forward",
        "shape": asdict(case),
        "flops": case.flops(backward),
        "bytes": case.elements(backward) * settings.dtype.itemsize,
        "times": {name: asdict(times[name]) for name in works},
        "ceilings": ceilings.rates(times),
    }


def measure_memory(case: Gate, settings: Settings) -> dict[str, int | None]:
    """Peak bytes of a forward and backward, inputs included, each contender in a fresh process."""
    return {name: peak_memory(_step_of, case, name, settings) for name in _MEMORY}


def _step_of(case: Gate, name: str, settings: Settings) -> object:
    return contender(case, name, settings).step


def sweep(points: dict[int, Gate], settings: Settings, effort: Effort, ceilings: Ceilings) -> list[dict]:
    """Forward times of ours, plain PyTorch and the original over one size, at half the effort."""
    rows, effort = [], replace(effort, seconds=effort.seconds / 2, rounds=(effort.rounds + 1) // 2)
    for size, case in points.items():
        row = measure(case, False, settings, effort, ceilings)
        rows.append({"size": size} | {key: row[key] for key in ("flops", "bytes", "times", "ceilings")})
    return rows


def run(
    cases: Iterable[Gate], sweeps: dict[str, dict[int, Gate]], settings: Settings, effort: Effort
) -> dict:
    """Everything, printed as it comes."""
    ceilings, rows = Ceilings(settings.device, settings.dtype), []
    print(HEADER)
    for case in cases:
        for backward in (False, True):
            rows.append(measure(case, backward, settings, effort, ceilings))
            print(line(rows[-1]), flush=True)
        if "original, compiled" in case.against:
            rows[-1]["memory"] = measure_memory(case, settings)
    scaling = {axis: sweep(points, settings, effort, ceilings) for axis, points in sweeps.items()}
    return {
        "machine": machine(settings.device),
        "device": settings.device.type,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "backend": settings.backend,
        "ceilings": summary([row["ceilings"] for row in rows]),
        "rows": rows,
        "scaling": scaling,
    }


def line(row: dict) -> str:
    """A row for the screen: milliseconds, and ours as shares of the ceilings."""
    times = {name: time["median"] for name, time in row["times"].items()}
    cells = [f"{1e3 * times[name]:.2f}" if name in times else "" for name in _COLUMNS]
    rates = row["ceilings"]
    cells += [f"{row['flops'] / times['ours'] / rates[n]:.2f}" if n in rates else "" for n in _SHARES]
    return f"{row['case']:<27}{row['direction']:<19}" + _aligned(cells)


def _aligned(cells: list[str]) -> str:
    widths = [max(len(name), 7) + 2 for name in (*_COLUMNS, *(f"of {name}" for name in _SHARES))]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


HEADER = f"{'milliseconds':<46}" + _aligned([*_COLUMNS, *(f"of {name}" for name in _SHARES)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--backend", help="of ours; default: the fastest")
    parser.add_argument("--batch", type=int, help="instead of each case's own (8)")
    parser.add_argument("--case", nargs="*", default=[c.name for c in CASES], help="names; default: all")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each contender of a case")
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-sweeps", action="store_true", help="leave out time over batch, map and window")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    given = parser.parse_args(arguments)
    unknown = set(given.case) - {case.name for case in CASES}
    if unknown:
        parser.error(f"--case must name some of {[c.name for c in CASES]}, got {sorted(unknown)}")
    cases = [replace(c, batch=given.batch or c.batch) for c in CASES if c.name in given.case]
    settings = Settings(given.device, getattr(torch, given.dtype), given.backend)
    sweeps = {} if given.no_sweeps else SWEEPS
    results = run(cases, sweeps, settings, Effort(given.seconds, given.rounds, not given.no_compile))
    show(results["ceilings"], gate_targets(results))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
