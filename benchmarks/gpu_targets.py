"""What the package sets out to reach on a GPU, and whether a run of `gpu.py` shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .gate_cases import BACKWARD, BOTH, FORWARD
from .targets import OURS, RIVALS, Target, at_least, at_most

# Of the copy rate by necessary bytes in bfloat16; other precisions may miss their own floor by 0.1 more.
_SHARES = {(FORWARD, ""): 0.85, (FORWARD, ", gelu"): 0.8, (BACKWARD, ""): 0.65}
_FASTER = {("plain, compiled", FORWARD): 3, ("plain, compiled", BOTH): 2.5}
_FASTER |= {("original", FORWARD): 10, ("original", BOTH): 8}
_STAGE = re.compile(r"(PosMLP-[SB], |LRPE, )?stage [123](, trained)?")


def gpu_targets(results: dict) -> list[Target]:
    """Those that the results can answer; of several back ends the fastest counts."""
    targets: list[Target] = []
    for part in parts(results, "gate"):
        for row in part["rows"]:
            targets += _of_gate(row, part)
    for part in parts(results, "launch"):
        for row in part["rows"]:
            where = f"{row['case']}, batch 1, {row['backend']}"
            targets.append(at_most(f"{where}: host time of a forward in us", 1e6 * row["host"], 30))
            if row["kernels"] is not None:
                targets.append(at_most(f"{where}: launches of a forward", len(row["kernels"]), 2))
    for part in parts(results, "models"):
        for row in part["rows"]:
            targets += _of_models(row)
    return targets


def parts(results: dict, kind: str) -> list[dict]:
    """The parts of a run of one kind: "gate", "launch" or "models"."""
    return [part for name, part in results["parts"].items() if name.split()[0] == kind]


def fastest(row: dict, part: dict, ending: str = "") -> str | None:
    """The name of our fastest contender that computed the right thing, if any did."""
    names = [name + ending for name in part["backends"] if name + ending in row["times"]]
    return min(names, key=lambda name: row["times"][name]["median"]) if names else None


def share(row: dict, name: str, ceiling: str) -> float:
    """What part of the copy rate ("copy") or of the matrix rate ("gemm") a contender reaches."""
    amount = row["bytes" if ceiling == "copy" else "flops"]
    return amount / row["times"][name]["median"] / row["ceilings"][ceiling]


def _of_gate(row: dict, part: dict) -> Iterator[Target]:
    where = f"{row['case']}, {row['direction']}, {part['dtype']}"
    ours = fastest(row, part)
    if ours is None:
        return
    if not _STAGE.fullmatch(row["case"]):
        if row["direction"] != BOTH:
            best = max(share(row, ours, "copy"), share(row, ours, "gemm"))
            yield at_least(f"{where}: share of the copy or the matrix rate", best, 0.5)
        return
    for (direction, ending), bound in _SHARES.items():
        name = fastest(row, part, ending)
        if direction == row["direction"] and name is not None:
            what = f"{where}{ending}: share of the "
            if part["dtype"] == "bfloat16":
                yield at_least(what + "copy rate", share(row, name, "copy"), bound)
            else:  # the floor is the slower of moving the bytes and computing the flops
                floor = max(share(row, name, "copy"), share(row, name, "gemm"))
                yield at_least(what + "floor", floor, bound - 0.1)
    for (name, direction), bound in _FASTER.items():
        if direction == row["direction"] and name in row["times"]:
            ratio = row["times"][name]["median"] / row["times"][ours]["median"]
            yield at_least(f"{where}: times as fast as {name}", ratio, bound)


def _of_models(row: dict) -> Iterator[Target]:
    times = {name: time["median"] for name, time in row["times"].items()}
    for how, suffix in (("eager", ""), ("compiled", ", compiled")):
        rivals = [times[name + suffix] for name in RIVALS if name + suffix in times]
        if rivals and OURS + suffix in times:
            what = (
                f"{row['what']}, batch {row['batch']}, {how}: time beside the faster of ConvNeXt-T and Swin-T"
            )
            yield at_most(what, times[OURS + suffix] / min(rivals), 1)
