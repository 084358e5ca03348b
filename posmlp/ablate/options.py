"""The options of `posmlp ablate`. No torch here."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from .plan import Plan
from .scales import SCALES
from .tables import TABLES

_DESCRIPTION = """Train small models that differ in one thing, several seeds each, and write tables of what
came out, in the shape of the PosMLP paper's. Every row has the same recipe, seeds and order of the data.
Runs that FOLDER already holds are not repeated, so that the same command goes on after an interruption."""


def add_ablate(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand; only options that were given appear among the parsed arguments."""
    ablate = commands.add_parser(
        "ablate",
        help="train models that differ in one thing, and tabulate what it does",
        description=_DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    ablate.add_argument("data", nargs="?", metavar="DATA", help="as for posmlp train (default: digits)")
    ablate.add_argument("--out", metavar="FOLDER", help=f"of tables and runs (default: {Plan.out})")
    ablate.add_argument("--scale", choices=list(SCALES), help="of the models (default: by DATA)")
    ablate.add_argument(
        "--tables", nargs="+", choices=list(TABLES), metavar="NAME", help=f"of {', '.join(TABLES)}"
    )
    ablate.add_argument("--seeds", type=int, metavar="N", help=f"runs of a row (default: {Plan.seeds})")
    ablate.add_argument("--epochs", type=int, metavar="N", help="of a run (default: the scale's)")
    ablate.add_argument(
        "--batch-size", type=int, metavar="N", help="images of an update (default: the scale's)"
    )
    ablate.add_argument(
        "--val-split", type=float, metavar="SHARE", help="held out, where DATA has no part for it"
    )
    ablate.add_argument("--jobs", type=int, metavar="N", help=f"runs at a time (default: {Plan.jobs})")
    ablate.add_argument("--workers", type=int, metavar="N", help="processes that load images, for each run")
    ablate.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is)")
    ablate.set_defaults(run=_ablate)


def _ablate(**options: Any) -> int:
    from .command import run

    return run(Plan(**options), shlex.join(["posmlp", *sys.argv[1:]]))
