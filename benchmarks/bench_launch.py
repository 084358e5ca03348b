"""What a call costs the host, and how many kernels it launches: forward at batch 1 without gradients.

    python -m benchmarks.bench_launch [--device cuda] [--out FILE]

Through the public function `pos_gate`, on the four gates of PosMLP-T.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from posmlp_kernels import backends, pos_gate

from .attempts import Attempts
from .device import host_seconds, launches
from .gate_cases import STAGES, Gate
from .timing import machine, write


def measure(case: Gate, backend: str, device: torch.device, dtype: torch.dtype) -> dict:
    """Median host seconds of a call, and its kernels by name (None where nothing tells)."""
    layer = case.layer().to(device)
    table, bias = layer.relative_table().detach(), layer.bias.detach()
    x = torch.randn(1, *(case.map,) * case.rank, 2 * case.channels, device=device, dtype=dtype)
    call = torch.no_grad()(
        partial(pos_gate, x, table, bias, window=case.window, softmax=True, backend=backend)
    )
    call()
    kernels = launches(call) if device.type == "cuda" else None
    return {"case": case.name, "backend": backend, "host": host_seconds(call), "kernels": kernels}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    made.add_argument("--backends", nargs="*", default=list(backends()), help="default: all that run here")
    made.add_argument("--out", type=Path, help="write the results as JSON")
    return made


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    attempts, rows = Attempts(), []
    for backend in given.backends:
        for case in (replace(stage, batch=1) for stage in STAGES):
            row = attempts(
                f"{backend}, {case.name}", measure, case, backend, given.device, getattr(torch, given.dtype)
            )
            if row is not None:
                rows.append(row)
                count = "?" if row["kernels"] is None else len(row["kernels"])
                print(
                    f"{backend:<10}{case.name:<10}{1e6 * row['host']:>9.1f} us of host time, launches {count}"
                )
    for name, why in attempts.failures.items():
        print(f"{name}: {why}")
    results = {"machine": machine(given.device), "device": given.device.type, "dtype": given.dtype}
    write(results | {"rows": rows, "failures": attempts.failures}, given.out)
    if attempts.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
