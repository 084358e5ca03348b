"""What the package sets out to reach on a CPU in float32, and whether a run of the benchmarks shows it.

Beside each quantity stands what it would be at best: a bound beyond it is out of the machine's reach. For a
gate it is with all multiplications, of the products but for weights of P that cannot show and of the way in
and out, at the fastest product rate of the same run, and nothing else. For a model: what it took in the same
run with gates that take no time, so that PyTorch's layers are all there is, and the gates' multiplications,
GELU's among them, at that rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

STAGES = ("stage 1", "stage 2", "stage 3")
RIVALS = ("convnext_tiny", "swin_tiny_patch4_window7_224")
OURS, ORIGINAL = "posmlp_tiny", "original PosMLP-T"
GATELESS = "posmlp_tiny, gates for free"


@dataclass(frozen=True)
class Target:
    """A measured quantity beside the bound that it has to keep, and what it would be at best."""

    what: str
    value: float
    bound: float
    at_least: bool
    best: float | None = None
    applies: bool = True

    @property
    def verdict(self) -> str:
        """Whether the bound is kept; if not, whether it could be, and was meant for this at all."""
        if self._keeps(self.value):
            return "yes"
        if not self.applies:
            return "not asked"
        return "no" if self.best is None or self._keeps(self.best) else "out of reach"

    def _keeps(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def cells(self) -> tuple[str, str, str, str]:
        """What, how much, the bound, and whether it holds."""
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:g}"
        return self.what, f"{self.value:.2f}", bound, self.verdict

    def cells_with_best(self) -> tuple[str, str, str, str, str]:
        """As `cells`, with the best that there could be before the verdict."""
        *cells, holds = self.cells()
        return *cells, "" if self.best is None else f"{self.best:.2f}", holds


def at_least(what: str, value: float, bound: float, best: float | None = None) -> Target:
    return Target(what, value, bound, True, best)


def at_most(what: str, value: float, bound: float, best: float | None = None, applies: bool = True) -> Target:
    return Target(what, value, bound, False, best, applies)


def time_of_products(row: dict) -> float:
    """Seconds that a row's multiplications take at the fastest product rate."""
    return (row.get("kept_flops", row["flops"]) + row.get("flops_around", 0.0)) / _product_rate(row)


def _product_rate(row: dict) -> float:
    return max(rate for name, rate in row["ceilings"].items() if name != "copy")


def gate_targets(results: dict) -> list[Target]:
    """Those of the gate that the results can answer, from what `bench_pos_gate` writes."""
    return [target for row in _rows(results) for target in _of_row(row)]


def _of_row(row: dict) -> Iterator[Target]:
    case, forward = row["case"], row["direction"] == "forward"
    times = {name: time["median"] for name, time in row["times"].items()}
    if "ours" not in times:
        return
    stage, ours = case.removesuffix(", trained"), times["ours"]
    gemm, products = row["flops"] / row["ceilings"]["gemm"], time_of_products(row)
    share, most = gemm / ours, gemm / products
    where = f"{case}, {row['direction']}"
    if stage == "stage 4":
        if forward:
            copy = row["bytes"] / row["ceilings"]["copy"]
            cached = ours / times["bytes copied"]
            what = f"{where}: times the time to copy its bytes ({cached:.1f} if caches hold them)"
            yield at_most(what, ours / copy, 2, products / copy)
    elif stage in STAGES:
        yield at_least(f"{where}: share of the sgemm rate", share, 0.75 if forward else 0.6, most)
        original, bound = times["original"], 9 if forward else 4
        what = f"{where}: times as fast as the original"
        yield at_least(what, original / ours, bound, original / products)
    elif forward:
        yield at_least(f"{where}: share of the sgemm rate", share, 0.5, most)
    if "ours, gelu" in times and forward:
        alone = 100 * times["gelu alone"] / ours
        percent = 100 * (times["ours, gelu"] / ours - 1)
        what = f"{where}: % that a fused GELU adds (eager GELU alone: {alone:.0f} %)"
        yield at_most(what, percent, 15, applies=alone > 100)


def model_targets(results: dict) -> list[Target]:
    """Those of the whole models, from what `bench_models` writes."""
    return [target for row in _rows(results) for target in _of_models(row)]


def compiled_targets(results: dict) -> list[Target]:
    """Those beside compiled rivals alone."""
    return [target for target in model_targets(results) if target.what.endswith(", compiled")]


def _rows(results: dict) -> list[dict]:
    return results["rows"] if (results["device"], results["dtype"]) == ("cpu", "float32") else []


def _of_models(row: dict) -> Iterator[Target]:
    where = f"{row['what']}, batch {row['batch']}"
    training = row["what"] == "training step"
    times = {name: time["median"] for name, time in row["times"].items()}
    if OURS not in times:
        return
    best = time_of_products(row)
    if GATELESS in times:
        best = times[GATELESS] + row.get("gate_flops", 0.0) / _product_rate(row)
    for how, suffix, bound in (("eager", "", 0.85 if training else 0.8), ("compiled", ", compiled", 0.95)):
        rivals = [times[name + suffix] for name in RIVALS if name + suffix in times]
        if rivals:
            ours = min(times[name] for name in (OURS, OURS + suffix) if name in times)
            what = f"{where}: time beside the faster of ConvNeXt-T and Swin-T, {how}"
            # `best` was found in eager mode, and a compiler saves some of that.
            yield at_most(what, ours / min(rivals), bound, None if ours < times[OURS] else best / min(rivals))
    if ORIGINAL in times:
        original, bound = times[ORIGINAL], 2.2 if training else 3
        what = f"{where}: times as fast as the original"
        yield at_least(what, original / times[OURS], bound, original / best)
    memory = row.get("memory", {})
    if memory.get(OURS) and memory.get(ORIGINAL):
        share = memory[OURS] / memory[ORIGINAL]
        yield at_most(f"{where}: peak memory beside the original's", share, 0.6)


def show(ceilings: dict, targets: list[Target]) -> None:
    """Print the machine's ceilings and the targets."""
    rates = (f"{name} {rate['median'] / 1e9:.0f}" for name, rate in ceilings.items())
    print(f"\nceilings: {', '.join(rates)} (GF/s; copy GB/s)\n")
    print(f"{'':<109}at best")
    for what, value, bound, best, holds in (target.cells_with_best() for target in targets):
        print(f"{what:<84}{value:>8}   {bound:<14}{best:>8}   {holds}")
