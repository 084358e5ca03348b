"""Batch norm that costs nothing in eval mode, where it is a scale and an offset of each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .eager import has_hooks


class FoldingSequential(nn.Sequential):
    """`nn.Sequential`, but a convolution whose batch norm is in eval mode takes it into its own weights.

    They are computed anew on every call, a few thousand numbers beside the maps, so they can never be stale;
    gradients flow through them. A pair that somebody watches through hooks runs as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self)
        while modules:
            module = modules.pop(0)
            if modules and _folds(module, modules[0]):
                x = _normalized_convolution(x, module, modules.pop(0))
            else:
                x = module(x)
        return x


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.affine
        and norm.track_running_stats
        and conv.weight.dtype == norm.running_var.dtype
        and conv.weight.dtype in (torch.float32, torch.float64)  # less would round twice
        and not has_hooks(conv, norm)
    )


def _normalized_convolution(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # [C]
    offset = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        offset = offset + conv.bias * scale
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), offset)
