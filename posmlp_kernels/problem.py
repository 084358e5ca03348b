"""The vocabulary of the operator, and the one place where a user's arguments are checked.

Letters, everywhere in this package:

    B       batch                       S   channel groups
    map     (L,), (H, W) or (T, H, W)   D   channels of a group, C / S
    window  same rank as the map        N   tokens of a window, prod(window)
    C       width of the output; the input has 2C channels, [X1 | X2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Norm = tuple["Tensor | None", "Tensor | None", float]


@dataclass(frozen=True)
class Problem:
    """One call of the operator after all checks: what a back end needs to know to accept or to run it.

    `batch` and `map` may be symbolic while `torch.compile` traces; nothing else is.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    map: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]  # each in [0, window)
    groups: int
    channels: int
    softmax: bool
    activation: str
    eps: float | None  # of the LayerNorm on X1; None: there is none

    @property
    def tokens(self) -> int:
        """N, the tokens of a whole window."""
        return math.prod(self.window)

    @property
    def has_partial_windows(self) -> bool:
        """Whether a window sticks out of the map somewhere."""
        return any(s or size % w for size, w, s in zip(self.map, self.window, self.shift, strict=True))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens and windows are kept, and in which back ends get the parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, so that what is held in a wide dtype is not rounded to compute with it."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def as_tuple(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """An int for every dimension of the map, or one int per dimension."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(sizes) != rank or any(isinstance(v, bool) or not isinstance(v, int) for v in sizes):
        raise ValueError(f"{name} must be an int or {rank} ints, one per map dimension, got {value!r}")
    return sizes


def check(
    x: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    matrix: Tensor | None,
    norm: Norm | None,
    *,
    window: int | Sequence[int],
    softmax: bool,
    shift: int | Sequence[int] | None,
    activation: str,
) -> Problem:
    """Check every argument of `pos_gate` and say what is wrong by name.

    Raises `TypeError` for a wrong type or dtype, `ValueError` for a wrong shape, value or device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {_short(x.dtype)}")
    if x.dim() < 3:
        raise ValueError(f"x must be [B, *map, 2C] with a map of one dimension or more, got {list(x.shape)}")
    if x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of channels, [X1 | X2], got {x.shape[-1]}")
    channels, rank = x.shape[-1] // 2, x.dim() - 2

    window = as_tuple("window", window, rank)
    if min(window) < 1:
        raise ValueError(f"window must be at least 1 in every dimension, got {list(window)}")
    shift = as_tuple("shift", 0 if shift is None else shift, rank)
    if not isinstance(softmax, bool):
        raise TypeError(f"softmax must be a bool, got {softmax!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")

    tokens = math.prod(window)
    groups = _check_table_and_matrix(x, table, matrix, window, channels)
    if bias is not None:
        _check_parameter("bias", bias, x)
        _check_shape("bias", bias, "[N]", (tokens,))
    eps = None if norm is None else _check_norm(x, norm, channels)
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        norm_weight, norm_bias, _ = norm or (None, None, None)
        _check_finite(table, bias, matrix, norm_weight, norm_bias)

    return Problem(
        device=x.device,
        dtype=x.dtype,
        batch=x.shape[0],
        map=tuple(x.shape[1:-1]),
        window=window,
        shift=tuple(s % w for s, w in zip(shift, window, strict=True)),
        groups=groups,
        channels=channels,
        softmax=softmax,
        activation=activation,
        eps=eps,
    )


def check_mixing(
    table: Tensor | None, window: Sequence[int], matrix: Tensor | None
) -> tuple[tuple[int, ...], int]:
    """Check a relative table and a free matrix against a window; return the window and the groups."""
    window = tuple(window)
    tokens, table_sizes = math.prod(window), tuple(2 * w - 1 for w in window)
    if table is None and matrix is None:
        raise ValueError("table or matrix must be given, got None for both")
    groups = None
    if table is not None:
        if table.dim() != len(window) + 1 or tuple(table.shape[1:]) != table_sizes or table.shape[0] < 1:
            wanted = ", ".join(["S", *(f"2*{w}-1" for w in window)])
            sizes = ", ".join(["S", *map(str, table_sizes)])
            raise ValueError(f"table must be [{wanted}] = [{sizes}], got {list(table.shape)}")
        groups = table.shape[0]
    if matrix is not None:
        if matrix.dim() not in (2, 3) or tuple(matrix.shape[-2:]) != (tokens, tokens):
            raise ValueError(
                f"matrix must be [N, N] or [S, N, N] with N = {tokens}, got {list(matrix.shape)}"
            )
        matrix_groups = matrix.shape[0] if matrix.dim() == 3 else None
        if groups is not None and matrix_groups not in (None, groups):
            raise ValueError(f"matrix must have the table's {groups} groups, got {list(matrix.shape)}")
        if matrix_groups == 0:
            raise ValueError(f"matrix must have at least one group, got {list(matrix.shape)}")
        groups = groups or matrix_groups or 1
    return window, groups


def _check_table_and_matrix(
    x: Tensor, table: Tensor | None, matrix: Tensor | None, window: tuple[int, ...], channels: int
) -> int:
    if table is not None:
        _check_parameter("table", table, x)
    if matrix is not None:
        _check_parameter("matrix", matrix, x)
    _, groups = check_mixing(table, window, matrix)
    if channels % groups:
        name = "table" if table is not None else "matrix"
        raise ValueError(
            f"{name} must have a number of groups that divides C = {channels} channels, got S = {groups}"
        )
    return groups


def _check_norm(x: Tensor, norm: Norm, channels: int) -> float:
    if not isinstance(norm, (tuple, list)) or len(norm) != 3:
        raise TypeError(f"norm must be (weight, bias, eps), got {norm!r}")
    weight, bias, eps = norm
    for name, value in (("norm weight", weight), ("norm bias", bias)):
        if value is not None:
            _check_parameter(name, value, x)
            _check_shape(name, value, "[C]", (channels,))
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"norm eps must be a finite number of at least 0, got {eps!r}")
    return float(eps)


def _check_parameter(name: str, value: Tensor, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(value).__name__}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    if value.dtype not in (x.dtype, accumulate_dtype(x.dtype)):
        wanted = " or ".join(dict.fromkeys((_short(x.dtype), _short(accumulate_dtype(x.dtype)))))
        raise TypeError(f"{name} must be {wanted} where x is {_short(x.dtype)}, got {_short(value.dtype)}")


def _check_shape(name: str, value: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {list(shape)}, got {list(value.shape)}")


def _check_finite(*parameters: Tensor | None) -> None:
    """Under `torch.autograd.detect_anomaly()`, find a poisoned parameter before it spreads."""
    names = ("table", "bias", "matrix", "norm weight", "norm bias")
    for name, value in zip(names, parameters, strict=True):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{name} must be finite, got {int((~torch.isfinite(value)).sum())} values that are not"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
