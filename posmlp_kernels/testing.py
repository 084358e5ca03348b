"""What tests and benchmarks share: cases with a reason, their inputs, and the measure of error.

Needs nothing but torch, so that a package can be checked wherever it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .encodings import gqpe_table
from .operator import pos_gate
from .pos_gate import reference
from .problem import check

PARAMETERS = ("table", "bias", "matrix", "norm_weight", "norm_bias")
Inputs = dict[str, "Tensor | None"]  # x, the parameters and dz


@dataclass(frozen=True)
class Case:
    """One problem for the operator, and why it is worth running."""

    name: str
    why: str
    map: tuple[int, ...]
    window: tuple[int, ...]
    groups: int
    channels: int  # C; x has 2C
    batch: int = 2
    softmax: bool = True
    table: str = "gqpe"  # or "far" (centres far outside the window), "learned", "none"
    matrix: str = "none"  # or "shared" [N, N], "grouped" [S, N, N]
    bias: bool = True
    shift: tuple[int, ...] | None = None
    activation: str = "none"
    norm: bool = False

    @property
    def settings(self) -> dict:
        """The arguments of `pos_gate` that are not tensors, without `norm` and `backend`."""
        return {
            "window": self.window,
            "softmax": self.softmax,
            "shift": self.shift,
            "activation": self.activation,
        }


CASES = (
    Case("tiles", "the default layer: quadratic tables on windows that tile the map", (8, 8), (4, 4), 2, 24),
    Case("last_stage", "one window is the map, D = 12 as in the last stage", (7, 7), (7, 7), 4, 48),
    Case(
        "published_window", "the window of PosMLP, D = 24: sums over 196 tokens", (14, 14), (14, 14), 2, 48, 1
    ),
    Case("odd_channels", "D = 5: no vector width and no tile divides it", (4, 6), (2, 3), 3, 15),
    Case("wide_group", "S = 1 and D = 130: more channels than one tile holds", (4, 4), (4, 4), 1, 130, 1),
    Case("partial", "windows stick out: absent tokens leave the normaliser", (9, 10), (4, 4), 2, 24),
    Case(
        "partial_learned",
        "without a normaliser absent tokens must still add nothing",
        (5, 7),
        (4, 3),
        2,
        10,
        softmax=False,
        table="learned",
    ),
    Case("larger_window", "the only window is larger than the map", (3, 4), (7, 5), 2, 24),
    Case(
        "window_of_one",
        "nothing to mix: the table is one number per group",
        (3, 5),
        (1, 1),
        2,
        24,
        softmax=False,
        table="learned",
    ),
    Case("shift", "both ends of both axes have partial windows", (8, 8), (4, 4), 2, 24, shift=(2, 2)),
    Case(
        "shift_partial", "uneven shift and a map that no window divides", (9, 7), (4, 3), 2, 10, shift=(1, 2)
    ),
    Case(
        "shift_wraps",
        "a shift counts modulo the window, negative ones too",
        (6, 6),
        (4, 4),
        2,
        8,
        shift=(-1, 5),
    ),
    Case("line", "a 1-D map", (11,), (4,), 2, 24),
    Case("volume", "a 3-D map, shifted along two axes", (3, 4, 5), (2, 4, 3), 2, 10, shift=(1, 0, 2)),
    Case("lrpe", "one learned table, no softmax", (8, 8), (4, 4), 1, 24, softmax=False, table="learned"),
    Case("no_bias", "bias is None", (6, 6), (3, 3), 2, 24, bias=False),
    Case(
        "matrix_shared",
        "LRPE-M: a learned table and one free matrix for all groups",
        (6, 6),
        (3, 3),
        2,
        24,
        softmax=False,
        table="learned",
        matrix="shared",
    ),
    Case(
        "matrix_grouped",
        "table and matrix are added before the softmax; partial windows",
        (5, 6),
        (3, 4),
        2,
        10,
        matrix="grouped",
        shift=(0, 1),
    ),
    Case(
        "matrix_alone",
        "softmax of a free matrix per group, no table",
        (5, 5),
        (3, 3),
        3,
        15,
        table="none",
        matrix="grouped",
    ),
    Case(
        "sgu",
        "gMLP: the free matrix alone, X1 layer-normalised",
        (4, 4),
        (4, 4),
        1,
        24,
        softmax=False,
        table="none",
        matrix="shared",
        norm=True,
    ),
    Case(
        "gelu",
        "the exact GELU is applied to both halves as they are loaded",
        (6, 6),
        (3, 3),
        2,
        24,
        activation="gelu",
    ),
    Case(
        "gelu_tanh_norm",
        "the order is activation, then norm; its backward crosses partial windows",
        (5, 7),
        (4, 4),
        2,
        10,
        activation="gelu_tanh",
        norm=True,
        shift=(1, 3),
    ),
    Case(
        "far_centres",
        "rows whose weights all underflow without their own maximum",
        (7, 7),
        (7, 7),
        3,
        12,
        table="far",
    ),
    Case(
        "many_windows",
        "parameter gradients are sums over hundreds of windows: they need a wide accumulator",
        (150,),
        (2,),
        2,
        10,
        4,
    ),
    Case("empty_batch", "no elements: parameter gradients are zeros", (4, 5), (3, 3), 2, 24, 0),
    Case(
        "one_token",
        "one present token in a window of many",
        (1, 1),
        (3, 3),
        2,
        10,
        softmax=False,
        table="learned",
    ),
)


def find_case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    parameter_dtype: torch.dtype | None = None,
) -> Inputs:
    """Random inputs of a case: x, its parameters and a gradient dz for the output.

    The same numbers for every dtype and device, up to the rounding. Parameters are in `dtype` unless
    `parameter_dtype` says otherwise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens, channels = math.prod(case.window), case.channels
    made: Inputs = {
        "x": normal(case.batch, *case.map, 2 * channels),
        "table": _make_table(case, normal),
        "bias": normal(tokens) if case.bias else None,
        "matrix": None,
        "norm_weight": 1 + normal(channels) / 4 if case.norm else None,
        "norm_bias": normal(channels) / 4 if case.norm else None,
        "dz": normal(case.batch, *case.map, channels),
    }
    if case.matrix != "none":
        groups = (case.groups,) if case.matrix == "grouped" else ()
        made["matrix"] = normal(*groups, tokens, tokens) / tokens**0.5
    wide = parameter_dtype or dtype
    return {
        name: None if t is None else t.to(device, wide if name in PARAMETERS else dtype)
        for name, t in made.items()
    }


def _make_table(case: Case, normal: Callable[..., Tensor]) -> Tensor | None:
    groups, rank = case.groups, len(case.window)
    if case.table == "none":
        return None
    if case.table == "learned":
        return normal(groups, *(2 * w - 1 for w in case.window)) / math.prod(case.window) ** 0.5
    # Half the identity: wide enough that no weight of a small window is negligible.
    factor = torch.eye(rank, dtype=torch.float64) / 2 + normal(groups, rank, rank) / 8
    return gqpe_table(normal(groups, rank) * (20 if case.table == "far" else 1), factor, case.window)


def run(case: Case, inputs: Inputs, backend: str | None = None) -> Tensor:
    """The operator on a case's inputs."""
    norm = (inputs["norm_weight"], inputs["norm_bias"], 1e-5) if case.norm else None
    x, table, bias, matrix = (inputs[name] for name in ("x", "table", "bias", "matrix"))
    return pos_gate(x, table, bias, matrix=matrix, norm=norm, backend=backend, **case.settings)


def run_eager(case: Case, inputs: Inputs) -> Tensor:
    """Plain PyTorch in x's own dtype: what a user would write, and the yardstick for errors."""
    x = inputs["x"]
    parameters = [None if inputs[name] is None else inputs[name].to(x.dtype) for name in PARAMETERS]
    table, bias, matrix, *norm = parameters
    problem = check(x, table, bias, matrix, (*norm, 1e-5) if case.norm else None, **case.settings)
    return reference.gate(x, *parameters, problem)


def with_gradients(
    function: Callable[[Case, Inputs], Tensor], case: Case, inputs: Inputs
) -> dict[str, Tensor]:
    """The output `z` of `function(case, inputs)` and the gradients `dx`, `dtable`, ... against `dz`."""
    names = [name for name in ("x", *PARAMETERS) if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    z = function(case, {**inputs, **leaves})
    gradients = torch.autograd.grad(z, list(leaves.values()), inputs["dz"])
    return {"z": z.detach(), **{f"d{name}": g for name, g in zip(names, gradients, strict=True)}}


def truth_of(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients in float64."""
    wide = {name: None if t is None else t.to("cpu", torch.float64) for name, t in inputs.items()}
    return with_gradients(run_eager, case, wide)


Results = Tensor | Mapping[str, Tensor]


def assert_no_worse(
    actual: Results | Sequence[Results],
    eager: Results | Sequence[Results],
    truth: Results | Sequence[Results],
    factor: float = 2.0,
    name: str = "result",
) -> None:
    """Hold `actual` to the error that plain PyTorch makes in the same dtype, both against float64.

    The largest error may be `factor` times eager's. Where eager is exact by luck (one term, no rounding),
    twice nothing would forbid the one rounding that any dtype must be allowed; so eager's error counts as at
    least one rounding unit of the largest entry. Mappings are compared entry by entry.

    The largest error of one draw is itself a random number, eager's too, and it varies between processors. In
    lists, one item per draw, the mean over the draws is compared.
    """
    if isinstance(truth, Sequence) and truth and isinstance(truth[0], Mapping):
        actual, eager, truth = map(_by_name, (actual, eager, truth))
    if isinstance(truth, Mapping):
        assert actual.keys() == eager.keys() == truth.keys(), f"{list(actual)}, {list(truth)} differ"
        for key in truth:
            assert_no_worse(actual[key], eager[key], truth[key], factor, key)
        return
    if isinstance(truth, Tensor):
        actual, eager, truth = [actual], [eager], [truth]
    errors = [_errors(*values, name) for values in zip(actual, eager, truth, strict=True)]
    error, eager_error, unit = (math.fsum(column) / len(errors) for column in zip(*errors, strict=True))
    allowed = factor * max(eager_error, unit)
    # "<=" rather than "not >": NaN must fail.
    assert error <= allowed, (
        f"{name}: error {error:.3e} is more than {factor} x eager's {eager_error:.3e} ({allowed=:.3e})"
    )


def _errors(actual: Tensor, eager: Tensor, truth: Tensor, name: str) -> tuple[float, float, float]:
    """The largest errors of actual and eager, and the rounding unit of truth's largest entry."""
    assert actual.shape == truth.shape, f"{name} must be {list(truth.shape)}, got {list(actual.shape)}"
    assert actual.dtype == eager.dtype, f"{name} must be {eager.dtype}, got {actual.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64, got {truth.dtype}"
    if truth.numel() == 0:
        return 0.0, 0.0, 0.0
    error, eager_error = (
        (t.detach().to("cpu", torch.float64) - truth).abs().max().item() for t in (actual, eager)
    )
    return error, eager_error, torch.finfo(actual.dtype).eps * truth.abs().max().item()


def _by_name(draws: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    assert all(draw.keys() == draws[0].keys() for draw in draws), "draws must hold the same results"
    return {name: [draw[name] for draw in draws] for name in draws[0]}


def assert_gate_no_worse(
    gate: Callable[[Case, Inputs], Tensor],
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    parameter_dtype: torch.dtype | None = None,
    seeds: Iterable[int] = range(16),
) -> list[dict[str, Tensor]]:
    """Hold the values and gradients of `gate(case, inputs)` to eager's error over many draws.

    Returns gate's results, one per seed. What gate leaves unwritten is NaN.
    """
    actual, eager, truth = [], [], []
    for seed in seeds:
        inputs = make_inputs(case, dtype, device, seed, parameter_dtype)
        with poisoned_memory():
            actual.append(with_gradients(gate, case, inputs))
        eager.append(with_gradients(run_eager, case, inputs))
        truth.append(truth_of(case, inputs))
    assert_no_worse(actual, eager, truth)
    return actual


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block memory that nobody has written is NaN, so that an output left unwritten shows.

    PyTorch fills what `empty` returns where deterministic algorithms are on, for compiled back ends too,
    because their `empty` goes through the dispatcher.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
