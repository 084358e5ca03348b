"""Warm-up, medians, and the machine's ceilings measured in the same run."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Time:
    """Seconds: the median of some runs, and the spread between their quartiles."""

    median: float
    spread: float


def measure(work: Callable[[], object], seconds: float = 0.6, least: int = 5) -> Time:
    """Run `work` after a warm-up until `seconds` have passed, at least `least` times."""
    for _ in range(2):
        work()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    low, _, high = statistics.quantiles(times, n=4)
    return Time(statistics.median(times), high - low)


def sgemm_rate(size: int = 2048) -> float:
    """Flops a second of torch's float32 product of two square matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / measure(lambda: a @ b).median


def copy_rate(megabytes: int = 256) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.zeros(megabytes * 2**20 // 4)
    target = torch.empty_like(source).copy_(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source)).median


def machine() -> dict:
    """What the figures were measured on, and with what."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
