"""Memory that a model has touched stays with the process from one call to the next."""

from __future__ import annotations

from functools import cache

import torch

_BYTES = 31 * 2**20  # glibc learns from blocks of up to 32 MB


@cache
def keep_freed_memory() -> None:
    """Have glibc keep some 60 MB of freed memory, instead of returning it to the system in every forward.

    It maps large blocks separately, and gives the end of its heap back once more is free there than twice
    the largest such block that was ever freed (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD). What comes
    back later costs a page fault for every 4 KB. So one large block comes and goes, which nobody touches.
    Other allocators, and a glibc that the environment has given thresholds, do not care.
    """
    torch.empty(_BYTES, dtype=torch.uint8, device="cpu")
