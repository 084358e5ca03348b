"""`posmlp ablate`: perform the runs of a plan that are missing, and write the tables."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from pathlib import Path

from ..data import optional
from ..data.sources import open_data
from ..files import write_text
from ..train.run import NEEDS
from .plan import Plan, Run
from .report import Results, as_csv, as_markdown
from .runs import Outcome, finished, perform_all

_PACKAGES = ("posmlp-kernels", "torch", "timm", "torchvision")


def run(plan: Plan, command: str = "posmlp ablate") -> int:
    """Write `ablation.md`, `ablation.csv` and the runs into the plan's folder. Returns the exit status.

    Args:
        command: how the user called it, for the reader of the tables.

    Raises: what `train` raises before the first run; `ValueError` naming a run that failed, or where the
        folder holds runs of other settings or versions.
    """
    for name in NEEDS:
        optional(name, "train")
    images = tuple(len(part.labels) for part in open_data(plan.data, plan.val_split))
    folder = Path(plan.out)
    folder.mkdir(parents=True, exist_ok=True)
    versions = _same_versions(folder / "versions.json")
    runs = plan.runs()
    outcomes = {str(run): outcome for run in runs if (outcome := finished(run)) is not None}
    _perform(plan, [run for run in runs if str(run) not in outcomes], outcomes)
    results = Results(plan, [(run, outcomes[str(run)]) for run in runs], images, versions)
    text = as_markdown(results, command)
    write_text(folder / "ablation.md", text)
    write_text(folder / "ablation.csv", as_csv(results))
    print(f"\n{text}\nwrote {folder / 'ablation.md'} and {folder / 'ablation.csv'}")
    return 0


def _perform(plan: Plan, missing: list[Run], outcomes: dict[str, Outcome]) -> None:
    """Perform what is missing, adding to `outcomes`, with a line for each run."""
    start = time.monotonic()
    print(f"{len(missing)} runs to do, {plan.jobs} at a time; {len(outcomes)} were done before", flush=True)
    done = 0

    def on_end(run: Run, outcome: Outcome) -> None:
        nonlocal done
        outcomes[str(run)] = outcome
        done += 1
        left = (time.monotonic() - start) / done * (len(missing) - done) / 60
        print(
            f"{done}/{len(missing)}  {run}: top-1 {outcome.top1:.2f} %, about {left:.0f} min left", flush=True
        )

    perform_all(missing, plan.jobs, on_end)


def _same_versions(path: Path) -> dict[str, str]:
    """The versions in use, written beside the runs. Raises: `ValueError` where these are of others."""
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    if path.is_file():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if theirs != versions:
            raise ValueError(f"{path.parent} holds runs of {theirs}, not {versions}: give another --out")
    write_text(path, json.dumps(versions, indent=2) + "\n")
    return versions
