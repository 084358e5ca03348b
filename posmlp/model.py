"""PosMLP, a hierarchical vision MLP whose tokens are mixed by position alone (ACM MM 2022), and gMLP."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from posmlp_kernels import PosSGU

from .allocator import keep_freed_memory
from .blocks import Level
from .layers import EPS, AbsoluteEmbedding, conv_stem, patch_stem

POOLS = {"avg": lambda x: x.mean((2, 3)), "max": lambda x: x.amax((2, 3)), "": lambda x: x}


class PosMLP(nn.Module):
    """`[B, in_chans, H, W] -> [B, num_classes]`, for images of any size.

    The first five arguments hold an entry per level; one value stands for all levels.

    Args:
        dims: channels of the maps; each a multiple of the one before.
        depths: blocks.
        windows: tokens along a window's side, or `(h, w)`.
        groups: channel groups of the gate, each with an encoding of its own.
        ratios: expansion of a block's hidden layer, which is twice as wide as the gate.
        encoding: "gqpe", "gqpe_isotropic", "lrpe", "lrpe_m" or "sgu" (see `PosSGU`).
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the images.
        drop_rate: dropout in the blocks and before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        bias: a bias per token in the gates.
        absolute_embedding: a learned embedding added after the stem, resampled for other sizes.
        img_size: the nominal image size; only the stored size of the absolute embedding depends on it.
        shift: every second block moves its windows by half a window. An entry per level, or one for all.
        activation: "gelu", "gelu_tanh" or "none".
        patch_size: None for PosMLP's stem (stride 4); a number for gMLP's, one convolution over patches.
        gate_backend: a name from `posmlp_kernels.backends()`; None takes the fastest.
        global_pool: "avg", "max", or "" for none.

    Source: Wang et al., Parameterization of Cross-token Relations with Relative Positional Encoding for
    Vision MLP, section 3. Raises: `ValueError` for sizes that do not fit or unknown names.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        dims: Sequence[int],
        depths: int | Sequence[int],
        windows: int | Sequence[int | Sequence[int]],
        groups: int | Sequence[int],
        ratios: float | Sequence[float],
        *,
        encoding: str = "gqpe",
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        bias: bool = True,
        absolute_embedding: bool = False,
        img_size: int | tuple[int, int] = 224,
        shift: bool | Sequence[bool] = False,
        activation: str = "gelu",
        patch_size: int | None = None,
        gate_backend: str | None = None,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        keep_freed_memory()
        new = {"device": device, "dtype": dtype}
        dims = (dims,) if isinstance(dims, int) else tuple(dims)
        if not dims or min(dims) < 2:
            raise ValueError(f"dims must be at least one width of 2 or more, got {list(dims)}")
        per_level = {"depths": depths, "windows": windows, "groups": groups, "ratios": ratios, "shift": shift}
        depths, windows, groups, ratios, shift = (
            _per_level(name, value, len(dims)) for name, value in per_level.items()
        )
        _check(dims, depths, drop_rate, drop_path_rate, num_classes, in_chans, patch_size)
        self.dims, self.depths, self.windows, self.encoding = dims, depths, windows, encoding
        self.in_chans, self.drop_rate, self.drop_path_rate = in_chans, drop_rate, drop_path_rate
        self.num_features = self.head_hidden_size = dims[-1]

        self.stem = (
            conv_stem(in_chans, dims[0], activation, **new)
            if patch_size is None
            else patch_stem(in_chans, dims[0], patch_size, **new)
        )
        stride = 4 if patch_size is None else patch_size
        if absolute_embedding:
            image = (img_size, img_size) if isinstance(img_size, int) else img_size
            size = tuple(-(-side // stride) for side in image)
            self.stem.add_module("position", AbsoluteEmbedding(dims[0], size, **new))

        gate = {"encoding": encoding, "bias": bias, "activation": activation, "backend": gate_backend}
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(depths)
        self.levels = nn.Sequential(
            *(
                Level(
                    dim,
                    ratios[i],
                    dim_in=dims[i - 1] if i else None,
                    gate=gate | {"window": windows[i], "groups": groups[i]},
                    shift=shift[i],
                    drop=drop_rate,
                    drop_paths=drop_paths[i].tolist(),
                    **new,
                )
                for i, dim in enumerate(dims)
            )
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": stride * 2**i, "module": f"levels.{i}"}
            for i, dim in enumerate(dims)
        ]

        self.norm = nn.LayerNorm(dims[-1], eps=EPS, **new)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers and convolutions at a truncated normal of 0.02, the others at their own defaults."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # Drawn by rows, however the weight lies in memory: a seed gives the same model everywhere.
                drawn = torch.empty_like(module.weight, memory_format=torch.contiguous_format)
                module.weight.copy_(nn.init.trunc_normal_(drawn, std=0.02))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W] -> [B, C, h, w]`, the last level's map, normalised."""
        return self._final_norm(self.levels(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`[B, C, h, w] -> [B, num_classes]`; `[B, C]` with `pre_logits`."""
        x = self.head_drop(POOLS[self.global_pool](x))
        if pre_logits:
            return x
        # Without pooling the classifier serves every place of the map.
        return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if x.dim() == 4 else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of several levels, and what `forward_features` gives.

        Args:
            x: `[B, in_chans, H, W]`.
            indices: levels; an int stands for the last ones, None for all, negatives count from the end.
            norm: apply the final norm to the last level's map (it fits no other).
            stop_early: run no level after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.

        Returns: `(features, maps)` or `maps`. With `stop_early` the features are those of the last level run.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        wanted, last = take_indices(len(self.levels), indices), len(self.levels) - 1
        maps: dict[int, Tensor] = {}
        x = self._embed(x)
        for i, level in enumerate(self.levels):
            if stop_early and i > max(wanted):
                break
            x = level(x)
            if i in wanted:
                maps[i] = self._final_norm(x) if norm and i == last else x
        out = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in wanted]
        if intermediates_only:
            return out
        return (x if stop_early and max(wanted) < last else self._final_norm(x)), out

    def _embed(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must be [B, {self.in_chans}, H, W], got {list(x.shape)}")
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the maps of `indices` do not need; returns these as non-negative numbers."""
        wanted = take_indices(len(self.levels), indices)
        pruned = max(wanted) < len(self.levels) - 1
        self.levels = self.levels[: max(wanted) + 1]
        self.num_features = self.head_hidden_size = self.dims[max(wanted)]
        if prune_norm or pruned:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (none for 0 classes), and another pooling if one is given."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLS:
            raise ValueError(f"global_pool must be one of {list(POOLS)}, got {pool!r}")
        self.global_pool, self.num_classes = pool, num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        like = self.norm.weight if isinstance(self.norm, nn.LayerNorm) else next(self.parameters())
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are positions, not weights: those of the encodings and the absolute embedding."""
        names = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, PosSGU)
            for name in ("center", "factor", "scale", "table", "bias")
            if getattr(module, name, None) is not None
        }
        return names | ({"stem.position.weight"} if hasattr(self.stem, "position") else set())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates."""
        fine = [(r"^levels\.(\d+)\.downsample", (0,)), (r"^levels\.(\d+)\.blocks\.(\d+)", None)]
        return {
            "stem": r"^stem",
            "blocks": r"^levels\.(\d+)" if coarse else [*fine, (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass rather than storing what it needs."""
        for level in self.levels:
            level.grad_checkpointing = enable


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Level numbers from timm's shorthand: None for all, an int for the last ones, negatives from the end."""
    if isinstance(indices, int) and not 1 <= indices <= count:
        raise ValueError(f"indices must ask for 1 to {count} levels, got {indices}")
    if indices is None or isinstance(indices, int):
        return list(range(count - (count if indices is None else indices), count))
    wanted = [i + count if i < 0 else i for i in indices]
    if not wanted or not all(0 <= i < count for i in wanted):
        raise ValueError(f"indices must be levels of 0 to {count - 1}, got {list(indices)}")
    return wanted


def _per_level(name: str, value: Any, levels: int) -> tuple:
    if isinstance(value, (int, float)):
        return (value,) * levels
    if len(value) != levels:
        raise ValueError(f"{name} must have an entry for each of the {levels} levels, got {list(value)}")
    return tuple(value)


def _check(
    dims: tuple,
    depths: tuple,
    drop_rate: float,
    drop_path_rate: float,
    num_classes: int,
    in_chans: int,
    patch_size: int | None,
) -> None:
    for before, after in pairwise(dims):
        if after % before:
            raise ValueError(f"dims must each be a multiple of the one before, got {list(dims)}")
    if min(depths) < 1:
        raise ValueError(f"depths must be at least 1, got {list(depths)}")
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {rate}")
    for name, value, least in (
        ("num_classes", num_classes, 0),
        ("in_chans", in_chans, 1),
        ("patch_size", 1 if patch_size is None else patch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
