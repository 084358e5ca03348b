"""Medians of interleaved runs, the ceilings of the machine, and peak memory."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_TOUCHED = 768 << 20  # bytes: more than a forward and backward of any case holds
_BURST = 0.02  # seconds that a contender keeps in a round, so that short ones get as warm as long ones


@dataclass(frozen=True)
class Time:
    """Seconds: the median of some runs, and the spread between their quartiles."""

    median: float
    spread: float
    runs: int

    @classmethod
    def of(cls, times: list[float]) -> Time:
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return cls(statistics.median(times), high - low, len(times))


Burst = Callable[[Callable[[], object]], list[float]]


def wall(work: Callable[[], object]) -> list[float]:
    """Seconds of a few runs, by the host's clock; on a GPU from idle to idle."""
    times, now = [], _now()
    end = now + _BURST
    while now < end:
        start = now
        work()
        now = _now()
        times.append(now - start)
    return times


def race(
    contenders: Mapping[str, Callable[[], object]], seconds: float, rounds: int, burst: Burst = wall
) -> dict[str, Time]:
    """Time contenders in turn, round after round, so that the machine's drift meets all alike.

    Args:
        contenders: what to call, by name.
        seconds: to spend on each, at least.
        rounds: at least, after one that does not count.
        burst: how to time work a few times, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for work in contenders.values():
        burst(work)
    end, done = time.perf_counter() + seconds * len(contenders), 0
    while done < rounds or time.perf_counter() < end:
        for name, work in contenders.items():
            times[name] += burst(work)
        done += 1
    return {name: Time.of(runs) for name, runs in times.items()}


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Ceilings:
    """What the machine can do at best: a few works that race along with everything else.

    gemm: flops a second of torch's product of two square matrices (in float32 on a CPU, MKL's sgemm), of
        the side `size`; without one, what keeps the device busy.
    onednn: the same product by oneDNN, where torch has it; MKL keeps to AVX2 on processors not Intel's.
    copy: bytes a second, read and written, of a copy far larger than the caches.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int | None = None) -> None:
        size, depth = (size or 8192, 4) if device.type == "cuda" else (size or 2048, 16)
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        source = torch.zeros(size * size * depth, device=device)
        target = torch.empty_like(source).copy_(source)
        self.amounts = {"gemm": 2.0 * size**3, "copy": 2.0 * source.nbytes}
        self.works: dict[str, Callable[[], object]] = {
            "gemm": lambda: a @ b,
            "copy": lambda: target.copy_(source),
        }
        if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
            c, d = a.to_mkldnn(), b.to_mkldnn()
            self.amounts["onednn"] = self.amounts["gemm"]
            self.works["onednn"] = lambda: F.linear(c, d)

    def rates(self, times: Mapping[str, Time]) -> dict[str, float]:
        """Flops or bytes a second, from the results of a race."""
        return {name: amount / times[name].median for name, amount in self.amounts.items()}


def summary(rates: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of the ceilings found in all races of a run, in their order: how far the machine could be relied on."""
    columns = {name: [each[name] for each in rates] for name in (rates[0] if rates else ())}
    return {
        name: {
            "median": statistics.median(column),
            "first": column[0],
            "last": column[-1],
            "least": min(column),
            "most": max(column),
        }
        for name, column in columns.items()
    }


def keep_memory() -> None:
    """Have glibc serve all that this process asks for from a heap that it never gives back (mallopt(3)), and
    whose pages are there from the start.

    Otherwise blocks of more than 32 MB are mapped anew every time, and smaller ones when the heap happens to
    have been trimmed, or grows for the first case: page faults that come and go with what ran before, and can
    take as long as a gate.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            libc.mallopt(threshold, 2**30)
        torch.zeros(_TOUCHED, dtype=torch.uint8)


def peak_memory(build: Callable[..., Callable[[], object]], *arguments: object) -> int | None:
    """The most bytes that `work = build(*arguments); work(); work()` holds at a time, in a fresh process.

    On a GPU what its allocator handed out. On a CPU the high-water mark of resident memory beyond what the
    process held before `build`: libraries' buffers and the allocator's slack count, as they do in use. None
    where the system does not say (anything but Linux).
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, build, arguments).result()


def _peak(build: Callable[..., Callable[[], object]], arguments: tuple) -> int | None:
    before = _resident("VmRSS")
    work = build(*arguments)
    work()
    work()
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a process inherits the high-water mark of the one that started it.
    after = _resident("VmHWM")
    return None if before is None or after is None else after - before


def _resident(field: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return sizes[0] if sizes else None


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on, and with what."""
    return {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def version(name: str) -> str | None:
    """Of an optional module; None if importing it fails in any way: timm does beside a wrong torchvision."""
    try:
        return import_module(name).__version__
    except Exception:
        return None


def write(results: dict, path: Path | None) -> None:
    """As JSON, if a path is given; whole or not at all, whenever the program may be stopped."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with a plus where what is measured differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "posmlp_kernels", "posmlp")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
