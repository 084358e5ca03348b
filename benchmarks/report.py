"""The measured parts of README.md and docs/benchmarks.md, and their figures, from the results as JSON.

    python -m benchmarks.report [--gpu FILE]

A measured part stands between `<!-- measured: name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from posmlp.tables import markdown

from .gpu_tables import details_of, load_runs, summary_of
from .targets import GATELESS, ORIGINAL, Target, compiled_targets, gate_targets, model_targets
from .timing import version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MODEL_NAMES = {
    "posmlp_tiny": "**PosMLP-T, ours**",
    "convnext_tiny": "ConvNeXt-T (timm)",
    "swin_tiny_patch4_window7_224": "Swin-T (timm)",
    "gmlp_s16_224": "gMLP-S/16 (timm)",
    ORIGINAL: "PosMLP-T, original's style",
    GATELESS: "PosMLP-T, were its gates for free",
}


def load(name: str) -> dict:
    """One of the committed results: "cpu", "cpu_bf16" (the gate), "cpu_models" or "cpu_compiled", or the same
    of another processor, "xeon" and so on; "avx2" has neither "_bf16" nor "_compiled", "zen4" no "_bf16"."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def load_cpu() -> dict[str, dict]:
    """The CPU's results by their names."""
    all_kinds = [of + kind for of in ("cpu", "xeon") for kind in ("", "_bf16", "_models", "_compiled")]
    others = ("zen4", "zen4_models", "zen4_compiled", "avx2", "avx2_models")
    return {name: load(name) for name in (*all_kinds, *others)}


def fill(text: str, cpu: dict[str, dict], runs: list[dict]) -> str:
    """A document with its measured parts written anew, from the CPU's results and from runs on GPUs.

    Raises: `KeyError` for a part of an unknown name.
    """
    gate, half, models, compiled = (cpu[n] for n in ("cpu", "cpu_bf16", "cpu_models", "cpu_compiled"))
    parts = {
        "gate": lambda: conditions(gate) + gate_table(gate),
        "bfloat16": lambda: half_table(half, gate),
        "models": lambda: model_table(models),
        "compiled": lambda: conditions(compiled) + compiled_table(compiled),
        "cases": lambda: case_table(gate),
        "memory": lambda: memory_table(gate),
        "ceilings": lambda: ceiling_table(gate),
        "targets": lambda: targets_of(cpu, "cpu"),
        "targets_zen4": lambda: targets_of(cpu, "zen4"),
        "targets_xeon": lambda: targets_of(cpu, "xeon"),
        "targets_avx2": lambda: targets_of(cpu, "avx2"),
        "bfloat16_xeon": lambda: half_table(cpu["xeon_bf16"], cpu["xeon"]),
        "gpu": lambda: summary_of(runs),
        "gpu_details": lambda: details_of(runs),
    }

    def part(match: re.Match) -> str:
        return f"<!-- measured: {match[1]} -->\n{parts[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- measured: (\w+) -->.*?<!-- end -->", part, text, flags=re.S)


def conditions(results: dict) -> str:
    """What the figures were measured on, and how steady it was."""
    on, units = results["machine"], {"gemm": "GF/s", "onednn": "GF/s by oneDNN", "copy": "GB/s in a copy"}
    rates = ", ".join(
        f"{rate['median'] / 1e9:.0f} {units[name]} ({rate['least'] / 1e9:.0f} to {rate['most'] / 1e9:.0f})"
        for name, rate in sorted(results["ceilings"].items(), key=lambda item: list(units).index(item[0]))
    )
    return (
        f"Measured on {on['processor']} ({on['instructions']}), threads: {on['threads']}, "
        f"{results['dtype']}, batch 8; torch {on['torch']}, commit {on['commit']}, {on['date']}. "
        f"The machine's ceilings meanwhile, median and range: sgemm {rates}.\n\n"
    )


def gate_table(results: dict) -> str:
    """The four stages of PosMLP-T, as initialised."""
    header = ("gate of PosMLP-T", "ours", "of sgemm", "best plain PyTorch", "original", "original, compiled")
    rows = [row for row in results["rows"] if re.fullmatch(r"stage \d", row["case"])]
    return markdown(header, (_gate_cells(row) for row in rows))


def half_table(half: dict, single: dict) -> str:
    """The stages in bfloat16, beside float32 at its own time."""
    header = ("gate of PosMLP-T, bfloat16", "ours", "best plain PyTorch", "original", "ours in float32")
    in_float32 = {(row["case"], row["direction"]): row for row in single["rows"]}
    cells = (
        [
            f"{row['case']}, {row['direction']}",
            _milliseconds(row),
            _longer(row, "plain"),
            _longer(row, "original"),
            _milliseconds(in_float32[row["case"], row["direction"]]),
        ]
        for row in half["rows"]
    )
    return markdown(header, cells)


def case_table(results: dict) -> str:
    """Every case."""
    header = ("gate", "ours", "of sgemm", "of oneDNN", "of the copy rate", "best plain PyTorch", "original")
    return markdown(header, (_case_cells(row) for row in results["rows"]))


def _gate_cells(row: dict) -> list[str]:
    longer = (_longer(row, name) for name in ("plain", "original", "original, compiled"))
    return [f"{row['case']}, {row['direction']}", _milliseconds(row), _share(row, "gemm"), *longer]


def _case_cells(row: dict) -> list[str]:
    shares = (_share(row, name) for name in ("gemm", "onednn", "copy"))
    longer = (_longer(row, name) for name in ("plain", "original"))
    return [f"{row['case']}, {row['direction']}", _milliseconds(row), *shares, *longer]


def _milliseconds(row: dict) -> str:
    time = row["times"]["ours"]
    return f"{1e3 * time['median']:.2f} ± {500 * time['spread']:.2f} ms"


def _share(row: dict, ceiling: str) -> str:
    if ceiling not in row["ceilings"]:
        return "–"
    amount = row["bytes" if ceiling == "copy" else "flops"]
    return f"{100 * amount / row['times']['ours']['median'] / row['ceilings'][ceiling]:.0f} %"


def _longer(row: dict, name: str) -> str:
    if name not in row["times"]:
        return "–"
    return f"{row['times'][name]['median'] / row['times']['ours']['median']:.1f} x as long"


def memory_table(results: dict) -> str:
    """Peak memory of a gate's forward and backward."""
    rows = [row for row in results["rows"] if "memory" in row]
    names = ("ours", "plain", "original")
    cells = ([row["case"], *(_megabytes(row["memory"][name]) for name in names)] for row in rows)
    return markdown(("forward + backward", "ours", "best plain PyTorch", "original"), cells)


def model_table(results: dict) -> str:
    """Milliseconds of every model in every setting, and peak memory."""
    rows = results["rows"]
    header = ["milliseconds", *map(_setting, rows)]
    header += [f"peak memory, batch {row['batch']}" for row in rows if "memory" in row]
    lines = []
    for name, shown in MODEL_NAMES.items():
        if name in rows[0]["times"]:
            memory = (_megabytes(row["memory"][name]) for row in rows if "memory" in row)
            lines.append([shown, *(_short(row["times"][name]) for row in rows), *memory])
    return markdown(header, lines)


def compiled_table(results: dict) -> str:
    """Milliseconds of the models that were compiled, eager and compiled."""
    rows, lines = results["rows"], []
    for name, shown in MODEL_NAMES.items():
        both = (name, f"{name}, compiled")
        if both[1] in rows[0]["times"]:
            lines.append([shown, *(" / ".join(_short(row["times"][n]) for n in both) for row in rows)])
    return markdown(["ms, eager / `torch.compile`", *map(_setting, rows)], lines)


def _setting(row: dict) -> str:
    return f"{row['what']}, batch {row['batch']}"


def _short(time: dict) -> str:
    return f"{1e3 * time['median']:.0f}"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f} MiB"


def ceiling_table(results: dict) -> str:
    """How far the machine could be relied on."""
    units = {"gemm": "`torch.matmul`, GF/s", "onednn": "oneDNN, GF/s", "copy": "copy, GB/s"}
    columns = ("median", "first", "last", "least", "most")
    cells = (
        [units[name], *(f"{rate[column] / 1e9:.0f}" for column in columns)]
        for name, rate in results["ceilings"].items()
    )
    return markdown(("ceiling", *columns), cells)


def targets_of(cpu: dict[str, dict], processor: str) -> str:
    """All targets of a processor that were measured."""
    gate, models = cpu[processor], cpu[f"{processor}_models"]
    rows = [*gate_targets(gate), *model_targets(models)]
    if f"{processor}_compiled" in cpu:
        rows += compiled_targets(cpu[f"{processor}_compiled"])
    return conditions(gate) + target_table(rows)


def target_table(targets: Iterable[Target]) -> str:
    """What is to be reached, and what was."""
    header = ("quantity", "measured", "target", "at best", "holds")
    return markdown(header, (target.cells_with_best() for target in targets))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=Path, help="print the tables of this run on a GPU, and draw it alone")
    given = parser.parse_args(arguments)
    if given.gpu is None:
        from .plots import draw

        draw(load("cpu"), load("cpu_models"), IMAGES)
    else:
        run = json.loads(given.gpu.read_text())
        print(details_of([run]))
        draw_gpu(run, given.gpu, IMAGES if given.gpu.parent == RESULTS else given.gpu.parent)
    if given.gpu is None or given.gpu.parent == RESULTS:  # a rehearsal's figures belong in no document
        runs = load_runs(RESULTS)
        for document in DOCUMENTS:
            document.write_text(fill(document.read_text(), load_cpu(), runs))


def draw_gpu(run: dict, path: Path, folder: Path) -> None:
    """The run's figure, where matplotlib is installed."""
    if version("matplotlib") is None:
        print("\nmatplotlib cannot be imported: figures are left out")
        return
    from .gpu_plots import draw

    draw(run, folder / f"benchmark_{path.stem}.png")


if __name__ == "__main__":
    main()
