"""Which back end runs a problem, and why the others do not.

Support is a list of reasons, never a bare bool. A back end named by the caller runs or raises with every
reason; without a name the first of `BACKENDS` that has no reason against it runs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass

import torch
from torch import Tensor

from .pos_gate import compiled, ops, reference, triton
from .problem import Problem

Inputs = tuple["Tensor | None", ...]


@dataclass(frozen=True)
class Backend:
    """A way to run the operator.

    `unavailable()` is about this machine, `unsupported(problem)` about one call, and `declined(problem)`
    holds what stops the automatic choice, but not a caller who asks for the back end by name.
    """

    name: str
    unavailable: Callable[[], list[str]]
    unsupported: Callable[[Problem], list[str]]
    declined: Callable[[Problem], list[str]]
    run: Callable[[Inputs, Problem], Tensor]

    def refusals(self, problem: Problem) -> list[str]:
        return self.unavailable() or self.unsupported(problem)


def _no_reason(problem: Problem | None = None) -> list[str]:
    return []


def _registered(name: str) -> Callable[[Inputs, Problem], Tensor]:
    return lambda inputs, problem: ops.run(name, inputs, problem)


# The fastest first; the reference runs everything and ends the list.
BACKENDS = (
    Backend(
        "cuda",
        compiled.cuda_unavailable,
        compiled.cuda_unsupported,
        compiled.cuda_declined,
        _registered("cuda"),
    ),
    Backend("triton", triton.unavailable, triton.unsupported, triton.declined, _registered("triton")),
    Backend("cpu", compiled.cpu_unavailable, compiled.cpu_unsupported, _no_reason, _registered("cpu")),
    Backend(
        "reference",
        _no_reason,
        _no_reason,
        _no_reason,
        lambda inputs, problem: reference.run(*inputs, problem),
    ),
)


class _Forced(threading.local):
    """The names of the `use_backend` blocks that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.names: list[str | None] = []


_forced = _Forced()
_announced: set[str] = set()


class use_backend(ContextDecorator):  # noqa: N801 (reads as torch.no_grad does)
    """Run every `pos_gate` inside the `with` block, or inside the decorated function, on one back end.

    `None` gives the automatic choice back. A `backend=` argument of a call is stronger. A `gqpe_table`
    follows where that back end can make it; elsewhere the fastest one does.
    Raises: `ValueError` for a name that is not a back end's.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            find_backend(name)
        self.name = name

    def __enter__(self) -> use_backend:
        _forced.names.append(self.name)
        return self

    def __exit__(self, *exception: object) -> None:
        _forced.names.pop()


def backends() -> tuple[str, ...]:
    """The names of the back ends that can run on this machine, the fastest first."""
    return tuple(b.name for b in BACKENDS if not b.unavailable())


def find_backend(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"backend must be one of {', '.join(b.name for b in BACKENDS)}, got {name!r}")


def asked_for(name: str | None) -> str | None:
    """The back end that a call, or else the `use_backend` block around it, asks for by name."""
    return name or (_forced.names[-1] if _forced.names else None)


def choose(problem: Problem, name: str | None = None) -> Backend:
    """The back end that runs a problem.

    Raises: `ValueError` for an unknown name, `NotImplementedError` with every reason where the named one
        cannot serve.
    """
    name = asked_for(name)
    if name is not None:
        backend = find_backend(name)
        reasons = backend.refusals(problem)
        if reasons:
            raise NotImplementedError(f"backend {name!r} cannot run this pos_gate: {'; '.join(reasons)}")
        return backend
    for backend in BACKENDS:
        if not backend.refusals(problem) and not backend.declined(problem):
            break
    if backend.name == "reference" and not torch.compiler.is_compiling():
        _announce_slow_choice(problem)
    return backend


def choose_able(problem: Problem, names: Sequence[str], name: str | None = None) -> Backend:
    """The back end, among some and the reference, for what a gate needs made: never an error.

    It is the named one, or that in force, where it can serve, else the fastest that can.
    Raises: `ValueError` for a name that is not a back end's.
    """
    if name is not None:
        find_backend(name)
    forced = asked_for(name)
    able = [b for b in BACKENDS if b.name in names and not b.refusals(problem)]
    for backend in able:
        if backend.name == forced:
            return backend
    for backend in able:
        if forced != "reference" and not backend.declined(problem):
            return backend
    return find_backend("reference")


def describe(problem: Problem | None, name: str | None = None) -> str:
    """A line per back end: chosen, able, or every reason against it."""
    chosen = None if problem is None else choose(problem, name).name
    lines = []
    for backend in BACKENDS:
        reasons = backend.unavailable() if problem is None else backend.refusals(problem)
        verdict = "no: " + "; ".join(reasons) if reasons else "yes"
        if not reasons and problem is not None and backend.declined(problem):
            verdict = "only by name: " + "; ".join(backend.declined(problem))
        if backend.name == chosen:
            verdict += "  <- runs"
        lines.append(f"{backend.name:<10} {verdict}")
    return "\n".join(lines)


def _announce_slow_choice(problem: Problem) -> None:
    """Say once per set of reasons that a problem runs on the slow back end of its device."""
    kind = problem.device.type
    native = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(kind, ())
    reasons = []
    for name in native:
        backend = find_backend(name)
        reasons += [f"{name}: {reason}" for reason in backend.refusals(problem) or backend.declined(problem)]
    why = "; ".join(reasons) or "there is no other"
    message = f"pos_gate runs on the slow reference back end for {kind} tensors ({why})"
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, stacklevel=5)
