"""Compiles every Triton kernel for chips that are not here, as calls of the operator would launch them.

    python -m benchmarks.triton_resources sm_90                       a JSON line per kernel
    python -m benchmarks.triton_resources --out FILE.json             all chips, and the table of docs/gpu.md

A line has the kernel, the call, the registers of a thread, the bytes that did not fit them, and the shared
memory that a program needs and may have. Triton's interpreter must be off; launches are caught after
compilation, so no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from posmlp.tables import markdown
from posmlp_kernels.pos_gate import triton_launch

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "gpu.md"
COMMITTED = ROOT / "benchmarks" / "results" / "triton_resources.json"
# The chip, and the kilobytes of shared memory that a program may have on it.
CHIPS = {
    "sm_75": (GPUTarget("cuda", 75, 32), 64),
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_86": (GPUTarget("cuda", 86, 32), 99),
    "sm_89": (GPUTarget("cuda", 89, 32), 99),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "sm_120": (GPUTarget("cuda", 120, 32), 99),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64),
}


@dataclass(frozen=True)
class Launch:
    """A call whose kernels are compiled, and why it is worth it."""

    why: str
    window: int
    dtype: torch.dtype
    activation: int = 0
    norm: bool = False
    shift: tuple[int, int] = (0, 0)
    softmax: bool = True
    tf32: bool = False
    group_channels: int = 24


CALLS = (
    Launch("stages 1 to 3", 14, torch.bfloat16),
    Launch("stages 1 to 3, GELU", 14, torch.bfloat16, activation=1),
    Launch("stage 4, norm", 7, torch.bfloat16, norm=True, group_channels=12),
    Launch("window 24, shifted", 24, torch.float16, shift=(12, 12)),
    Launch("window 32, learned", 32, torch.float16, softmax=False),
    Launch("stages 1 to 3, TF32", 14, torch.float32, tf32=True),
    Launch("stages 1 to 3, IEEE, tanh GELU", 14, torch.float32, activation=2),
)
FEW = CALLS[1:4]  # every kernel, in little time


class NoGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch(call: Launch) -> None:
    """Forward and backward with all gradients, on a map of four windows."""
    window, channels, tokens = (call.window,) * 2, 2 * call.group_channels, call.window**2
    side = 2 * call.window + any(call.shift)
    x = torch.zeros(2, side, side, 2 * channels, dtype=call.dtype)
    table, bias = torch.zeros(2, *(2 * w - 1 for w in window)), torch.zeros(tokens)
    norm = torch.zeros(2, channels) if call.norm else (None, None)
    eps = 1e-5 if call.norm else -1.0
    inputs = (x, table, bias, None, *norm, window, call.shift, call.softmax, call.activation, eps)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if call.tf32 else "ieee"
    triton_launch.forward(*inputs)
    triton_launch.backward(torch.zeros(2, side, side, channels, dtype=call.dtype), *inputs, True)


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, and bytes of shared memory of a program; where there is
    PTX, the stores to device memory in its text, and those of them that are of 16 bytes."""
    stores = re.findall(r"st\.global\S*", kernel.asm.get("ptx", ""))
    if "amdgcn" in kernel.asm:
        found = [
            re.search(rf"\.{n}:\s+(\d+)", kernel.asm["amdgcn"]) for n in ("vgpr_count", "vgpr_spill_count")
        ]
        registers, spilled = int(found[0][1]), 4 * int(found[1][1])
    else:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": kernel.metadata.shared,
        "stores": len(stores),
        "wide_stores": sum(".v4.b32" in store for store in stores),
    }


def compile_for(chip: str, calls: tuple[Launch, ...]) -> None:
    """Print a line for every kernel that the calls launch."""
    target, kilobytes = CHIPS[chip]
    driver.set_active(NoGpu(target))
    compile_and_run = JITFunction.run
    now: list[Launch] = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        line = {"chip": chip, "kernel": self.__name__, "call": now[-1].why}
        print(json.dumps(line | resources(kernel) | {"limit": kilobytes * 1024}), flush=True)
        return kernel

    JITFunction.run = compile_only
    for call in calls:
        now.append(call)
        launch(call)


def compile_for_all() -> dict:
    """What `compile_for` prints for every chip, one process after another."""
    kernels = []
    for chip in CHIPS:
        command = [sys.executable, "-m", "benchmarks.triton_resources", chip]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kernels += [json.loads(line) for line in text.splitlines()]
    return {"triton": triton.__version__, "torch": torch.__version__, "kernels": kernels}


def fill(text: str, results: dict) -> str:
    """docs/gpu.md with its table written anew."""
    found = {(k["chip"], k["call"], k["kernel"]): k for k in results["kernels"]}
    shown = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

    def cell(chip: str, call: Launch, kernel: str) -> str:
        it = found[chip, call.why, kernel]
        return f"{it['registers']}, {it['spilled']}, {it['shared'] / 1024:.0f}"

    rows = [
        [f"{call.why}: {name}", *(cell(chip, call, f"{name}_kernel") for chip in shown)]
        for call in CALLS
        for name in ("gate", "backward")
    ]
    filled = markdown(("call: kernel", *shown), rows)
    return re.sub(
        r"<!-- compiled -->.*?<!-- end -->", f"<!-- compiled -->\n{filled}\n<!-- end -->", text, flags=re.S
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chip", nargs="?", choices=CHIPS)
    parser.add_argument("--out", type=Path, help="write all chips' kernels to this JSON file")
    parser.add_argument("--few", action="store_true", help="only calls that together launch every kernel")
    arguments = parser.parse_args()
    if arguments.chip:
        compile_for(arguments.chip, FEW if arguments.few else CALLS)
    elif arguments.out:
        results = compile_for_all()
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), results))
    else:
        parser.error("name a chip, or a file with --out")


if __name__ == "__main__":
    main()
