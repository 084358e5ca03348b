"""Tables of what `gpu.py` measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from posmlp.tables import markdown

from .gate_cases import BACKWARD, FORWARD
from .gpu_targets import fastest, gpu_targets, parts, share

NOT_YET = "Not yet measured on a GPU: `make gpu` does it in ten minutes and fills in this part."
_BASELINES = ("plain", "plain, compiled", "original", "original, compiled", "reference")


def load_runs(folder: Path) -> list[dict]:
    """What runs on GPUs have left in a folder, one per GPU."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [results for results in found if isinstance(results, dict) and "parts" in results]


def summary_of(runs: Iterable[dict]) -> str:
    """For the README: the stages of PosMLP-T and the models, of every GPU."""
    texts = [conditions(run) + stage_table(run) + "\n\n" + model_table(run) for run in runs]
    return "\n\n".join(texts) or NOT_YET


def details_of(runs: Iterable[dict]) -> str:
    """Everything, of every GPU."""
    texts = []
    for run in runs:
        tables = (stage_table, case_table, launch_table, model_table, target_table, step_table)
        texts.append(conditions(run) + "\n\n".join(filter(None, (make(run) for make in tables))))
    return "\n\n".join(texts) or NOT_YET


def conditions(run: dict) -> str:
    """What it was measured on, and the ceilings in the same run."""
    on, ceilings = (
        run["machine"],
        [(p["dtype"], p["ceilings"]) for p in parts(run, "gate") if p.get("ceilings")],
    )
    copies = [f"{rates['copy']['median'] / 1e9:.0f} GB/s in a copy" for _, rates in ceilings[:1]]
    products = [f"{dtype} {rates['gemm']['median'] / 1e12:.0f} TFLOP/s" for dtype, rates in ceilings]
    measured = ", ".join(copies + list(dict.fromkeys(products))) or "none"
    versions = f"torch {on['torch']}, Triton {on['triton']}, commit {on['commit']}, {on['date']}"
    return f"**{on['processor']}**; {versions}. Ceilings in the same run: {measured}.\n\n"


def stage_table(run: dict) -> str:
    """The gates of PosMLP-T in bfloat16, by our fastest back end."""
    header = ("gate of PosMLP-T", "time", "of the copy rate", *(f"{name} takes" for name in _BASELINES[:4]))
    rows = []
    for part in parts(run, "gate"):
        for row in part["rows"] if part["dtype"] == "bfloat16" else ():
            name = fastest(row, part)
            if name and re.fullmatch(r"stage \d", row["case"]):
                title = f"{row['case']}, {row['direction']} ({name})"
                copied = f"{100 * share(row, name, 'copy'):.0f} %"
                rows.append([title, _time(row, name), copied, *_ratios(row, name, _BASELINES[:4])])
    return markdown(header, rows)


def case_table(run: dict) -> str:
    """Every gate in every direction and precision by every one of our back ends."""
    header = ("gate", "by", "time", "necessary MB", "GB/s", "of the copy rate", "of the matrix rate")
    header += (*(f"{name} takes" for name in _BASELINES), "error beside eager's")
    rows = []
    for part in parts(run, "gate"):
        for row in part["rows"]:
            for name in (n + ending for n in part["backends"] for ending in ("", ", gelu")):
                title = f"{row['case']}, {row['direction']}, {part['dtype']}, batch {row['shape']['batch']}"
                if name in row["times"]:
                    rows.append([title, name, *_cells(row, name)])
                elif name in row["failures"]:
                    rows.append([title, name, row["failures"][name].replace("|", "/"), *[""] * 10])
    return markdown(header, rows)


def _cells(row: dict, name: str) -> list[str]:
    seconds = row["times"][name]["median"]
    rates = [f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / seconds / 1e9:.0f}"]
    shares = [f"{100 * share(row, name, ceiling):.0f} %" for ceiling in ("copy", "gemm")]
    wanted = {FORWARD: ("z",), BACKWARD: [key for key in row["errors"].get(name, {}) if key != "z"]}
    errors = row["errors"].get(name, {})
    worst = max((errors[key] for key in wanted.get(row["direction"], errors) if key in errors), default=None)
    return [
        _time(row, name),
        *rates,
        *shares,
        *_ratios(row, name, _BASELINES),
        "checked" if worst is None else f"{worst:.1f} x",
    ]


def _time(row: dict, name: str) -> str:
    time = row["times"][name]
    return f"{1e6 * time['median']:.1f} ± {5e5 * time['spread']:.1f} µs"


def _ratios(row: dict, name: str, baselines: Iterable[str]) -> list[str]:
    own = row["times"][name]["median"]
    times = (row["times"].get(baseline) for baseline in baselines)
    return ["–" if time is None else f"{time['median'] / own:.1f} x" for time in times]


def launch_table(run: dict) -> str:
    """What a forward at batch 1 costs the host."""
    rows = [
        [
            row["case"],
            row["backend"],
            f"{1e6 * row['host']:.1f} µs",
            "–" if row["kernels"] is None else str(len(row["kernels"])),
        ]
        for part in parts(run, "launch")
        for row in part["rows"]
    ]
    return markdown(("forward at batch 1", "by", "host time", "launches"), rows) if rows else ""


def model_table(run: dict) -> str:
    """Images a second, eager and compiled, and the peak memory of each."""
    rows = []
    for part in parts(run, "models"):
        for row in part["rows"]:
            for name in dict.fromkeys(name.removesuffix(", compiled") for name in row["times"]):
                both = (name, f"{name}, compiled")
                rates = (_rate(row, each) for each in both)
                memory = (_gigabytes(row.get("memory", {}).get(each)) for each in both)
                rows.append([f"{row['what']}, batch {row['batch']}", name, *rates, *memory])
    header = ("model", "", "images/s, eager", "images/s, compiled", "peak, eager", "peak, compiled")
    return markdown(header, rows) if rows else ""


def _rate(row: dict, name: str) -> str:
    return f"{row['batch'] / row['times'][name]['median']:.0f}" if name in row["times"] else "–"


def _gigabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.1f} GiB"


def target_table(run: dict) -> str:
    """What is to be reached, and what was."""
    return markdown(("quantity", "measured", "target", "holds"), (t.cells() for t in gpu_targets(run)))


def step_table(run: dict) -> str:
    """The steps of the run: tests, sanitizers, measurements."""
    rows = ([s["step"], s["outcome"], f"{s['seconds']} s", s["said"].replace("|", "/")] for s in run["steps"])
    return markdown(("step", "outcome", "took", "its last line"), rows)
