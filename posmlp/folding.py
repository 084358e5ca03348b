"""Batch norm that costs nothing in eval mode, where it is a scale and an offset of each channel.

Nor does a GELU after it in inference on a CPU: oneDNN's convolution applies it on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .eager import has_hooks, is_eager_cpu

# Inductor's, without a promise.
_ACTIVATES = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


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
                weight, bias = _normalized_weights(module, modules.pop(0))
                if modules and _activates(x, module, modules[0]):
                    modules.pop(0)
                    x = _activated_convolution(x, module, weight, bias)
                else:
                    x = module._conv_forward(x, weight, bias)
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


def _normalized_weights(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # [C]
    offset = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        offset = offset + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), offset


def _activates(x: Tensor, conv: nn.Conv2d, activation: nn.Module) -> bool:
    return (
        _ACTIVATES
        and torch.backends.mkldnn.enabled
        and not torch.is_grad_enabled()
        and type(activation) is nn.GELU
        and activation.approximate == "none"
        and not has_hooks(activation)
        and is_eager_cpu(x, conv.weight)
        and x.dtype == conv.weight.dtype == torch.float32
        and x.dim() == 4
        and x.shape[1] == conv.in_channels  # else the convolution says what is wrong
        and x.numel() > 0
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _activated_convolution(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> Tensor:
    places = (conv.padding, conv.stride, conv.dilation, conv.groups)
    return torch.ops.mkldnn._convolution_pointwise.default(x, weight, bias, *places, "gelu", [], "none")
