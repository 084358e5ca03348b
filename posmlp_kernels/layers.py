"""`PosSGU`, the positional spatial gating unit as a drop-in layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cache import ParameterCache
from .dispatch import asked_for, find_backend
from .encodings import gqpe_isotropic_table, gqpe_table
from .gqpe_table import ops as table_ops
from .operator import pos_gate
from .pos_gate import ops
from .pos_gate.compiled import cpu_unavailable
from .problem import ACTIVATIONS, as_tuple

ENCODINGS = ("gqpe", "gqpe_isotropic", "lrpe", "lrpe_m", "sgu")


class PosSGU(nn.Module):
    """The positional spatial gating unit of PosMLP (ACM MM 2022), and with `encoding="sgu"` that of gMLP.

    `[B, *map, dim] -> [B, *map, dim // 2]`; a two-dimensional window also takes tokens `[B, N, dim]` of one
    window.

    Args:
        dim: channels of the input, 2C.
        window: tokens per map dimension; an int stands for a square, two-dimensional window.
        groups: S, the channel groups with an encoding of their own; divides C.
        encoding: "gqpe" (quadratic, group-wise), "gqpe_isotropic", "lrpe" (a learned table per group),
            "lrpe_m" (with a free matrix shared by the groups), "sgu" (the free matrix alone, with `norm`).
        bias: a bias per token of the window.
        norm: LayerNorm over the mixed half's channels; always on for "sgu".
        shift: moves the window grid by `-shift` tokens.
        activation: "none", "gelu" or "gelu_tanh", applied to the whole input first.
        backend: a name from `backends()`; None takes the fastest.

    In eval mode, without gradients, the table of a quadratic encoding is kept until a parameter changes.
    (Away from the CPU, where comparing values would wait for the device, a write through `.data` is seen
    only after `train()` or `eval()` has been called.)

    Raises: `ValueError` for sizes that do not fit or unknown names.
    """

    def __init__(
        self,
        dim: int,
        window: int | Sequence[int],
        *,
        groups: int = 8,
        encoding: str = "gqpe",
        bias: bool = True,
        norm: bool = False,
        shift: int | Sequence[int] | None = None,
        activation: str = "none",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window = as_tuple("window", window, len(window) if isinstance(window, Sequence) else 2)
        self.shift = as_tuple("shift", 0 if shift is None else shift, len(self.window))
        self.dim, self.groups, self.encoding = dim, groups, encoding
        self.activation, self.backend = activation, backend
        self._check()

        rank, tokens, channels = len(self.window), math.prod(self.window), dim // 2
        new = {"device": device, "dtype": dtype}
        if encoding in ("gqpe", "gqpe_isotropic"):
            self.center = nn.Parameter(torch.empty(groups, rank, **new))
        if encoding == "gqpe":
            self.factor = nn.Parameter(torch.empty(groups, rank, rank, **new))
        if encoding == "gqpe_isotropic":
            self.scale = nn.Parameter(torch.empty(groups, **new))
        if encoding in ("lrpe", "lrpe_m"):
            self.table = nn.Parameter(torch.empty(groups, *(2 * w - 1 for w in self.window), **new))
        has_matrix = encoding in ("lrpe_m", "sgu")
        self.matrix = nn.Parameter(torch.empty(tokens, tokens, **new)) if has_matrix else None
        self.bias = nn.Parameter(torch.empty(tokens, **new)) if bias else None
        self.norm = nn.LayerNorm(channels, **new) if norm or encoding == "sgu" else None
        self._cache = ParameterCache()
        self.reset_parameters()

    @property
    def softmax(self) -> bool:
        """Whether the rows of the mixing matrix are normalised."""
        return self.encoding.startswith("gqpe")

    def reset_parameters(self) -> None:
        """Draw the initial values: those of the paper's code, but for LRPE tables, which it left at zero."""
        if self.encoding in ("gqpe", "gqpe_isotropic"):
            nn.init.normal_(self.center, std=1e-2)
        if self.encoding == "gqpe":
            nn.init.normal_(self.factor, std=1e-2)
            with torch.no_grad():
                self.factor += torch.eye(len(self.window), device=self.factor.device, dtype=self.factor.dtype)
        if self.encoding == "gqpe_isotropic":
            nn.init.normal_(self.scale, mean=1.0, std=1e-2)
        if self.encoding in ("lrpe", "lrpe_m"):
            nn.init.trunc_normal_(self.table, std=0.02)
        if self.matrix is not None:
            nn.init.normal_(self.matrix, std=1e-6)
        if self.bias is not None:
            nn.init.constant_(self.bias, 1.0 if self.encoding == "sgu" else 0.0)
        if self.norm is not None:
            self.norm.reset_parameters()

    init_weights = reset_parameters  # the name by which timm's models initialise their gates

    def table_parameters(self) -> tuple[Tensor, ...]:
        """What the relative table is computed from; nothing where it is a parameter itself, or absent."""
        if self.encoding == "gqpe":
            return self.center, self.factor
        return (self.center, self.scale) if self.encoding == "gqpe_isotropic" else ()

    def relative_table(self) -> Tensor | None:
        """The relative table `[S, *(2*window-1)]` that the parameters stand for; None for "sgu"."""
        parameters = self.table_parameters()
        if not parameters:
            return None if self.encoding == "sgu" else self.table
        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return self._build_table()
        return self._cache.get(parameters, self.window, self._build_table)

    def _build_table(self) -> Tensor:
        parameters = self.table_parameters()
        if self.encoding == "gqpe" and "cpu" in table_ops.BACKENDS and self._chooses_cpu(*parameters):
            return table_ops.run("cpu", *parameters, self.window)
        table = gqpe_table if self.encoding == "gqpe" else gqpe_isotropic_table
        return table(*parameters, self.window, backend=self.backend)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [B, *map, {self.dim}], got {list(x.shape)}")
        tokens_only = x.dim() == 3 and len(self.window) > 1
        if tokens_only and x.shape[1] != math.prod(self.window):
            raise ValueError(
                f"x as tokens must be [B, {math.prod(self.window)}, {self.dim}], got {list(x.shape)}"
            )
        x = x.unflatten(1, self.window) if tokens_only else x
        fits = self.norm is None and x.dim() - 2 == len(self.window)
        if fits and self._chooses_cpu(x, *self._parameters.values()):
            z = self.run_compiled(x, self.relative_table())
        else:
            z = pos_gate(x, **self.gate_arguments())
        return z.flatten(1, -2) if tokens_only else z

    def runs_compiled(self) -> bool:
        """Whether `forward` comes to `run_compiled`, for a float32 map on the CPU."""
        return self.norm is None and not cpu_unavailable() and asked_for(self.backend) in (None, "cpu")

    def run_compiled(self, x: Tensor, table: Tensor | None) -> Tensor:
        """`forward` of a map, given the table, by the CPU's op at once: what keeps its memory safe is
        checked."""
        window, shift = tuple(self.window), tuple(self.shift)  # lists, if set anew
        settings = ops.settings_without_norm(window, shift, self.softmax, self.activation)
        inputs = (x, table, self.bias, self.matrix, None, None)
        if torch.is_grad_enabled():
            return ops.run_with("cpu", inputs, settings)
        return ops.forward_op("cpu")(*inputs, *settings)

    def _chooses_cpu(self, *tensors: Tensor | None) -> bool:
        """Whether the functions behind this layer are sure to find nothing wrong with these tensors, and to
        choose the CPU's ops. What they ask shows beside a small gate, most of all when none of it is in a
        cache."""
        for tensor in tensors:
            if tensor is not None and not (tensor.is_cpu and tensor.dtype is torch.float32):
                return False
        return (
            len(self.window) <= 3
            and not torch.compiler.is_compiling()
            and not torch.is_anomaly_enabled()
            and not cpu_unavailable()
            and asked_for(self.backend) in (None, "cpu")
        )

    def gate_arguments(self) -> dict[str, Any]:
        """What `pos_gate` and `explain` take besides `x`, by name."""
        return {
            "table": self.relative_table(),
            "bias": self.bias,
            "window": self.window,
            "softmax": self.softmax,
            "matrix": self.matrix,
            "shift": self.shift,
            "activation": self.activation,
            "norm": None if self.norm is None else (self.norm.weight, self.norm.bias, self.norm.eps),
            "backend": self.backend,
        }

    def train(self, mode: bool = True) -> PosSGU:
        self._cache.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        text = f"{self.dim}, window={self.window}, groups={self.groups}, encoding={self.encoding!r}"
        text += f", bias={self.bias is not None}"
        if any(self.shift):
            text += f", shift={self.shift}"
        if self.activation != "none":
            text += f", activation={self.activation!r}"
        return text

    def _check(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim must be an even number of channels, [X1 | X2], got {self.dim!r}")
        if len(self.window) < 1 or min(self.window) < 1:
            raise ValueError(f"window must be at least 1 in every dimension, got {list(self.window)}")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}")
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"groups must be a positive int, got {self.groups!r}")
        if self.encoding != "sgu" and (self.dim // 2) % self.groups:
            raise ValueError(
                f"groups must divide the C = dim / 2 = {self.dim // 2} channels, got {self.groups}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.backend is not None:
            find_backend(self.backend)
