"""The block of PosMLP, and the level: blocks at one resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from posmlp_kernels import PosSGU

from .eager import has_hooks, is_eager_cpu, is_plain
from .layers import EPS, Downsample, DropPath
from .linear import Linear, pays, product

HIDDEN_BYTES = 10 * 2**20  # of a hidden map in inference on a CPU; a quarter was slower, twice no faster


class Block(nn.Module):
    """`x + DropPath(Dropout(W_s PosSGU(act(W_e LN(x)))))`, `[B, H, W, C] -> [B, H, W, C]` (PosMLP, fig. 3).

    The activation belongs to the gate, which applies it as it loads, so that no activated copy is stored.
    `gate` holds the arguments of `PosSGU` that all blocks of a level share.
    """

    def __init__(
        self, dim: int, ratio: float, *, gate: dict[str, Any], drop: float, drop_path: float, **new: Any
    ) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.norm = nn.LayerNorm(dim, eps=EPS, **new)
        self.fc1 = Linear(dim, hidden, **new)
        self.gate = PosSGU(hidden, **gate, **new)
        self.fc2 = Linear(hidden // 2, dim, **new)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self._adds_on_the_way_out():
            return self.fc2(self._mixed(x), plus=x)
        return x + self._branch(x)

    def infer(self, x: Tensor) -> Tensor:
        """`forward` in four operations, without the questions that modules ask, where `is_plain(x)`."""
        norm, fc1, gate, fc2 = self.norm, self.fc1, self.gate, self.fc2
        y = torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        y = gate.run_compiled(product(y, fc1.weight, fc1.bias))
        return product(y, fc2.weight, fc2.bias, x)

    def is_plain(self, x: Tensor) -> bool:
        """Whether four operations are what inference comes to for maps like x, on a CPU in float32, if nobody
        looks: the parts are those that were made, and their parameters fit."""
        parts, fc1, gate, fc2 = self._modules.values(), self.fc1, self.gate, self.fc2
        return (
            tuple(map(type, parts)) == (nn.LayerNorm, Linear, PosSGU, Linear, nn.Dropout, DropPath)
            and gate.runs_compiled()
            and pays(x.dtype)
            and fc1.weight.shape == (gate.dim, x.shape[-1])
            and fc2.weight.shape == (x.shape[-1], gate.dim // 2)
            and x.numel() > 0
            and x.dtype is torch.float32
            and all(
                p is None or (is_plain(p) and p.dtype is torch.float32)
                for part in parts
                for p in part._parameters.values()
            )
        )

    def _mixed(self, x: Tensor) -> Tensor:
        return self.gate(self.fc1(self.norm(x)))

    def _branch(self, x: Tensor) -> Tensor:
        return self.drop_path(self.drop(self.fc2(self._mixed(x))))

    def _adds_on_the_way_out(self) -> bool:
        """Whether the last linear layer may add the input: nothing happens, or is seen, in between."""
        fc2, drop, drop_path = self.fc2, self.drop, self.drop_path
        return (
            (type(fc2), type(drop), type(drop_path)) == (Linear, nn.Dropout, DropPath)  # nobody's own
            and not (drop.training and drop.p)
            and not (drop_path.training and drop_path.rate)
            and not has_hooks(fc2, drop, drop_path)
        )


class Level(nn.Module):
    """Blocks at one resolution, behind a downsampling from `dim_in`: `[B, C, H, W] -> [B, C', H', W']`.

    Both ends are views of a channels-last map `[B, H, W, C]`, which is what the blocks work on. There is a
    block for each of `drop_paths`; with `shift` every second one moves its windows by half a window. On a
    CPU, inference takes a large batch through the blocks a few images at a time: what they pass on, and the
    wide hidden maps above all, then stays in caches and in memory that is warm. It asks once for a level
    what modules ask in every call (who watches, which modes are on, what the parameters are).
    """

    def __init__(
        self,
        dim: int,
        ratio: float,
        *,
        dim_in: int | None,
        gate: dict[str, Any],
        shift: bool,
        drop: float,
        drop_paths: Sequence[float],
        **new: Any,
    ) -> None:
        super().__init__()
        self.downsample = nn.Identity() if dim_in is None else Downsample(dim_in, dim, **new)
        gates = (gate, gate | {"shift": _half(gate["window"])} if shift else gate)
        self.blocks = nn.Sequential(
            *(
                Block(dim, ratio, gate=gates[i % 2], drop=drop, drop_path=drop_path, **new)
                for i, drop_path in enumerate(drop_paths)
            )
        )
        self.hidden = int(dim * ratio)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()  # no copy: convolutions keep channels last
        x = self._infer(x) if self._may_infer(x) else self._through_blocks(x)
        return x.permute(0, 3, 1, 2)

    def _through_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def _infer(self, x: Tensor) -> Tensor:
        plain = all(block.is_plain(x) for block in self.blocks)
        images = max(1, HIDDEN_BYTES // max(1, x.shape[1] * x.shape[2] * self.hidden * x.element_size()))
        parts = []
        for part in x.split(images):
            for block in self.blocks:
                part = block.infer(part) if plain else block(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _may_infer(self, x: Tensor) -> bool:
        """Whether nothing in the blocks can tell how many images come together, and nobody counts them."""
        return (
            is_eager_cpu(x)  # first: torch.compile could not answer the others
            and not torch.is_grad_enabled()
            and not torch.is_anomaly_enabled()
            and not _has_any_global_hook()
            and all(type(block) is Block and _is_left_alone(block) for block in self.blocks)
        )


def _is_left_alone(module: nn.Module) -> bool:
    """Whether all of a module infers, and nobody sees or changes what it does."""
    if module.training or has_hooks(module):
        return False
    for part in module._modules.values():  # noqa: SIM110 (a generator would take twice the time)
        if part is not None and not _is_left_alone(part):
            return False
    return True


def _half(window: int | Sequence[int]) -> int | tuple[int, ...]:
    return window // 2 if isinstance(window, int) else tuple(side // 2 for side in window)
