"""The original implementation's numbers through every back end.

Its conventions differ in three ways, undone here: channels of a group are interleaved; the first coordinate
is a column difference and the second a row difference with its sign flipped; its learned tables are flat and
indexed by query minus key.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import device_of, interpreted, over_backends

from posmlp_kernels import gqpe_table, mixing_matrix, pos_gate
from posmlp_kernels.encodings import gqpe_isotropic_table

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
NAMES = ["gqpe_w7", "gqpe_w14", "gqpe_far_center", "gqpe_isotropic", "lrpe_w7", "glrpe_w7", "lrpe_m_w5"]
# (x_j - x_i, y_i - y_j) = Q (row, column) with row = y_j - y_i and column = x_j - x_i
Q = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

golden = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=pytest.mark.skipif(not (GOLDEN / f"{n}.npz").exists(), reason=f"no {GOLDEN / n}.npz")
        )
        for n in NAMES
    ],
)


class Original:
    """A stored case in this package's conventions: leaves in the original's layout, so that their gradients
    compare directly, and what is built from them."""

    def __init__(self, name, dtype, device):
        stored = np.load(GOLDEN / f"{name}.npz")
        self.meta = json.loads(str(stored["meta"]))
        window, groups = self.meta["window"], self.meta["groups"]
        self.window, self.groups = (window, window), groups
        self.stored = {k: torch.from_numpy(stored[k]) for k in stored.files if k != "meta"}
        self.leaves = {
            k.removeprefix("param."): v.to(device, dtype).requires_grad_()
            for k, v in self.stored.items()
            if k.startswith("param.")
        }
        self.q = Q.to(device, dtype)

    def table(self):
        window, leaves = self.window[0], self.leaves
        if self.meta["encoding"] == "lrpe":
            table = leaves["pos.window_relative_position_bias_table"]  # [(2w-1)^2, S]
            return table.T.reshape(-1, 2 * window - 1, 2 * window - 1).flip(1, 2)
        center = leaves["pos.attention_centers"] @ self.q  # rows: Q' centre'
        if self.meta["generalized"]:
            return gqpe_table(center, self.q.T @ leaves["pos.attention_spreads"], self.window)
        return gqpe_isotropic_table(center, leaves["pos.attention_spreads"], self.window)

    def free_matrix(self):
        return self.leaves["token_proj_n_weight"][0] if self.meta["dense"] else None

    def bias(self):
        return self.leaves["pos.token_proj_n_bias"].flatten()

    def softmax(self):
        return self.meta["encoding"] == "gqpe"

    def grouped(self, t):
        """Interleaved to contiguous groups, within one half of the channels."""
        return t.unflatten(-1, (-1, self.groups)).transpose(-1, -2).flatten(-2)

    def interleaved(self, t):
        return t.unflatten(-1, (self.groups, -1)).transpose(-1, -2).flatten(-2)

    def as_map(self, t):
        """[B, T, N, C] -> [B * T, h, w, C]: every window is a map of its own."""
        return t.flatten(0, 1).unflatten(1, self.window)


def largest_error(actual, truth):
    """Relative to the largest entry, which is what float32 storage of the truth allows to ask for."""
    return ((actual.detach().cpu().double() - truth).abs().max() / truth.abs().max()).item()


@golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@over_backends()
def test_gate(backend, dtype, name):
    if interpreted(backend) and (dtype == torch.float64 or name == "gqpe_w14"):
        pytest.skip("interpreted Triton is slow: float32 and windows of 7 here, float64 in the other tests")
    device = device_of(backend)
    case = Original(name, dtype, device)
    x = case.stored["x"].to(device, dtype).requires_grad_()
    halves = [case.grouped(half) for half in case.as_map(x).chunk(2, -1)]
    z = pos_gate(
        torch.cat(halves, -1),
        case.table(),
        case.bias(),
        matrix=case.free_matrix(),
        window=case.window,
        softmax=case.softmax(),
        backend=backend,
    )
    y = case.interleaved(z).flatten(1, 2).view(case.stored["y"].shape)
    y.backward(case.stored["dy"].to(device, dtype))

    errors = {"y": largest_error(y, case.stored["y"]), "dx": largest_error(x.grad, case.stored["dx"])}
    for key, leaf in case.leaves.items():
        errors[f"d{key}"] = largest_error(leaf.grad, case.stored[f"grad.{key}"])
    # The arrays are stored in float32; parameter gradients in float64 were computed from them.
    assert all(error < 1e-5 for error in errors.values()), errors


@golden
def test_matrix(name):
    case = Original(name, torch.float64, "cpu")
    matrix = mixing_matrix(case.table(), case.window, case.softmax())
    assert largest_error(matrix, case.stored["matrix"].double()) < 1e-6
