"""What one untouched block teaches glibc."""

import ctypes
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, torch
from posmlp.allocator import keep_freed_memory

class Counts(ctypes.Structure):  # struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split()]
    _fields_ += [(name, ctypes.c_size_t) for name in "usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Counts

def maps_separately(size):
    before = libc.mallinfo2().hblks
    block = torch.empty(size, dtype=torch.uint8)
    return libc.mallinfo2().hblks - before

keep_freed_memory()
print(maps_separately(30 * 2**20), maps_separately(30 * 2**20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_large_blocks_come_from_the_heap(monkeypatch):
    """Blocks that are mapped separately go back to the system when they are freed; those of the heap stay,
    up to twice the size of the block that glibc has learned from."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("a glibc before 2.33, which cannot say it")
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]
