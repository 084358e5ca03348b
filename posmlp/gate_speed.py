"""The demo's stopwatch: one gate of PosMLP-T by back end, beside the original-style eager one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posmlp_kernels import PosSGU, backends

from .original_style import OriginalStyleGate, interleaved


@dataclass(frozen=True)
class Shape:
    """A gate's problem: a square map and window."""

    batch: int = 8
    side: int = 14
    window: int = 14
    channels: int = 768
    groups: int = 32

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.side}x{self.side} map, window {self.window}, "
            f"C = {self.channels}, S = {self.groups}"
        )


STAGE_3 = Shape()  # 18 of PosMLP-T's 24 blocks


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds."""

    name: str
    forward: float
    both: float  # forward and backward


def time_gates(shape: Shape = STAGE_3, rounds: int = 7) -> list[Timing]:
    """Medians of the original-style gate (first) and of every back end that runs here at full speed.

    All share their parameters, the input and the run: rounds go through them in turn, so that another load
    on the machine meets all alike. Raises: `RuntimeError` if one of them computes something else.
    """
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.side, shape.side, 2 * shape.channels)
    gate = PosSGU(2 * shape.channels, shape.window, groups=shape.groups)
    with torch.no_grad():
        gate.factor.mul_(0.5)  # no weight so small that its arithmetic, slow on a CPU, flatters the others
    order = interleaved(shape.channels, shape.groups)
    both = torch.cat([order, order + shape.channels])
    original, original_x = OriginalStyleGate.like(gate), x[..., both].contiguous()
    contenders: dict[str, tuple[nn.Module, Tensor]] = {"original style": (original, original_x)}
    for name in _fast_backends():
        contender = PosSGU(2 * shape.channels, shape.window, groups=shape.groups, backend=name)
        contender.load_state_dict(gate.state_dict())
        contenders[name] = (contender, x)
        _check_same(name, contender, x, original, original_x, both, order)

    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    for _ in range(rounds):
        for name, (module, given) in contenders.items():
            times[name][0].append(_time(lambda m=module, g=given: _forward(m, g)))
            times[name][1].append(_time(lambda m=module, g=given: _gradient(m, g)))
    return [Timing(name, *map(statistics.median, pair)) for name, pair in times.items()]


def _fast_backends() -> list[str]:
    """What runs on the CPU, without Triton, which has only an interpreter there."""
    return [name for name in backends() if name not in ("cuda", "triton")]


def _check_same(
    name: str,
    gate: PosSGU,
    x: Tensor,
    original: OriginalStyleGate,
    original_x: Tensor,
    both: Tensor,
    order: Tensor,
) -> None:
    """Output and input gradient agree with the original style's, to the rounding of long sums."""
    pairs = (
        ("output", _forward(gate, x)[..., order], _forward(original, original_x)),
        ("gradient", _gradient(gate, x)[..., both], _gradient(original, original_x)),
    )
    for what, got, expected in pairs:
        error = (got - expected).abs().max() / expected.abs().max()
        if not error <= 1e-4:
            raise RuntimeError(f"back end {name} differs from the original style in its {what}: {error:.1e}")


@torch.no_grad()
def _forward(module: nn.Module, x: Tensor) -> Tensor:
    return module.eval()(x)


def _gradient(module: nn.Module, x: Tensor) -> Tensor:
    """A training step's forward and backward, for the input and all parameters; the input's gradient."""
    x = x.detach().requires_grad_()
    z = module.train()(x)
    return torch.autograd.grad(z, [x, *module.parameters()], torch.ones_like(z))[0]


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
