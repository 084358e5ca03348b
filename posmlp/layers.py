"""What PosMLP is made of around its blocks: stems, downsampling, stochastic depth."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import has_hooks, is_eager_or_compiled_cpu
from .folding import FoldingSequential

EPS = 1e-6  # of every normalisation in the models
_ONEDNN = torch.backends.mkldnn.is_available()


class DropPath(nn.Module):
    """Stochastic depth: while training, a sample's branch is dropped with probability `rate`.

    What is kept is scaled by `1 / (1 - rate)`. `[B, ...] -> [B, ...]` (Huang et al., ECCV 2016).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0 else mask)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class AbsoluteEmbedding(nn.Module):
    """A learned embedding of every place of a map, added to it: `[B, C, H, W] -> [B, C, H, W]`.

    A map of another size than the stored one gets it resampled (bicubic).
    """

    def __init__(self, dim: int, size: tuple[int, int], **new: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim, *size, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        weight, size = self.weight, x.shape[-2:]
        if size != weight.shape[-2:]:
            weight = F.interpolate(weight, size=size, mode="bicubic", align_corners=False)
        return x + weight


def conv_stem(in_chans: int, dim: int, activation: str, **new: Any) -> FoldingSequential:
    """PosMLP's stem, three convolutions, two of stride 2: `[B, in_chans, H, W] -> [B, dim, H/4, W/4]`."""
    layers: list[tuple[str, nn.Module]] = []
    sizes = ((in_chans, dim // 2, 3, 2), (dim // 2, dim, 3, 2), (dim, dim, 1, 1))
    for i, (width_in, width_out, kernel, stride) in enumerate(sizes, start=1):
        conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, **new)
        layers += [(f"conv{i}", conv), (f"norm{i}", nn.BatchNorm2d(width_out, eps=EPS, **new))]
        if i < len(sizes):
            layers.append((f"act{i}", make_activation(activation)))
    return FoldingSequential(OrderedDict(layers))


def patch_stem(in_chans: int, dim: int, patch: int, **new: Any) -> nn.Sequential:
    """gMLP's stem, one convolution over separate patches: `[B, in_chans, H, W] -> [B, dim, H/p, W/p]`."""
    return nn.Sequential(OrderedDict(conv1=PatchConv(in_chans, dim, patch, patch, **new)))


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel; zeros complete the patches at the image's far edges."""

    def forward(self, x: Tensor) -> Tensor:
        padding = [-size % kernel for size, kernel in zip(x.shape[-2:], self.kernel_size, strict=True)]
        return super().forward(F.pad(x, (0, padding[1], 0, padding[0])) if any(padding) else x)


class Downsample(nn.Module):
    """Joins two levels, a depth-wise 3x3 convolution and a LayerNorm: `[B, C, H, W] -> [B, C', H/2, W/2]`.

    oneDNN is faster where a depth-wise convolution makes one channel of one: on a CPU there is a convolution
    for the first channel that each input channel makes, one for the second, and so on.
    """

    def __init__(self, dim_in: int, dim_out: int, **new: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, 3, 2, 1, groups=dim_in, **new)
        self.norm = nn.LayerNorm(dim_out, eps=EPS, **new)

    def forward(self, x: Tensor) -> Tensor:
        y = self._convolved_by_parts(x) if self._has_parts(x) else self.conv(x).permute(0, 2, 3, 1)
        return self.norm(y).permute(0, 3, 1, 2)

    def _convolved_by_parts(self, x: Tensor) -> Tensor:
        conv, parts = self.conv, self.conv.out_channels // self.conv.in_channels
        places = (conv.stride, conv.padding, conv.dilation, conv.groups)
        maps = [F.conv2d(x, conv.weight[i::parts], conv.bias[i::parts], *places) for i in range(parts)]
        return torch.stack([y.permute(0, 2, 3, 1) for y in maps], -1).flatten(3)

    def _has_parts(self, x: Tensor) -> bool:
        conv = self.conv
        return (
            _ONEDNN
            and torch.backends.mkldnn.enabled
            and type(conv) is nn.Conv2d
            and conv.out_channels > conv.in_channels == conv.groups
            and conv.bias is not None
            and conv.padding_mode == "zeros"
            and x.dtype == conv.weight.dtype == torch.float32
            and not has_hooks(conv)
            and is_eager_or_compiled_cpu(x, conv.weight, conv.bias)
        )


def make_activation(name: str) -> nn.Module:
    """The module of one of `PosSGU`'s activations."""
    if name == "none":
        return nn.Identity()
    return nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")
