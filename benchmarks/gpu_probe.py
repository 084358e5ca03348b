"""What a device is, and what can run on it.

python -m benchmarks.gpu_probe [--device cuda] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from posmlp_kernels import backends

from .timing import machine, version, write


def probe(device: torch.device) -> dict:
    """The machine, versions (None for what is missing), and the names of our back ends for the device."""
    about = machine(device) | {name: version(name) for name in ("triton", "timm", "matplotlib")}
    about["backends"] = [name for name in backends() if (name == "cpu") == (device.type == "cpu")]
    about["backends"] = [name for name in about["backends"] if name != "reference"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return about


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, help="write it as JSON")
    given = parser.parse_args()
    if given.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; `--device cpu --quick` rehearses without one")
    about = probe(given.device)
    for name, value in about.items():
        print(f"{name:<16}{value}")
    write(about, given.out)


if __name__ == "__main__":
    main()
