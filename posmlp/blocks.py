"""The block of PosMLP, and the level: blocks at one resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from posmlp_kernels import PosSGU
from posmlp_kernels.cache import ParameterCache

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

    def infer(self, x: Tensor, table: Tensor | None) -> Tensor:
        """`forward` in four operations, without the questions that modules ask, where `is_plain(x)`; given
        the gate's table."""
        norm, fc1, gate, fc2, *_ = self._modules.values()  # an attribute of a module takes ten times as long
        y = torch.layer_norm(x, norm.normalized_shape, *norm._parameters.values(), norm.eps)
        y = gate.run_compiled(product(y, *fc1._parameters.values()), table)
        return product(y, *fc2._parameters.values(), x)

    def is_plain(self, dim: int) -> bool:
        """Whether four operations are what inference comes to for maps of `dim` channels, on a CPU in
        float32, if nobody looks: the parts are those that were made, and their parameters fit."""
        parts = self._modules.values()
        if tuple(map(type, parts)) != (nn.LayerNorm, Linear, PosSGU, Linear, nn.Dropout, DropPath):
            return False
        norm, fc1, gate, fc2, *_ = parts
        own = [p for part in (norm, fc1, gate, fc2) for p in part._parameters.values() if p is not None]
        return (
            gate.runs_compiled()
            and _fits(fc1, dim, gate.dim)
            and _fits(fc2, gate.dim // 2, dim)
            and all(map(is_plain, own))
            and {p.dtype for p in own} == {torch.float32}
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
        self._tables = ParameterCache()

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
        steps = self._plain_steps() if self._is_plain(x) else self.blocks
        images = max(1, HIDDEN_BYTES // max(1, x.shape[1] * x.shape[2] * self.hidden * x.element_size()))
        parts = []
        for part in x.split(images):
            for step in steps:
                part = step(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _is_plain(self, x: Tensor) -> bool:
        return (
            x.dtype is torch.float32
            and pays(x.dtype)
            and x.numel() > 0
            and all(block.is_plain(x.shape[-1]) for block in self.blocks)
        )

    def _plain_steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The blocks as four operations each. Whether the tables kept for them still hold is one question
        for all: at batch 1, when nothing of this is in a cache, a question takes as long as a LayerNorm."""
        gates = [block.gate for block in self.blocks]
        parameters = [gate.table_parameters() for gate in gates]

        def build() -> list[Tensor | None]:
            return [gate.relative_table() for gate in gates]

        if all(parameters):
            flat = sum(parameters, ())
            settings = [(gate.encoding, gate.window) for gate in gates], [p.shape for p in flat]
            tables = self._tables.get([_flatten_dense_tensors(flat)], settings, build)
        else:
            tables = build()
        return [partial(block.infer, table=table) for block, table in zip(self.blocks, tables, strict=True)]

    def _may_infer(self, x: Tensor) -> bool:
        """Whether nothing in the blocks can tell how many images come together, and nobody counts them."""
        return (
            is_eager_cpu(x)  # first: torch.compile could not answer the others
            and not torch.is_grad_enabled()
            and not torch.is_anomaly_enabled()
            and not _has_any_global_hook()
            and all(type(block) is Block and _is_left_alone(block) for block in self.blocks)
        )


def _fits(linear: Linear, width_in: int, width_out: int) -> bool:
    weight, bias = linear._parameters.values()
    return weight.shape == (width_out, width_in) and (bias is None or bias.shape == (width_out,))


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
