"""The original's models, regenerated from the golden files beside the repository."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no golden files at {FOLDER}")


def state_dict(name):
    """The original's state dict, in float64, buffers included."""
    state = {}
    for key, entry in json.loads((FOLDER / f"{name}.json").read_text()).items():
        random = np.random.default_rng(zlib.crc32(key.encode()))
        base = np.eye(2) if entry["base"] == "identity" else entry["base"]
        state[key] = torch.as_tensor(base + entry["scale"] * random.standard_normal(entry["shape"]))
        if key.endswith("attention_centers"):
            state[key.replace("attention_centers", "rel_indices")] = torch.zeros(4, 4, 5)
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return state


def image(name, size):
    random = np.random.default_rng(zlib.crc32(f"{name}{size}image".encode()))
    return torch.as_tensor(random.standard_normal((1, 3, size, size)))


def load(name):
    """A golden file's arrays as tensors, and its description."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else {}
        return {key: torch.as_tensor(arrays[key]) for key in arrays if key != "meta"}, meta
