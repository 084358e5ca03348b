"""What gates do to an image, level by level."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posmlp_kernels import PosSGU

from ..layers import make_activation
from ..model import PosMLP


@dataclass(frozen=True)
class Effect:
    """Magnitudes around the last gate of a level, means over channels: maps `[h, w]` of the level's size.

    Args:
        level: its number.
        tokens: X1, what the gate mixes.
        mixed: `P X1 + b`.
        gated: Z, `(P X1 + b) * X2`.
        window, shift: the gate's.
    """

    level: int
    tokens: Tensor
    mixed: Tensor
    gated: Tensor
    window: tuple[int, ...]
    shift: tuple[int, ...]

    def borders(self) -> tuple[list[float], list[float]]:
        """Where windows meet, as shares of the map's height and of its width."""
        sides = zip(self.tokens.shape, self.window, self.shift, strict=True)
        rows, columns = ([edge / size for edge in range(w - s, size, w)] for size, w, s in sides)
        return rows, columns


@torch.inference_mode()
def gate_effects(model: PosMLP, pixels: Tensor, levels: Sequence[int]) -> list[Effect]:
    """Run a model on one normalised image `[in_chans, H, W]` and watch the last gate of each of `levels`.

    Raises: `ValueError` for maps that are not finite.
    """
    found: dict[int, Effect] = {}
    with ExitStack() as hooks:
        for number in levels:
            gate = model.levels[number].blocks[-1].gate
            hooks.enter_context(gate.register_forward_hook(_watch(number, found)))
        model(pixels.unsqueeze(0))
    return [found[number] for number in levels]


def upsample(values: Tensor, size: Sequence[int]) -> Tensor:
    """A map `[h, w]` at the size of the image, `[H, W]` (bilinear)."""
    return F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def _watch(number: int, found: dict[int, Effect]) -> Callable[[PosSGU, tuple[Tensor, ...], Tensor], None]:
    def hook(gate: PosSGU, inputs: tuple[Tensor, ...], gated: Tensor) -> None:
        tokens = make_activation(gate.activation)(inputs[0]).chunk(2, dim=-1)[0]
        maps = [_magnitude(part) for part in (tokens, _mix(gate, tokens), gated)]
        if not all(part.isfinite().all() for part in maps):
            raise ValueError(f"the gate of level {number} must give finite values to be drawn")
        found[number] = Effect(number, *maps, gate.window, gate.shift)

    return hook


def _mix(gate: PosSGU, tokens: Tensor) -> Tensor:
    """`P X1 + b`: the gate itself, with ones for X2."""
    plain = copy.copy(gate)
    plain.activation = "none"  # the tokens have had theirs
    return plain.forward(
        torch.cat([tokens, torch.ones_like(tokens)], -1)
    )  # not called: that runs hooks again


def _magnitude(x: Tensor) -> Tensor:
    """`[1, h, w, C] -> [h, w]` on the CPU."""
    return x[0].abs().mean(-1).float().cpu()
