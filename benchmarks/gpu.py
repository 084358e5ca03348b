"""Everything that a GPU can show about this package, in one command and ten minutes.

    python benchmarks/gpu.py [--only build,test,sanitize,gate,models] [--skip ...] [--quick] [--device cpu]

Builds, runs the tests marked `gpu` and compute-sanitizer where there is one, measures gates and models, and
writes `benchmarks/results/<name of the GPU>.json`, figures and tables. Needs the repository, torch, Triton
and pytest; without timm its models are left out, and without matplotlib the figures.

Steps are processes of their own with time limits, and the results are written after each: one that crashes,
hangs or is killed costs itself alone. What need not be timed runs first and side by side, with it a
rehearsal of what is timed, so that kernels and graphs are compiled (and cached) by all cores at once.
`--device cpu --quick` rehearses the whole without a GPU, in `build/gpu`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a file

from benchmarks.gpu_steps import PARTS, Options, Step, build, measurements, preparations
from benchmarks.processes import ROOT, Processes

LOGS = ROOT / "build" / "gpu"


class Run:
    """Runs steps and keeps what they say and write."""

    def __init__(self, processes: Processes, path: Path, about: dict, parts: dict | None = None) -> None:
        self.processes, self.path, self._lock = processes, path, threading.Lock()
        self.results = {"machine": about, "steps": processes.records, "parts": parts or {}}

    def __call__(self, step: Step) -> bool:
        """Whether the step succeeded."""
        out = LOGS / f"{slug(step.name)}.json"
        out.unlink(missing_ok=True)
        record = self.processes.run(step.name, step.command, step.limit, step.environment, out)
        with self._lock:
            if step.kept and out.exists():
                self.results["parts"][step.name] = json.loads(out.read_text())
            self.write()
        return record["outcome"] == "ok"

    def together(self, steps: list[Step], workers: int) -> bool:
        with ThreadPoolExecutor(workers) as pool:
            return all(list(pool.map(self, steps)))

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.path)


def slug(name: str) -> str:
    """As a file's name: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def earlier_parts(path: Path, about: dict) -> dict:
    """What an earlier run measured at the same commit, so that a run of some parts adds to it."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    same = all(earlier["machine"].get(key) == about[key] for key in ("commit", "torch", "triton"))
    known = about["commit"] != "unknown" and not about["commit"].endswith("+")
    return earlier["parts"] if same and known else {}


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    parts = [part for part in given.only if part not in given.skip]
    start, folder = time.monotonic(), ROOT / "benchmarks" / "results" if given.device == "cuda" else LOGS
    processes = Processes(LOGS, start + 60 * given.minutes)
    good = True
    if "build" in parts:
        step = build()
        good = processes.run(step.name, step.command, step.limit, step.environment)["outcome"] == "ok"
    probed = LOGS / "probe.json"
    probed.unlink(missing_ok=True)
    probe = (sys.executable, "-m", "benchmarks.gpu_probe", "--device", given.device, "--out", str(probed))
    if processes.run("probe", probe, 60)["outcome"] != "ok":
        return 1
    about = json.loads(probed.read_text())
    path = folder / f"{slug(about['processor'])}.json"
    options = Options(
        given.device, given.quick, tuple(given.backends or about["backends"]), bool(about["timm"])
    )
    print(f"{about['processor']}, back ends: {', '.join(options.backends) or 'none'}", flush=True)
    run = Run(processes, path, about, earlier_parts(path, about))
    run.write()
    cores = os.cpu_count() or 1
    good &= run.together(preparations(parts, options, cores), max(1, 3 * cores // 4))
    for step in measurements(parts, options):
        good &= run(step)
    report = (sys.executable, "-m", "benchmarks.report", "--gpu", str(path))
    good &= processes.run("report", report, 120, late=True)["outcome"] == "ok"
    print((LOGS / "report.log").read_text())
    print(f"{path}: {time.monotonic() - start:.0f} s in all; logs are in {LOGS}")
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    def parts(text: str) -> list[str]:
        chosen = text.split(",")
        if set(chosen) - set(PARTS):
            raise argparse.ArgumentTypeError(f"must name some of {','.join(PARTS)}, got {text}")
        return chosen

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=parts, default=list(PARTS), help="parts, with commas between")
    parser.add_argument("--skip", type=parts, default=[], help="parts, with commas between")
    parser.add_argument("--quick", action="store_true", help="small batches, a few cases, no torch.compile")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only rehearses")
    parser.add_argument("--backends", nargs="*", help="of ours; default: all for the device")
    parser.add_argument("--minutes", type=float, default=9.7, help="after which the rest is left out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
