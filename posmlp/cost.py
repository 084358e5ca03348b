"""What a model costs: parameters, multiply-accumulates and map sizes, level by level."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from posmlp_kernels import PosSGU

from .model import PosMLP

# Terms of an encoding's quadratic form, which the original evaluates for every entry of [S, N, N].
_MAP_TERMS = {"gqpe": 5, "gqpe_isotropic": 3}
_LAYER_NORM, _BATCH_NORM = 5, 2  # operations an element, as fvcore's counter has them


@dataclass(frozen=True)
class Cost:
    """A part of a model for one image: its output `[C, H, W]` (or `[classes]`), parameters and MACs.

    `map_macs`, contained in `macs`, is what computing the position maps takes the way the paper counts it:
    every entry of `[S, N, N]` from the terms of its quadratic form. (Through the relative table, which has
    `S (2h-1)(2w-1)` entries, it takes far less.)
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    map_macs: int


def complexity(model: PosMLP, input_size: int | tuple[int, int] = 224) -> list[Cost]:
    """The cost of the stem, of each level and of the head, for one image of `input_size`; see `total`.

    Counted exactly, windows that stick out of a map included: convolutions, linear layers, mixing products,
    and norms by the convention behind the paper's figures. Activations, biases, pooling and the gating
    product, an operation an element each, are not counted.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    model = copy.deepcopy(model).to("meta").eval()  # shapes only: nothing is computed
    macs: dict[nn.Module, int] = defaultdict(int)
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[module] = tuple(output.shape[1:])
        macs[module] += _macs(module, inputs[0], output)

    parts = {"stem": [model.stem], **{f"levels.{i}": [level] for i, level in enumerate(model.levels)}}
    parts["head"] = [model.norm, model.head]
    for module in model.modules():
        module.register_forward_hook(record)
        if isinstance(module, PosSGU):
            module.backend = "reference"  # the one that takes tensors without values
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        model(torch.empty(1, model.in_chans, *size, device="meta", dtype=dtype))

    return [_cost(name, modules, shapes[modules[-1]], macs) for name, modules in parts.items()]


def total(costs: list[Cost]) -> Cost:
    """The sum of all parts, with the last one's shape."""
    sums = (sum(getattr(cost, field) for cost in costs) for field in ("parameters", "macs", "map_macs"))
    return Cost("total", costs[-1].shape, *sums)


def _cost(name: str, part: list[nn.Module], shape: tuple[int, ...], macs: dict[nn.Module, int]) -> Cost:
    modules = [inner for module in part for inner in module.modules()]
    map_macs = sum(map(_map_macs, modules))
    parameters = sum(p.numel() for module in part for p in module.parameters())
    return Cost(name, shape, parameters, sum(macs[module] for module in modules) + map_macs, map_macs)


def _macs(module: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.LayerNorm):
        return _LAYER_NORM * output.numel()
    if isinstance(module, nn.BatchNorm2d):
        return _BATCH_NORM * output.numel()
    if isinstance(module, PosSGU):
        sides = zip(x.shape[1:-1], module.window, module.shift, strict=True)
        norm = 0 if module.norm is None else _LAYER_NORM * output.numel()
        return math.prod(_pairs(*side) for side in sides) * output.shape[-1] + norm
    return 0


def _pairs(size: int, window: int, shift: int) -> int:
    """Pairs of tokens that share a window along one dimension."""
    edges = [0, *range(window - shift, size, window), size]
    return sum((end - start) ** 2 for start, end in pairwise(edges) if end > start)


def _map_macs(module: nn.Module) -> int:
    if not isinstance(module, PosSGU):
        return 0
    return _MAP_TERMS.get(module.encoding, 0) * module.groups * math.prod(module.window) ** 2
