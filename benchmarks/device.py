"""Time, memory and launches on a GPU.

Events around the work tell the GPU's own time. The host launches while the GPU is still kept waiting, so
that its pace does not count, and before each run the L2 is filled with something else: by reading, because
what is written would have to leave the L2 during the run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_BURST = 0.03  # seconds that a contender keeps in a round
_MOST_RUNS = 30  # in a burst: with more, launches would fill the queue
_CYCLES = 2e9  # of a GPU in a second, about
_LONGEST_WAIT = 0.02  # seconds
_L2 = 2**26  # bytes, where torch does not say


class DeviceClock:
    """Times work on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _L2
        self._other = torch.ones(4 * size // 4, dtype=torch.int32, device=device)

    def burst(self, work: Callable[[], object]) -> list[float]:
        """Seconds of a few runs, of which the first, unmeasured one says how many."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        launched = time.perf_counter() - start
        torch.cuda.synchronize()
        whole = time.perf_counter() - start
        cycles = int(_CYCLES * min(2 * launched + 1e-4, _LONGEST_WAIT))
        events = [self._run(work, cycles) for _ in range(max(1, min(_MOST_RUNS, int(_BURST / whole))))]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def _run(self, work: Callable[[], object], cycles: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.sum()
        torch.cuda._sleep(cycles)
        begin.record()
        work()
        end.record()
        return begin, end


def built_and_weighed(
    build: Callable[..., Callable[[], object]], *arguments: object
) -> tuple[Callable[[], object], int]:
    """`work = build(*arguments)`, and the most bytes that it holds while it runs, what it keeps included."""
    before = torch.cuda.memory_allocated()
    work = build(*arguments)
    work()  # compiles, and makes an optimizer's state
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    return work, torch.cuda.max_memory_allocated() - before


def host_seconds(work: Callable[[], object], runs: int = 200, burst: int = 20) -> float:
    """The median time until a call returns, not waiting for the device, on which it leaves its launches."""
    times = []
    for run in range(runs):
        if run % burst == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def launches(work: Callable[[], object]) -> list[str] | None:
    """The kernels, copies and fills that a call runs on the GPU, by name; None if the profiler sees none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    ran = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in ran if not getattr(event, "is_user_annotation", False)] or None
