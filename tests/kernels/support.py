"""What the operator's tests share: back ends that can run here, and the operator from its definition."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from posmlp_kernels import pos_gate
from posmlp_kernels.dispatch import BACKENDS, find_backend
from posmlp_kernels.testing import CASES, Case, assert_no_worse, find_case

ROOT = Path(__file__).resolve().parents[2]

# Interpreted Triton takes seconds where others take a millisecond: one case for each thing that a kernel does
# in a way of its own (tiling the channels, partial windows, each kind of mixing matrix, norm, ranks).
SAMPLE = {
    "odd_channels",
    "partial_learned",
    "line",
    "volume",
    "matrix_grouped",
    "sgu",
    "gelu_tanh_norm",
    "far_centres",
    "empty_batch",
}


def interpreted(backend: str) -> bool:
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def slow_to_start(backend: str) -> bool:
    """Whether every new problem takes seconds: interpreted, or compiled for it alone."""
    return backend == "triton"


def device_of(backend: str) -> str:
    """Where a back end's tensors live in these tests."""
    on_gpu = backend == "cuda" or (backend == "triton" and not interpreted(backend))
    return "cuda" if on_gpu else "cpu"


def over_backends(without: Iterable[str] = (), interpreter: bool = True) -> pytest.MarkDecorator:
    """Parametrise over every back end; one that cannot run here is one skipped test that says why.

    `interpreter=False` leaves interpreted Triton out, for what does not depend on the kernel: the
    registration that all compiled back ends share.
    """
    names = [b.name for b in BACKENDS if b.name not in without and (interpreter or not interpreted(b.name))]
    return pytest.mark.parametrize("backend", [_parameter(name, id=name) for name in names])


def seeds_of(backend: str, case: Case | None = None) -> range:
    """The draws over which errors are averaged: few where each takes seconds, but more where few entries of a
    table count, with which the largest error varies most."""
    few = 6 if case and case.table == "far" else 2
    return range(few if interpreted(backend) else 16)


def strided_case(backend: str) -> Case:
    """Partial, shifted windows on a map that they do not divide; smaller where Triton is interpreted."""
    case = find_case("shift_partial")
    return (
        replace(case, map=(4, 2), window=(3, 2), channels=6, shift=(1, 0)) if interpreted(backend) else case
    )


def over_cases(cases: Iterable[Case] = CASES, without: Iterable[str] = ()) -> pytest.MarkDecorator:
    """Parametrise over back ends and cases: all cases, or a sample where Triton is interpreted."""
    cases, parameters = tuple(cases), []
    for name in (backend.name for backend in BACKENDS if backend.name not in without):
        if not available(name):
            parameters.append(_parameter(name, None, id=name))
            continue
        chosen = [c for c in cases if not interpreted(name) or c.name in SAMPLE]
        parameters += [_parameter(name, case, id=f"{name}-{case.name}") for case in chosen]
    return pytest.mark.parametrize("backend, case", parameters)


def _parameter(backend: str, *values: object, id: str) -> object:
    marks = []
    if not available(backend):
        reasons = "; ".join(find_backend(backend).unavailable())
        marks.append(pytest.mark.skip(reason=f"{backend} cannot run here: {reasons}"))
    if device_of(backend) == "cuda":
        marks.append(pytest.mark.gpu)
    return pytest.param(backend, *values, id=id, marks=marks)


def skip_if_interpreter_lacks(backend: str, dtype: torch.dtype) -> None:
    if interpreted(backend) and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly; a GPU does not")


def available(backend: str) -> bool:
    return not find_backend(backend).unavailable()


@dataclass(frozen=True)
class Layout:
    """How a tensor is stored: its dimensions in some order, as a slice of a larger buffer."""

    order: tuple[int, ...]
    margin: int

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """The same values so stored; what lies between them is NaN."""
        stored = t.permute(self.order)
        buffer = t.new_full([n + self.margin for n in stored.shape], torch.nan)
        view = buffer[tuple(slice(self.margin, None) for _ in stored.shape)].copy_(stored)
        return view.permute([self.order.index(d) for d in range(t.dim())])


@cache
def instruction_sets() -> list[str]:
    """What the compiled kernels can use of this processor, best first: an unknown name is told."""
    code = (
        "import torch, posmlp_kernels as k; k.PosSGU(2, 1, groups=1, backend='cpu')(torch.ones(1, 1, 1, 2))"
    )
    environment = os.environ | {"POSMLP_CPU_KERNELS": "unknown", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    known = re.search("POSMLP_CPU_KERNELS must be one of (.*) on this processor", done.stderr)
    assert known, f"the cpu back end cannot run here: {done.stderr}"
    return known[1].split(", ")


def by_pairs(
    x,
    table,
    bias=None,
    *,
    window,
    softmax,
    matrix=None,
    shift=None,
    activation="none",
    norm=None,
):
    """The operator from its definition over pairs of tokens of the whole map, with no windows cut anywhere.

    Two tokens mix if they fall into the same window; the weight is then looked up by their displacement.
    Differentiable; memory and time grow with the square of the map, so for tiny maps only.
    """
    channels, size, rank = x.shape[-1] // 2, x.shape[1:-1], x.dim() - 2
    shift = (0,) * rank if shift is None else shift
    if activation != "none":
        x = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    x1, x2 = x[..., :channels], x[..., channels:]
    if norm is not None:
        mean = x1.mean(-1, keepdim=True)
        variance = (x1 - mean).square().mean(-1, keepdim=True)
        x1 = (x1 - mean) / (variance + norm[2]).sqrt() * norm[0] + norm[1]

    axes = [torch.arange(n) for n in size]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # [M, d]
    position = position + torch.tensor([s % w for s, w in zip(shift, window, strict=True)])
    sizes = torch.tensor(window)
    which, place = position // sizes, position % sizes  # the window, and the place in it
    together = (which[:, None] == which[None]).all(-1)  # [M, M], query x key
    token = torch.zeros(len(place), dtype=torch.long)
    for axis in range(rank):
        token = token * window[axis] + place[:, axis]

    logits = 0
    if table is not None:
        delta = (place[None] - place[:, None] + sizes - 1) * together[..., None]
        logits = table[(slice(None), *delta.unbind(-1))]  # [S, M, M]
    if matrix is not None:
        logits = logits + matrix[..., token[:, None], token[None]]
    if logits.dim() == 2:
        logits = logits[None]
    weights = logits.masked_fill(~together, -torch.inf).softmax(-1) if softmax else logits * together
    groups = weights.shape[0]
    tokens = x1.flatten(1, -2).unflatten(-1, (groups, channels // groups))  # [B, M, S, D]
    mixed = torch.einsum("gij,bjgd->bigd", weights, tokens).flatten(-2)
    if bias is not None:
        mixed = mixed + bias[token][:, None]
    return mixed.view(x1.shape) * x2


def results_of(tensors, dz, window, backend: str, dtype: torch.dtype, **settings) -> dict[str, torch.Tensor]:
    """z of a gate with a softmax, of x, a table and a bias, and their gradients."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    z = pos_gate(*leaves, window=window, softmax=True, backend=backend, **settings)
    names = ("z", "dx", "dtable", "dbias")
    return dict(zip(names, (z.detach(), *torch.autograd.grad(z, leaves, dz.to(dtype))), strict=True))


def assert_cpu_no_worse(draws, window, **settings) -> None:
    """Hold the CPU back end to eager's error over draws of `(tensors, dz)`, and to rounding in float64."""

    def results(backend: str, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
        return [results_of(*each, window, backend, dtype, **settings) for each in draws]

    truth = results("reference", torch.float64)
    assert_no_worse(results("cpu", torch.float32), results("reference", torch.float32), truth)
    for name, got in results_of(*draws[-1], window, "cpu", torch.float64, **settings).items():
        expected = truth[-1][name]
        assert torch.allclose(got, expected, rtol=0, atol=1e-13 * max(1, expected.abs().max().item())), name
