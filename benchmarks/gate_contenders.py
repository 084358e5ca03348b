"""The functions that compute a gate, ours and what it is measured against, with inputs of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from posmlp.original_style import OriginalStyleGate, interleaved

from . import baselines
from .gate_cases import BACKWARD, BOTH, FORWARD, Gate

TOLERANCES = {"float32": 1e-5, "tf32": 4e-3, "bfloat16": 3e-2, "float16": 4e-3}  # of the largest entry
YARDSTICKS = ("gelu alone", "bytes copied")
_IMAGES = 2  # those that are checked


@dataclass(frozen=True)
class Settings:
    """Where and how a benchmark runs.

    Args:
        precision: a dtype's name, or "tf32": float32 whose products may be rounded to TF32.
        backends: of ours, each a contender by its own name; none stands for "ours", by the fastest.
    """

    device: torch.device
    precision: str = "float32"
    backends: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "tf32" else getattr(torch, self.precision)

    @property
    def ours(self) -> tuple[str, ...]:
        return self.backends or ("ours",)


@dataclass(frozen=True)
class Contender:
    """A gate `x [B, *map, 2C] -> [B, *map, C]`, its input, and a gradient for its output."""

    function: Callable[[Tensor], Tensor]
    x: Tensor
    dz: Tensor
    parameters: tuple[Tensor, ...] = ()

    def forward(self) -> Tensor:
        return self.function(self.x)

    def step(self) -> Tensor:
        """Forward and backward, for x and all parameters; dx."""
        return self.gradients(self.function(self.x))

    def gradients(self, z: Tensor, keep: bool = False) -> Tensor:
        """All gradients, of which it returns dx."""
        return torch.autograd.grad(z, (self.x, *self.parameters), self.dz, retain_graph=keep)[0]

    def work(self, direction: str) -> Callable[[], Tensor]:
        """What is timed, and called, in `grad_mode(direction)`."""
        if direction == FORWARD:
            return self.forward
        return self.step if direction == BOTH else partial(self.gradients, self.function(self.x), True)


def grad_mode(direction: str) -> torch.set_grad_enabled:
    """Gradients off where only the forward is timed: once for all calls, as in inference."""
    return torch.set_grad_enabled(direction != FORWARD)


def names(case: Gate, direction: str, settings: Settings, compiled: bool) -> list[str]:
    """Ours, and what it is measured against in one direction."""
    skipped = {"ours, gelu"}
    skipped |= set() if direction == FORWARD else {"plain, P given"}  # its gradient for P ends there
    skipped |= set() if case.tiled else {"plain", "plain, compiled"}
    against = [name for name in case.against if name not in skipped]
    if direction == BACKWARD or not compiled:  # what is compiled runs its backward once for a forward
        against = [name for name in against if not name.endswith(", compiled")]
    fused = [f"{name}, gelu" for name in settings.ours if "ours, gelu" in case.against]
    return [*settings.ours, *fused, *against]


def contender(case: Gate, name: str, settings: Settings) -> Contender:
    """The contender of that name."""
    generator = torch.Generator(settings.device).manual_seed(1)
    tokens, channels = (case.batch, *(case.map,) * case.rank), case.channels
    x = torch.randn(*tokens, 2 * channels, generator=generator, device=settings.device)
    dz = torch.randn(*tokens, channels, generator=generator, device=settings.device)
    if name.startswith("original"):
        x, dz = _interleave(x, case), _interleave(dz, case)
    x, dz = (t.to(settings.dtype) for t in (x, dz))
    function, parameters = _function(case, name, settings)
    return Contender(function, x.requires_grad_(), dz, parameters)


def _function(
    case: Gate, name: str, settings: Settings
) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
    """A gate and its parameters."""
    subject, _, variant = name.partition(", ")
    backend = None if subject in ("ours", "plain", "original") else subject
    layer = case.layer(_activation(name), backend).to(settings.device)
    parameters = tuple(layer.parameters())
    if subject == "original":
        original = OriginalStyleGate.like(layer).to(settings.device, settings.dtype)
        return _compiled(original, variant), tuple(original.parameters())
    if subject != "plain":
        return layer, parameters

    def weights() -> Tensor:
        table = layer.relative_table()
        return baselines.mixing(table, case.window, layer.softmax, layer.matrix).to(settings.dtype)

    given = weights().detach()
    if variant == "P given":
        bias = layer.bias.detach().to(settings.dtype)
        return lambda x: baselines.gate(x, given, bias, case.window), ()
    plain = lambda x: baselines.gate(x, weights(), layer.bias.to(settings.dtype), case.window)  # noqa: E731
    return _compiled(plain, variant), parameters


def _compiled(function: Callable[[Tensor], Tensor], variant: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, dynamic=False) if variant == "compiled" else function


def yardsticks(case: Gate, direction: str, settings: Settings) -> dict[str, Callable[[], object]]:
    """What is timed beside the gates: GELU alone, in eager PyTorch, and a copy of as many bytes."""
    x = contender(case, settings.ours[0], settings)
    gelu = Contender(F.gelu, x.x, x.x.detach().clone())
    source = torch.zeros(case.elements(direction) // 2, device=settings.device, dtype=settings.dtype)
    target = torch.empty_like(source)
    return dict(zip(YARDSTICKS, (gelu.work(direction), lambda: target.copy_(source)), strict=True))


class Truth:
    """A case's output, or its gradient for x, by the reference in float64; of the batch's last images."""

    def __init__(self, case: Gate, direction: str, settings: Settings) -> None:
        self.case, self.direction, self.settings = case, direction, settings
        self._known: dict[str, Tensor] = {}

    def check(self, name: str, given: Contender) -> None:
        """Raises: `RuntimeError` for a contender that computes something else."""
        truth = self._of(_activation(name))
        with grad_mode(self.direction):
            got = given.work(self.direction)()[-_IMAGES:].double()
        wanted = _interleave(truth, self.case) if name.startswith("original") else truth
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCES[self.settings.precision]:
            raise RuntimeError(f"{name} differs from the reference on {self.case.name}: error {error:.1e}")

    def _of(self, activation: str) -> Tensor:
        if activation not in self._known:
            layer = self.case.layer(activation, "reference").to(self.settings.device).double()
            inputs = contender(self.case, "reference", self.settings)
            x, dz = (t.detach()[-_IMAGES:].double() for t in (inputs.x, inputs.dz))
            with grad_mode(self.direction):
                self._known[activation] = Contender(layer, x.requires_grad_(), dz).work(self.direction)()
        return self._known[activation]


def _activation(name: str) -> str:
    return "gelu" if name.endswith(", gelu") else "none"


def _interleave(x: Tensor, case: Gate) -> Tensor:
    """Channels as the original has them: one of each group in turn; `[..., C]` or `[..., 2C]`."""
    order = interleaved(case.channels, case.groups).to(x.device)
    return x.unflatten(-1, (-1, case.channels))[..., order].flatten(-2)
