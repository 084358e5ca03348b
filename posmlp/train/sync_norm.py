"""Batch norm over the images of all processes, so that N processes train as one with N times the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for processes on CPUs, which torch's own does not serve: `[B, C, H, W]`, same shape.

    Every process must bring as many values. A second pass gives the variance: no cancellation.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        world, dims = dist.get_world_size(), (0, 2, 3)
        count = world * x.numel() // x.shape[1]
        mean = all_reduce(x.sum(dims)) / count  # [C]
        centred = x - mean.view(-1, 1, 1)
        variance = all_reduce(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def synchronize_norms(model: nn.Module, device: torch.device) -> None:
    """Give the model's batch norms the statistics of all processes, in place; its parameters stay its own."""
    if device.type != "cpu":
        for parent in model.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
