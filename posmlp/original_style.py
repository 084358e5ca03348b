"""The gate and the model as the paper's released code computes them, to measure against.

Eager PyTorch throughout: windows are cut by a copy, the channel groups are interleaved and dealt out by
views, the mixing map `[N, N, S]` is built from index features on every call, and one einsum mixes all
windows, for which it copies the map once per window. The activation is a layer of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from posmlp_kernels import PosSGU

from .layers import EPS
from .model import PosMLP


class OriginalStyleGate(nn.Module):
    """PosSGU with group-wise quadratic encoding, `[B, H, W, 2C] -> [B, H, W, C]`, in the original's manner.

    Channel c belongs to group `c mod groups`. Centres and factors are in (row, col), as in `PosSGU`.

    Args:
        window: tokens along the side of a square window; the map must be a multiple of it.
        groups: S, divides C.
    """

    def __init__(self, window: int, groups: int) -> None:
        super().__init__()
        self.window, self.groups = window, groups
        self.center = nn.Parameter(torch.randn(groups, 2) * 1e-2)
        self.factor = nn.Parameter(torch.eye(2) + torch.randn(groups, 2, 2) * 1e-2)
        self.bias = nn.Parameter(torch.zeros(window * window, 1, 1))
        self.register_buffer("features", _index_features(window), persistent=False)  # [N, N, 5]

    @classmethod
    def like(cls, gate: PosSGU) -> OriginalStyleGate:
        """One with the parameters of a `PosSGU` (quadratic, square window, no shift)."""
        made = cls(gate.window[0], gate.groups)
        with torch.no_grad():
            made.center.copy_(gate.center)
            made.factor.copy_(gate.factor)
            made.bias.copy_(gate.bias.view_as(made.bias))
        return made

    def mixing_map(self) -> Tensor:
        """`[N, N, S]`, query x key x group, rows normalised over the keys."""
        inverse = self.factor @ self.factor.mT  # [S, 2, 2]
        linear = (inverse @ self.center.unsqueeze(-1)).squeeze(-1)  # [S, 2]
        quadratic = torch.stack([-inverse[:, 0, 0] / 2, -inverse[:, 1, 1] / 2, -inverse[:, 0, 1]], 1)
        weights = torch.cat([quadratic, linear], 1)  # [S, 5]; the softmax does not see the constant
        return torch.einsum("mnf,sf->mns", self.features, weights).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        w = self.window
        if height % w or width % w:
            raise ValueError(f"the map must be a multiple of the window {w}, got {height} x {width}")
        windows = x.view(batch, height // w, w, width // w, w, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
        mixed, gate = windows.view(batch, -1, w * w, x.shape[-1]).chunk(2, -1)  # [B, windows, N, C]
        mixed = mixed.unflatten(-1, (-1, self.groups)).permute(0, 1, 3, 2, 4)  # [B, windows, D, N, S]
        maps = self.mixing_map().expand(mixed.shape[1], -1, -1, -1)  # [windows, N, N, S]
        mixed = torch.einsum("wmns,bwvns->bwmvs", maps, mixed) + self.bias
        out = mixed.flatten(-2) * gate
        out = out.view(batch, height // w, width // w, w, w, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
        return out.view(batch, height, width, -1)


class OriginalStyleBlock(nn.Module):
    """`x + W_s gate(GELU(W_e LN(x)))`, `[B, H, W, C] -> [B, H, W, C]`."""

    def __init__(self, dim: int, hidden: int, window: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.gate = OriginalStyleGate(window, groups)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.gate(self.act(self.fc1(self.norm(x)))))


class OriginalStylePosMLP(nn.Module):
    """`[B, 3, H, W] -> [B, num_classes]`: PosMLP out of torch's own layers and original-style gates.

    Module names are those of `PosMLP`. Every level's map must be a multiple of its window.

    Args:
        dims, depths, windows, groups, ratios: an entry per level, as in `PosMLP`.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        windows: Sequence[int],
        groups: Sequence[int],
        ratios: Sequence[float],
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        sizes = ((3, dims[0] // 2, 3, 2), (dims[0] // 2, dims[0], 3, 2), (dims[0], dims[0], 1, 1))
        for i, (width_in, width_out, kernel, stride) in enumerate(sizes, start=1):
            self.stem.add_module(f"conv{i}", nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2))
            self.stem.add_module(f"norm{i}", nn.BatchNorm2d(width_out, eps=EPS))
            if i < len(sizes):
                self.stem.add_module(f"act{i}", nn.GELU())
        self.levels = nn.ModuleList()
        for i, dim in enumerate(dims):
            level = nn.Module()
            if i:
                level.downsample = nn.Module()
                level.downsample.conv = nn.Conv2d(dims[i - 1], dim, 3, 2, 1, groups=dims[i - 1])
                level.downsample.norm = nn.LayerNorm(dim, eps=EPS)
            hidden = int(dim * ratios[i])
            level.blocks = nn.Sequential(
                *(OriginalStyleBlock(dim, hidden, windows[i], groups[i]) for _ in range(depths[i]))
            )
            self.levels.append(level)
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = nn.Linear(dims[-1], num_classes)

    @classmethod
    def like(cls, model: PosMLP) -> OriginalStylePosMLP:
        """One with the weights of a `PosMLP` (quadratic, square windows, no shift); it computes the same."""
        gates = [level.blocks[0].gate for level in model.levels]
        made = cls(
            model.dims,
            model.depths,
            [gate.window[0] for gate in gates],
            [gate.groups for gate in gates],
            [gate.dim / dim for gate, dim in zip(gates, model.dims, strict=True)],
            model.num_classes,
        )
        state = dict(model.state_dict())
        for name, block in made.named_modules():
            if isinstance(block, OriginalStyleBlock):
                order = interleaved(block.fc2.in_features, block.gate.groups)
                both = torch.cat([order, order + len(order)])
                state[f"{name}.fc1.weight"] = state[f"{name}.fc1.weight"][both]
                state[f"{name}.fc1.bias"] = state[f"{name}.fc1.bias"][both]
                state[f"{name}.fc2.weight"] = state[f"{name}.fc2.weight"][:, order]
                state[f"{name}.gate.bias"] = state[f"{name}.gate.bias"].view_as(block.gate.bias)
        made.load_state_dict(state)
        return made

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for level in self.levels:
            if hasattr(level, "downsample"):
                x = level.downsample.conv(x)
                x = level.downsample.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = level.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, H, W]
        return self.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))


def interleaved(channels: int, groups: int) -> Tensor:
    """`[C]`: the contiguous-groups channel that each channel of the interleaved layout holds."""
    return torch.arange(channels).view(groups, -1).T.flatten()


def _index_features(window: int) -> Tensor:
    """`[N, N, 5]`: row^2, col^2, row * col, row, col of the displacement from query to key."""
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window)).float()  # [N, 2]
    row, col = (place.unsqueeze(0) - place.unsqueeze(1)).unbind(-1)  # [N, N]
    return torch.stack([row * row, col * col, row * col, row, col], -1)
