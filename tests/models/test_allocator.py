"""What one untouched block teaches glibc."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from posmlp.allocator import keep_freed_memory
if {taught}:
    keep_freed_memory()

def forward():
    maps = [torch.ones(2**20) for _ in range(6)]  # 4 MB each, alive at once
    del maps

for _ in range(3):
    forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    forward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM.format(taught=taught)], capture_output=True, check=True
            ).stdout
        )
        for taught in (False, True)
    ]
    assert faults[1] < faults[0] / 10
