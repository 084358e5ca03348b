"""The gate against what a user would pick instead, and against the limits of the machine.

    python -m benchmarks.bench_pos_gate [--out FILE]

Every contender is checked for correctness before it is timed; one that fails is named and left out. "Ours"
is the layer as models call it: in inference its table is kept, in a training step it is built and
differentiated. Flops are those of the mixing product between tokens that share a window. On a GPU times are
the device's own, with a cold L2, and the backward is measured alone as well.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .attempts import Attempts
from .device import DeviceClock
from .gate_cases import BOTH, DIRECTIONS, FORWARD, SUITES, SWEEPS, Gate
from .gate_contenders import (
    TOLERANCES,
    YARDSTICKS,
    Settings,
    Truth,
    contender,
    grad_mode,
    names,
    yardsticks,
)
from .gate_errors import LIMIT, errors
from .targets import gate_targets, show
from .timing import Burst, Ceilings, keep_memory, machine, peak_memory, race, summary, wall, write

_MEMORY = ("ours", "plain", "original")
_SHARES = {"gemm": "flops", "onednn": "flops", "copy": "bytes"}


@dataclass(frozen=True)
class Effort:
    """How long each contender of a case runs, and whether those by torch.compile are among them.

    Args:
        burst: how times are taken.
        deadline: by `time.monotonic`; nothing is begun after it.
    """

    seconds: float
    rounds: int
    compiled: bool
    burst: Burst = wall
    deadline: float = math.inf


def measure(case: Gate, direction: str, settings: Settings, effort: Effort, ceilings: Ceilings) -> dict:
    """A row of the results: times in seconds, what the case moves and computes, the ceilings meanwhile."""
    torch._dynamo.reset()
    attempts, truth = Attempts(effort.deadline), Truth(case, direction, settings)
    works = {
        name: attempts(name, checked_work, case, name, direction, settings, truth)
        for name in names(case, direction, settings, effort.compiled)
    }
    works = {name: work for name, work in works.items() if work is not None}
    if any(name.endswith(", gelu") for name in works):
        works |= yardsticks(case, direction, settings)
    with grad_mode(direction):
        times = attempts("race", race, works | ceilings.works, effort.seconds, effort.rounds, effort.burst)
    times = times or {}
    least = {
        "kept_flops": case.flops(direction) * case.multiplied(),
        "flops_around": case.flops_around(direction),
    }
    return (least if settings.device.type == "cpu" else {}) | {
        "case": case.name,
        "direction": direction,
        "shape": asdict(case),
        "flops": case.flops(direction),
        "bytes": case.elements(direction) * settings.dtype.itemsize,
        "times": {name: asdict(times[name]) for name in works if name in times},
        "errors": {name: errors(case, name, settings) for name in settings.ours if name in works},
        "failures": attempts.failures,
        "ceilings": ceilings.rates(times) if times else {},
    }


def checked_work(
    case: Gate, name: str, direction: str, settings: Settings, truth: Truth
) -> Callable[[], object]:
    """What is timed, once it has computed the right thing.

    Raises: `RuntimeError` if it does not.
    """
    if name in settings.ours:
        wrong = {key: error for key, error in errors(case, name, settings).items() if not error <= LIMIT}
        if wrong:
            raise RuntimeError(f"errors as multiples of eager PyTorch's: {wrong}")
    subject = contender(case, name, settings)
    truth.check(name, subject)
    return subject.work(direction)


def measure_memory(case: Gate, settings: Settings) -> dict[str, int | None]:
    """Peak bytes of a forward and backward, inputs included, each contender in a fresh process."""
    return {name: peak_memory(_step_of, case, name, settings) for name in _MEMORY}


def _step_of(case: Gate, name: str, settings: Settings) -> object:
    return contender(case, name, settings).step


def sweep(points: dict[int, Gate], settings: Settings, effort: Effort, ceilings: Ceilings) -> list[dict]:
    """Forward times of ours, plain PyTorch and the original over one size, at half the effort."""
    rows, effort = [], replace(effort, seconds=effort.seconds / 2, rounds=(effort.rounds + 1) // 2)
    for size, case in points.items():
        row = measure(case, FORWARD, settings, effort, ceilings)
        rows.append({"size": size} | {key: row[key] for key in ("flops", "bytes", "times", "ceilings")})
    return rows


def run(
    cases: list[Gate], sweeps: dict[str, dict[int, Gate]], settings: Settings, effort: Effort
) -> Iterator[dict]:
    """The results, again and again as they grow; each row is printed as it comes."""
    on_gpu = settings.device.type == "cuda"
    ceilings = Ceilings(settings.device, settings.dtype)
    results = {
        "machine": machine(settings.device),
        "device": settings.device.type,
        "dtype": settings.precision,
        "backends": list(settings.backends),
        "rows": (rows := []),
        "scaling": (scaling := {}),
    }
    columns = _columns(cases, settings, effort)
    print(_header(columns))
    for case in cases:
        for direction in DIRECTIONS if on_gpu else (FORWARD, BOTH):
            rows.append(measure(case, direction, settings, effort, ceilings))
            print(line(rows[-1], columns), flush=True)
        if "original, compiled" in case.against and not on_gpu:
            rows[-1]["memory"] = measure_memory(case, settings)
        results["ceilings"] = summary([row["ceilings"] for row in rows if row["ceilings"]])
        yield results
    for axis, points in sweeps.items():
        scaling[axis] = sweep(points, settings, effort, ceilings)
        yield results


def _columns(cases: list[Gate], settings: Settings, effort: Effort) -> list[str]:
    """All contenders of a run, and what is timed beside them."""
    named = {name: None for case in cases for name in names(case, FORWARD, settings, effort.compiled)}
    return [*named, *YARDSTICKS]


def _header(columns: list[str]) -> str:
    shares = (f"of {name}" for name in _SHARES)
    return f"{'milliseconds':<46}" + "".join(f"{name:>20}" for name in (*columns, *shares))


def line(row: dict, columns: list[str]) -> str:
    """A row for the screen: milliseconds, the first contender's part of the ceilings, and what failed."""
    times, rates = {name: time["median"] for name, time in row["times"].items()}, row["ceilings"]
    cells = [f"{1e3 * times[name]:.3f}" if name in times else "" for name in columns]
    if columns[0] in times:
        cells += [f"{row[_SHARES[n]] / times[columns[0]] / rates[n]:.2f}" for n in _SHARES if n in rates]
    failed = "".join(f"\n    {name}: {why}" for name, why in row["failures"].items())
    return f"{row['case']:<27}{row['direction']:<19}" + "".join(f"{c:>20}" for c in cells) + failed


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    suite = SUITES[given.suite]
    unknown = set(given.case or ()) - {case.name for case in suite}
    if unknown:
        parser().error(f"--case must name some of {[c.name for c in suite]}, got {sorted(unknown)}")
    cases = [case for case in suite if given.case is None or case.name in given.case]
    cases = [replace(case, batch=given.batch or case.batch) for case in cases]
    if given.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    keep_memory()
    burst = DeviceClock(given.device).burst if given.device.type == "cuda" else wall
    deadline = time.monotonic() + given.limit
    effort = Effort(given.seconds, given.rounds, not given.no_compile, burst, deadline)
    settings = Settings(given.device, given.dtype, tuple(given.backends))
    sweeps = {} if given.no_sweeps or given.suite != "cpu" else SWEEPS
    for results in run(cases, sweeps, settings, effort):
        write(results, given.out)
    show(results["ceilings"], gate_targets(results))
    failures = [why for row in results["rows"] for why in row["failures"].values()]
    if failures:
        sys.exit(f"{len(failures)} measurements are missing, the first because of: {failures[0]}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--dtype", choices=TOLERANCES, default="float32")
    made.add_argument("--backends", nargs="*", default=[], help="of ours; default: the fastest")
    made.add_argument("--batch", type=int, help="instead of each case's own")
    made.add_argument("--suite", choices=SUITES, default="cpu", help="which cases (cpu)")
    made.add_argument("--case", nargs="*", help="names of the suite; default: all")
    made.add_argument("--seconds", type=float, default=0.2, help="for each contender of a case")
    made.add_argument("--rounds", type=int, default=5, help="at least")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--no-sweeps", action="store_true", help="leave out time over batch, map and window")
    made.add_argument("--limit", type=float, default=math.inf, help="seconds after which nothing is begun")
    made.add_argument("--out", type=Path, help="write the results as JSON")
    return made


if __name__ == "__main__":
    main()
