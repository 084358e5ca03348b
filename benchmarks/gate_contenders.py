"""The functions that compute a gate, ours and what it is measured against, with inputs of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posmlp.original_style import OriginalStyleGate, interleaved

from . import baselines
from .gate_cases import Gate

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest entry


@dataclass(frozen=True)
class Settings:
    """Where and how a benchmark runs."""

    device: torch.device
    dtype: torch.dtype
    backend: str | None = None  # of ours; None takes the fastest


@dataclass(frozen=True)
class Contender:
    """A gate `x [B, H, W, 2C] -> [B, H, W, C]`, its input, and a gradient for its output."""

    function: Callable[[Tensor], Tensor]
    x: Tensor
    dz: Tensor

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(self.x)

    def step(self) -> Tensor:
        """Forward and backward, for x and all parameters; dx."""
        self.x.grad = None
        self.function(self.x).backward(self.dz)
        return self.x.grad

    def work(self, backward: bool) -> Callable[[], Tensor]:
        return self.step if backward else self.forward


def names(case: Gate, backward: bool, compiled: bool) -> list[str]:
    """Ours, and what it is measured against in one direction."""
    skipped = {"plain, P given"} if backward else set()  # its gradient for P ends there
    skipped |= set() if case.tiled else {"plain"}
    skipped |= set() if compiled else {"original, compiled"}
    return ["ours", *(name for name in case.against if name not in skipped)]


def contender(case: Gate, name: str, settings: Settings) -> Contender:
    """The contender of that name."""
    generator = torch.Generator().manual_seed(1)
    side, channels = case.map, case.channels
    x = torch.randn(case.batch, side, side, 2 * channels, generator=generator)
    dz = torch.randn(case.batch, side, side, channels, generator=generator)
    if name.startswith("original"):
        x, dz = _interleave(x, case), _interleave(dz, case)
    x, dz = (t.to(settings.device, settings.dtype) for t in (x, dz))
    return Contender(_function(case, name, settings), x.requires_grad_(), dz)


def _function(case: Gate, name: str, settings: Settings) -> Callable[[Tensor], Tensor]:
    layer = case.layer(_activation(name), settings.backend).to(settings.device)
    if name.startswith("ours"):
        return layer
    if name.startswith("original"):
        original = OriginalStyleGate.like(layer).to(settings.device, settings.dtype)
        return torch.compile(original, dynamic=False) if name.endswith("compiled") else original

    def weights() -> Tensor:
        table = layer.relative_table()
        return baselines.mixing(table, case.window, layer.softmax, layer.matrix).to(settings.dtype)

    given = weights().detach()
    bias = layer.bias.detach().to(settings.dtype).requires_grad_()
    if name == "plain, P given":
        return lambda x: baselines.gate(x, given, bias, case.window)
    return lambda x: baselines.gate(x, weights(), bias, case.window)


def yardsticks(case: Gate, backward: bool, settings: Settings) -> dict[str, Callable[[], object]]:
    """What is timed beside the gates: GELU alone, in eager PyTorch, and a copy of as many bytes."""
    x = contender(case, "ours", settings)
    gelu = Contender(F.gelu, x.x, x.x.detach().clone())
    source = torch.zeros(case.elements(backward) // 2, device=settings.device, dtype=settings.dtype)
    target = torch.empty_like(source)
    return {"gelu alone": gelu.work(backward), "bytes copied": lambda: target.copy_(source)}


def check(case: Gate, contenders: Mapping[str, Contender], backward: bool, settings: Settings) -> None:
    """Hold outputs, or the gradients of x with `backward`, to the reference in float64.

    Raises: `RuntimeError` for a contender that computes something else.
    """
    truths: dict[str, Tensor] = {}
    for name, given in contenders.items():
        activation = _activation(name)
        if activation not in truths:
            layer = case.layer(activation, "reference").to(settings.device).double()
            x = contenders["ours"].x.detach().double().requires_grad_()
            truths[activation] = Contender(layer, x, contenders["ours"].dz.double()).work(backward)()
        truth, got = truths[activation], given.work(backward)().double()
        wanted = _interleave(truth, case) if name.startswith("original") else truth
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCES[settings.dtype]:
            raise RuntimeError(f"{name} differs from the reference on {case.name}: error {error:.1e}")


def _activation(name: str) -> str:
    return "gelu" if name == "ours, gelu" else "none"


def _interleave(x: Tensor, case: Gate) -> Tensor:
    """Channels as the original has them: one of each group in turn; `[..., C]` or `[..., 2C]`."""
    order = interleaved(case.channels, case.groups).to(x.device)
    return x.unflatten(-1, (-1, case.channels))[..., order].flatten(-2)
