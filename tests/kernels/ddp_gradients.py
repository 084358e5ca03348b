"""One rank of a data-parallel step; run as `python ddp_gradients.py BACKEND RANK STORE`, once per rank.

Each of two ranks takes half of a batch; after DDP both must hold the mean of the two plain gradients.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from datetime import timedelta

import torch
from torch import distributed

from posmlp_kernels import PosSGU

WORLD_SIZE = 2
LIMIT = timedelta(seconds=60)


def check_gradients(backend: str, rank: int, store: str) -> None:
    torch.manual_seed(0)
    options = {"groups": 2, "encoding": "lrpe_m", "norm": True, "backend": backend, "dtype": torch.float64}
    plain = PosSGU(16, (3, 4), **options)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    halves = torch.randn(WORLD_SIZE, 2, 5, 7, 16, dtype=torch.float64)

    inner = copy.deepcopy(plain)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE, timeout=LIMIT
    )
    wrapped = torch.nn.parallel.DistributedDataParallel(inner)
    for _ in range(2):  # the second step finds hooks that the first left unfired
        inner.zero_grad()
        wrapped(halves[rank]).square().sum().backward()

    (sum(plain(half).square().sum() for half in halves) / WORLD_SIZE).backward()
    for (name, expected), actual in zip(plain.named_parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"d{name}: {m}"
        )


if __name__ == "__main__":
    status = 0
    try:
        check_gradients(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    # No clean end: DDP drops the last reference to the process group while it holds the GIL, and the group's
    # destructor may wait for a thread that waits for the GIL.
    os._exit(status)
