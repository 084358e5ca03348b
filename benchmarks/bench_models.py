"""PosMLP-T against ConvNeXt-T, Swin-T, gMLP-S and itself in the original's manner.

    python -m benchmarks.bench_models [--out FILE]

Inference, and a training step: forward, cross entropy, backward, AdamW. Contenders take turns, round after
round; the original's outputs are held to ours and a compiled model's to its eager one's before timing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posmlp import create_model
from posmlp.data import optional
from posmlp.original_style import OriginalStylePosMLP

from .targets import ORIGINAL, OURS, RIVALS, model_targets, show
from .timing import Ceilings, machine, peak_memory, race, summary

NAMES = (OURS, *RIVALS, "gmlp_s16_224", ORIGINAL)
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # of the largest entry


@dataclass(frozen=True)
class Setting:
    """What is measured: inference or a training step, on a batch of images."""

    training: bool
    batch: int
    size: int
    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return "training step" if self.training else "inference"


def build(name: str, setting: Setting) -> nn.Module:
    """A model with random weights, the same on every call."""
    torch.manual_seed(0)
    if name in (OURS, ORIGINAL):
        model = create_model(OURS)
        model = OriginalStylePosMLP.like(model) if name == ORIGINAL else model
    else:
        # No random depth, which ours has only on request, so that losses can be compared.
        model = optional("timm", "models").create_model(name, drop_path_rate=0.0)
        nn.init.trunc_normal_(model.get_classifier().weight, std=0.02)  # gMLP's zeros would hide differences
    return model.to(setting.device, setting.dtype).train(setting.training)


def work_of(name: str, setting: Setting, compiled: bool = False) -> Callable[[], Tensor]:
    """A call of it does the work once and returns logits `[batch, classes]`, or the loss before the step."""
    model = build(name, setting)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    y = torch.randint(10, (setting.batch,), generator=generator).to(setting.device)  # classes that all have
    x = x.to(setting.device, setting.dtype)
    function = torch.compile(model, dynamic=False) if compiled else model
    if not setting.training:
        return torch.no_grad()(partial(function, x))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> Tensor:
        loss = F.cross_entropy(function(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def check(works: Mapping[str, Callable[[], Tensor]], dtype: torch.dtype) -> None:
    """Hold the original to ours, and what is compiled to what is not.

    Raises: `RuntimeError` for a contender that computes something else.
    """
    outputs = {name: work().float() for name, work in works.items()}
    for name, output in outputs.items():
        eager = name.removesuffix(", compiled")
        wanted = outputs[OURS if eager == ORIGINAL and OURS in outputs else eager]
        error = ((output - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= _TOLERANCES[dtype]:
            raise RuntimeError(f"{name} computes something else: error {error:.1e}")


def measure(names: list[str], compiled: list[str], setting: Setting, seconds: float, rounds: int) -> dict:
    """A row of the results: times in seconds, the ceilings meanwhile, and a training step's peak memory."""
    torch._dynamo.reset()
    works = {name: work_of(name, setting) for name in names}
    works |= {f"{name}, compiled": work_of(name, setting, True) for name in compiled}
    check(works, setting.dtype)
    ceilings = Ceilings(setting.device, setting.dtype)
    times = race(works | ceilings.works, seconds, rounds)
    row = {
        "what": str(setting),
        "batch": setting.batch,
        "times": {name: asdict(times[name]) for name in works},
        "ceilings": ceilings.rates(times),
    }
    if setting.training:
        row["memory"] = {name: peak_memory(work_of, name, setting) for name in names}
    return row


def lines(row: dict) -> list[str]:
    """A row for the screen."""
    ours = row["times"][OURS]["median"] if OURS in row["times"] else float("nan")
    title = f"{row['what']}, batch {row['batch']}"
    out = [f"\n{title:<39}{'ms':>9}{'spread':>9}{'of ours':>9}{'peak MB':>9}"]
    for name, time in row["times"].items():
        memory = row.get("memory", {}).get(name)
        cells = f"{1e3 * time['median']:>9.1f}{1e3 * time['spread']:>9.1f}{time['median'] / ours:>9.2f}"
        out.append(f"{name:<39}{cells}{'' if memory is None else f'{memory / 2**20:>9.0f}'}")
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="of inference; default: 1 8")
    parser.add_argument("--train-batch", type=int, nargs="*", default=[8], help="of training; default: 8")
    parser.add_argument("--size", type=int, default=224, help="side of the images; Swin and gMLP need 224")
    parser.add_argument("--models", nargs="*", default=list(NAMES), choices=NAMES, help="default: all")
    parser.add_argument("--compile", nargs="*", choices=NAMES, help="what to compile; default: every model")
    parser.add_argument("--no-compile", action="store_const", dest="compile", const=[], help="none")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each contender of a setting")
    parser.add_argument("--rounds", type=int, default=3, help="at least")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    given = parser.parse_args(arguments)
    compiled = [n for n in given.models if given.compile is None or n in given.compile]
    rows = []
    for training, batches in ((False, given.batch), (True, given.train_batch)):
        for batch in batches:
            setting = Setting(training, batch, given.size, given.device, getattr(torch, given.dtype))
            rows.append(measure(given.models, compiled, setting, given.seconds, given.rounds))
            print("\n".join(lines(rows[-1])), flush=True)
    results = {
        "machine": machine(given.device),
        "timm": optional("timm", "models").__version__,
        "device": given.device.type,
        "dtype": given.dtype,
        "size": given.size,
        "ceilings": summary([row["ceilings"] for row in rows]),
        "rows": rows,
    }
    show(results["ceilings"], model_targets(results))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
