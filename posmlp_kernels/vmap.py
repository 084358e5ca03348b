"""vmap for an op that knows nothing of it: one call per element of the mapped dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def register_vmap_by_loop(op: torch._ops.OpOverload, library: torch.library.Library) -> None:
    """Let `torch.vmap` map a functional op by calling it once per element and stacking the results."""

    def rule(info, in_dims, *args):
        def element(index: int) -> list:
            return [
                a.select(dim, index) if isinstance(a, Tensor) and dim is not None else a
                for a, dim in zip(args, in_dims, strict=True)
            ]

        results = [op(*element(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    torch.library.register_vmap(op, rule, lib=library)
