"""PosMLP against ConvNeXt-T, Swin-T, gMLP-S and itself in the original's manner.

    python -m benchmarks.bench_models [--out FILE]

Inference, and a training step: forward, cross entropy, backward, AdamW. Contenders take turns, round after
round; the original's outputs are held to ours and a compiled model's to its eager one's before timing. One
that fails is named and left out. On a GPU all convolutions are in channels-last layout.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posmlp import create_model
from posmlp.cost import complexity
from posmlp.data import optional
from posmlp.original_style import OriginalStylePosMLP
from posmlp_kernels import PosSGU, mixing_matrix, use_backend

from .attempts import Attempts
from .baselines import FreeGate
from .device import built_and_weighed
from .gate_cases import BOTH, FORWARD, PRODUCTS, flops_around
from .structure import multiplied
from .targets import GATELESS, ORIGINAL, OURS, RIVALS, model_targets, show
from .timing import Ceilings, machine, peak_memory, race, summary, version, write

T = TypeVar("T")

NAMES = (OURS, *RIVALS, "gmlp_s16_224", ORIGINAL, GATELESS)
SIZES = ("posmlp_small", "posmlp_base")
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest entry


@dataclass(frozen=True)
class Setting:
    """What is measured: inference or a training step, on a batch of images."""

    training: bool
    batch: int
    size: int
    device: torch.device
    dtype: torch.dtype
    backend: str | None = None  # of our gates; None takes the fastest

    def __str__(self) -> str:
        return "training step" if self.training else "inference"


def build(name: str, setting: Setting) -> nn.Module:
    """A model with random weights, the same on every call."""
    torch.manual_seed(0)
    if name in (ORIGINAL, GATELESS):
        model = create_model(OURS)
        model = OriginalStylePosMLP.like(model) if name == ORIGINAL else FreeGate.replace_gates(model)
    elif name.startswith("posmlp_"):
        model = create_model(name)
    else:
        # No random depth, which ours has only on request, so that losses can be compared.
        model = optional("timm", "models").create_model(name, drop_path_rate=0.0)
        nn.init.trunc_normal_(model.get_classifier().weight, std=0.02)  # gMLP's zeros would hide differences
    layout = torch.channels_last if setting.device.type == "cuda" else torch.preserve_format
    return model.to(setting.device, setting.dtype, memory_format=layout).train(setting.training)


def flops_of_ours(setting: Setting) -> int:
    """Of the products in PosMLP-T: those that the position maps take are few through the relative table."""
    costs = complexity(create_model(OURS), setting.size)
    macs = sum(cost.macs - cost.map_macs for cost in costs)
    return 2 * macs * setting.batch * (3 if setting.training else 1)


def flops_of_gates(setting: Setting) -> float:
    """Of PosMLP-T's gates on tiled maps, GELU included, but for weights of P that cannot show."""
    model, flops, direction = create_model(OURS).eval(), [], BOTH if setting.training else FORWARD

    def record(gate: PosSGU, _: object, output: Tensor) -> None:
        weights = mixing_matrix(gate.relative_table().double(), gate.window, gate.softmax)
        done = weights.shape[-1] * multiplied(weights, gate.window)
        flops.append(2.0 * output.numel() * done * PRODUCTS[direction])
        flops.append(flops_around(output.numel(), direction, gelu=True))

    for module in model.modules():
        if isinstance(module, PosSGU):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(torch.zeros(1, 3, setting.size, setting.size))
    return sum(flops) * setting.batch


def work_of(name: str, setting: Setting, compiled: bool = False) -> Callable[[], Tensor]:
    """A call of it does the work once and returns logits `[batch, classes]`, or the loss before the step."""
    model = build(name, setting)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    y = torch.randint(10, (setting.batch,), generator=generator).to(setting.device)  # classes that all have
    x = x.to(setting.device, setting.dtype)
    if setting.device.type == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
    function = torch.compile(model, dynamic=False) if compiled else model
    if not setting.training:
        return use_backend(setting.backend)(torch.no_grad()(partial(function, x)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    @use_backend(setting.backend)
    def step() -> Tensor:
        loss = F.cross_entropy(function(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def check(works: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype, attempts: Attempts) -> list[str]:
    """The names of those that compute what they should: the original what ours does, compiled what eager."""
    outputs = {name: attempts(name, lambda work=work: work().float()) for name, work in works.items()}
    outputs = {name: output for name, output in outputs.items() if output is not None}
    return [name for name in outputs if attempts(name, _agrees, name, outputs, dtype)]


def _agrees(name: str, outputs: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    eager = name.removesuffix(", compiled")
    wanted = outputs[OURS if eager == ORIGINAL and OURS in outputs else eager]
    error = ((outputs[name] - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= _TOLERANCES[dtype]:
        raise RuntimeError(f"{name} computes something else: error {error:.1e}")
    return True


def measure(
    names: list[str],
    compiled: list[str],
    setting: Setting,
    seconds: float,
    rounds: int,
    deadline: float = math.inf,
) -> dict:
    """A row of the results: times in seconds, the ceilings meanwhile, and peak memory: on a GPU of every
    contender, otherwise of a training step."""
    torch._dynamo.reset()
    on_gpu, attempts = setting.device.type == "cuda", Attempts(deadline)
    works, memory = {}, {}
    for name, by_compiler in [*((name, False) for name in names), *((name, True) for name in compiled)]:
        shown = f"{name}, compiled" if by_compiler else name
        built = attempts(shown, built_and_weighed if on_gpu else _built, work_of, name, setting, by_compiler)
        if built is not None:
            works[shown], memory[shown] = built
    right = check(works, setting.dtype, attempts)
    ceilings = Ceilings(setting.device, setting.dtype)
    racing = {name: works[name] for name in right} | ceilings.works
    times = attempts("race", race, racing, seconds, rounds) or {}
    row = {
        "what": str(setting),
        "batch": setting.batch,
        "flops": flops_of_ours(setting),
        "gate_flops": flops_of_gates(setting),
        "times": {name: asdict(times[name]) for name in right if name in times},
        "ceilings": ceilings.rates(times) if times else {},
        "failures": attempts.failures,
    }
    if on_gpu:
        row["memory"] = {name: memory[name] for name in right}
    elif setting.training:
        row["memory"] = {name: peak_memory(work_of, name, setting) for name in names if name in right}
    return row


def _built(build: Callable[..., T], *arguments: object) -> tuple[T, None]:
    return build(*arguments), None


def lines(row: dict) -> list[str]:
    """A row for the screen."""
    ours = row["times"][OURS]["median"] if OURS in row["times"] else float("nan")
    title = f"{row['what']}, batch {row['batch']}"
    out = [f"\n{title:<39}{'ms':>9}{'spread':>9}{'of ours':>9}{'peak MB':>9}"]
    for name, took in row["times"].items():
        memory = row.get("memory", {}).get(name)
        cells = f"{1e3 * took['median']:>9.1f}{1e3 * took['spread']:>9.1f}{took['median'] / ours:>9.2f}"
        out.append(f"{name:<39}{cells}{'' if memory is None else f'{memory / 2**20:>9.0f}'}")
    return out + [f"    {name}: {why}" for name, why in row["failures"].items()]


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    timm = version("timm")
    if timm is None:
        print("timm cannot be imported: its models are left out")
    names = [name for name in given.models if timm or name == ORIGINAL or name.startswith("posmlp_")]
    compiled = [name for name in names if given.compile is None or name in given.compile]
    if GATELESS in compiled:  # it is there to say what eager layers take
        compiled.remove(GATELESS)
    deadline, dtype = time.monotonic() + given.limit, getattr(torch, given.dtype)
    results = {
        "machine": machine(given.device),
        "timm": timm,
        "device": given.device.type,
        "dtype": given.dtype,
        "backend": given.backend,
        "size": given.size,
        "rows": (rows := []),
    }
    for training, batches in ((False, given.batch), (True, given.train_batch)):
        for batch in batches:
            setting = Setting(training, batch, given.size, given.device, dtype, given.backend)
            rows.append(measure(names, compiled, setting, given.seconds, given.rounds, deadline))
            print("\n".join(lines(rows[-1])), flush=True)
            results["ceilings"] = summary([row["ceilings"] for row in rows if row["ceilings"]])
            write(results, given.out)
    show(results["ceilings"], model_targets(results))
    failures = [why for row in rows for why in row["failures"].values()]
    if failures:
        sys.exit(f"{len(failures)} measurements are missing, the first because of: {failures[0]}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = (*NAMES, *SIZES)
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    made.add_argument("--backend", help="of our gates; default: the fastest")
    made.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="of inference; default: 1 8")
    made.add_argument("--train-batch", type=int, nargs="*", default=[8], help="of training; default: 8")
    made.add_argument("--size", type=int, default=224, help="side of the images; Swin and gMLP need 224")
    made.add_argument("--models", nargs="*", default=list(NAMES), choices=choices, help="default: T's")
    made.add_argument("--compile", nargs="*", choices=choices, help="what to compile; default: every model")
    made.add_argument("--no-compile", action="store_const", dest="compile", const=[], help="none")
    made.add_argument("--seconds", type=float, default=1.5, help="for each contender of a setting")
    made.add_argument("--rounds", type=int, default=5, help="at least")
    made.add_argument("--limit", type=float, default=math.inf, help="seconds after which nothing is begun")
    made.add_argument("--out", type=Path, help="write the results as JSON")
    return made


if __name__ == "__main__":
    main()
