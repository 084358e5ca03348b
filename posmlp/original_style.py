"""The gate as the paper's released code computes it, to measure against and to check layouts with.

Eager PyTorch throughout: windows are cut by a copy, the channel groups are interleaved and dealt out by
views, the mixing map `[N, N, S]` is built from index features on every call, and one einsum mixes all
windows, for which it copies the map once per window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posmlp_kernels import PosSGU


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


def interleaved(channels: int, groups: int) -> Tensor:
    """`[C]`: the contiguous-groups channel that each channel of the interleaved layout holds."""
    return torch.arange(channels).view(groups, -1).T.flatten()


def _index_features(window: int) -> Tensor:
    """`[N, N, 5]`: row^2, col^2, row * col, row, col of the displacement from query to key."""
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window)).float()  # [N, 2]
    row, col = (place.unsqueeze(0) - place.unsqueeze(1)).unbind(-1)  # [N, N]
    return torch.stack([row * row, col * col, row * col, row, col], -1)
