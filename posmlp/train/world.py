"""The processes of one training run, as torchrun starts them; alone, a process is a world of one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .sync_norm import synchronize_norms


@dataclass(frozen=True)
class World:
    """`size` processes, this one being number `rank`, on `device`."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Meet the other processes that torchrun started; each takes the GPU of its local rank."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(0, 1, device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        world = cls(dist.get_rank(), size, device)
        world.wait()  # NCCL goes on alone: the first would write into a folder that others still look at
        return world

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.size > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Whether a flag is set in any process."""
        if self.size == 1:
            return list(flags)
        return (self.sum(torch.tensor(flags, dtype=torch.int32)) > 0).tolist()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as all processes train it: gradients are averaged, batch norms see everybody's images."""
        if self.size == 1:
            return model
        synchronize_norms(model, self.device)
        return DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )
