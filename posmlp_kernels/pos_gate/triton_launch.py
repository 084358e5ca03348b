"""From tensors to launches: the forward and the backward of the Triton back end.

Arguments are those of the ops' schemas. Nothing here reads the device, so a CUDA graph can capture a call;
all launches go to the current stream of x's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem, accumulate_dtype
from . import triton_backward, triton_norm, triton_product, triton_tiles
from .ops import problem_of
from .triton_tiles import Tile, outer_tile, product_tile

Norm = tuple[Tensor, Tensor, Tensor, Tensor]  # mean, rstd: a number per token; weight, shift: [C]


def forward(x, table, bias, matrix, norm_weight, norm_bias, *settings) -> Tensor:
    """`posmlp_kernels::pos_gate`."""
    call = Call(x, table, matrix, problem_of(x, table, matrix, settings))
    z = x.new_empty((*x.shape[:-1], call.problem.channels))
    if z.numel():
        with call.device():
            mixing, norm = call.mixing(), call.norm(norm_weight, norm_bias)
            call.rows(mixing, norm, None if bias is None else bias.contiguous(), None, z, None, None)
    return z


def backward(dz, x, table, bias, matrix, norm_weight, norm_bias, *settings_and_flag) -> tuple[Tensor, ...]:
    """`posmlp_kernels::pos_gate_backward`; a gradient that is not wanted has no elements."""
    *settings, mixing_grad = settings_and_flag
    call = Call(x, table, matrix, problem_of(x, table, matrix, tuple(settings)))
    dx = x.new_empty(x.shape)
    parameters = (table, bias, matrix, norm_weight, norm_bias)
    wanted = (mixing_grad, True, mixing_grad, True, True)
    grads = [
        x.new_zeros(p.shape if p is not None and want else (0,), dtype=call.dtype)
        for p, want in zip(parameters, wanted, strict=True)
    ]
    if not dx.numel():
        return dx, *grads
    with call.device():
        dz = dz if dz.stride(-1) in (0, 1) else dz.contiguous()
        mixing, norm = call.mixing(), call.norm(norm_weight, norm_bias)
        bias = None if bias is None else bias.contiguous()
        db, delta = call.row_sums(bias is not None, mixing_grad and call.problem.softmax)
        call.rows(mixing, norm, bias, dz, dx[..., call.problem.channels :], db, delta)
        if bias is not None:
            grads[1] = db.sum((0, 1, 2))
        dnormed = None if norm is None else call.empty(*x.shape[:-1], call.problem.channels)
        call.columns(mixing, dz, dx, dnormed)
        if norm is not None:
            grads[3], grads[4] = call.norm_backward(norm, dnormed, dx)
        if mixing_grad:
            dlogits = call.logits(mixing, norm, dz, None if delta is None else delta.sum(1))
            if table is not None:
                grads[0] = call.table_gradient(dlogits).view(table.shape)
            if matrix is not None:
                grads[2] = dlogits.sum(0) if matrix.dim() == 3 else dlogits.sum((0, 1))
    return dx, *grads


class Call:
    """One call of the operator: what its launches have in common."""

    def __init__(self, x: Tensor, table: Tensor | None, matrix: Tensor | None, problem: Problem) -> None:
        p = self.problem = problem
        self.x = x if x.stride(-1) == 1 else x.contiguous()
        self.table = None if table is None else table.contiguous()
        self.matrix = None if matrix is None else matrix.contiguous()
        self.dtype = accumulate_dtype(x.dtype)

        ones = (1,) * (3 - len(p.map))
        self.map, self.window = ones + p.map, ones + p.window
        self.shift = (0,) * len(ones) + p.shift
        dimensions = list(zip(self.map, self.window, self.shift, strict=True))
        self.kind_counts = tuple(3 if s else 2 if m % w else 1 for m, w, s in dimensions)
        self.kinds = math.prod(self.kind_counts)
        self.group_channels = p.channels // p.groups
        counts = [_blocks(m + s, w) for m, w, s in dimensions]
        self.column_count = p.batch * math.prod(counts) * self.group_channels  # of all kinds
        self.windows = {"M": self.map, "SHIFT": self.shift, "W": self.window, "KINDS": self.kind_counts}
        self.accumulate = tl.float64 if self.dtype == torch.float64 else tl.float32
        self.common = {
            **self.windows,
            "S": p.groups,
            "D": self.group_channels,
            "ACT": p.activation,
            "ACC": self.accumulate,
            "INDEX": index_type(self.column_count),
            "PRECISION": "ieee",
        }

    def device(self) -> AbstractContextManager:
        device = self.problem.device
        return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """`[B, *map, channel]`, with a stride for the dimensions that the map lacks."""
        batch, *rest = tensor.stride()
        return (batch, *(0,) * (5 - tensor.dim()), *rest)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.problem.device)

    def stream(self) -> int:
        """Bytes that loading an element of X1 takes: its value, and the statistics of a norm."""
        return self.x.element_size() + (0 if self.problem.eps is None else 2 * self.dtype.itemsize)

    def tile(self, choose: Callable[..., Tile], stream: int) -> Tile:
        p = self.problem
        return choose(shared_memory(p.device), p.tokens, p.dtype, stream)

    def grid(self, tile: Tile, blocks: int, kinds: int) -> tuple[int, int]:
        """Programs that own a block of the output, and the shares into which their columns are cut."""
        owners = kinds * self.problem.groups * blocks
        shares = min(
            _blocks(self.column_count, tile.columns), _blocks(wanted_programs(self.problem.device), owners)
        )
        return owners, shares

    def mixing(self) -> tuple[Tensor | int | None, ...]:
        """What `mixing_tile` reads; the rows' maxima and reciprocal sums are computed here."""
        p, group_stride = self.problem, 0
        if self.matrix is not None and self.matrix.dim() == 3:
            group_stride = p.tokens**2
        row_max = row_rinv = None
        if p.softmax:
            row_max, row_rinv = self.empty(2, self.kinds, p.groups, p.tokens)
            size = 32 if self.dtype == torch.float32 else 16
            grid = (self.kinds * p.groups * _blocks(p.tokens, size),)
            triton_product.softmax_kernel[grid](
                self.table, self.matrix, group_stride, row_max, row_rinv, **self.windows, S=p.groups,
                ACC=self.accumulate, BM=size, BK=2 * size,
            )  # fmt: skip
        return self.table, self.matrix, group_stride, row_max, row_rinv

    def norm(self, weight: Tensor | None, shift: Tensor | None) -> Norm | None:
        p = self.problem
        if p.eps is None:
            return None
        tokens = self.x.numel() // (2 * p.channels)
        mean, rstd = self.empty(tokens), self.empty(tokens)
        rows, columns = _token_block(p.channels)
        triton_norm.statistics_kernel[(_blocks(tokens, rows),)](
            self.x, mean, rstd, tokens, self.map, self.strides(self.x), C=p.channels, EPS=p.eps,
            ACT=p.activation, ACC=self.accumulate, BT=rows, BC=columns,
        )  # fmt: skip
        return mean, rstd, weight.contiguous(), shift.contiguous()

    def row_sums(self, want_db: bool, want_delta: bool) -> tuple[Tensor | None, Tensor | None]:
        tile = self.tile(product_tile, self.stream())
        _, shares = self.grid(tile, _blocks(self.problem.tokens, tile.rows), self.kinds)
        shape = (self.kinds, shares, self.problem.groups, self.problem.tokens)
        return self.empty(*shape) if want_db else None, self.empty(*shape) if want_delta else None

    def rows(self, mixing: tuple, norm: Norm | None, bias, dz, out: Tensor, db, delta) -> None:
        tile = self.tile(product_tile, self.stream())
        owners, shares = self.grid(tile, _blocks(self.problem.tokens, tile.rows), self.kinds)
        triton_product.rows_kernel[(owners * shares,)](
            self.x, dz, out, mixing, bias, norm, db, delta, self.problem.batch, shares=shares,
            X=self.strides(self.x), DZ=None if dz is None else self.strides(dz), OUT=self.strides(out),
            **self.common, **_settings(tile),
        )  # fmt: skip

    def columns(self, mixing: tuple, dz: Tensor, dx: Tensor, dnormed: Tensor | None) -> None:
        tile = self.tile(product_tile, 2 * self.x.element_size())  # dz and X2
        owners, shares = self.grid(tile, _blocks(self.problem.tokens, tile.rows), self.kinds)
        triton_backward.columns_kernel[(owners * shares,)](
            self.x, dz, dx, dnormed, mixing, self.problem.batch, shares=shares,
            X=self.strides(self.x), DZ=self.strides(dz), DX=self.strides(dx),
            **self.common, **_settings(tile),
        )  # fmt: skip

    def logits(self, mixing: tuple, norm: Norm | None, dz: Tensor, delta: Tensor | None) -> Tensor:
        """The gradient of the logits, `[shares, S, N, N]`."""
        p = self.problem
        tile = self.tile(outer_tile, self.stream())
        owners, shares = self.grid(tile, _blocks(p.tokens, tile.rows) * _blocks(p.tokens, tile.keys), 1)
        dlogits = self.empty(shares, p.groups, p.tokens, p.tokens)
        triton_backward.logits_kernel[(owners * shares,)](
            self.x, dz, dlogits, mixing, norm, delta, p.batch, shares=shares, X=self.strides(self.x),
            DZ=self.strides(dz), **self.common, **_settings(tile),
        )  # fmt: skip
        return dlogits

    def table_gradient(self, dlogits: Tensor) -> Tensor:
        groups, size = self.problem.groups, math.prod(2 * w - 1 for w in self.window)
        dtable = self.empty(groups, size)
        triton_backward.table_kernel[(groups * _blocks(size, 64),)](
            dlogits, dtable, dlogits.shape[0], W=self.window, S=groups, ACC=self.accumulate, BI=32, BD=64
        )
        return dtable

    def norm_backward(self, norm: Norm, dnormed: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        mean, rstd, weight, _ = norm
        channels, tokens = self.problem.channels, mean.numel()
        rows, columns = _token_block(channels)
        shares = min(_blocks(tokens, rows), wanted_programs(self.problem.device))
        dweight, dshift = self.empty(shares, channels), self.empty(shares, channels)
        triton_norm.norm_backward_kernel[(shares,)](
            self.x, mean, rstd, weight, dnormed, dx, dweight, dshift, tokens, shares, self.map,
            self.strides(self.x), self.strides(dx), C=channels, ACT=self.problem.activation,
            ACC=self.accumulate, BT=rows, BC=columns,
        )  # fmt: skip
        return dweight.sum(0), dshift.sum(0)


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter turns one-element arrays into loop bounds in a way that numpy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended


if triton.knobs.runtime.interpret:
    _mend_interpreter()


def _settings(tile: Tile) -> dict[str, int]:
    return {
        "BM": tile.rows,
        "BK": tile.keys,
        "BN": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _token_block(channels: int) -> tuple[int, int]:
    """Whole tokens of about 4096 elements together."""
    columns = triton.next_power_of_2(channels)
    return max(1, min(16, 4096 // columns)), columns


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def wanted_programs(device: torch.device) -> int:
    """Into how many programs a launch is cut, if it has the work; the interpreter runs them one by one."""
    return 1 if device.type == "cpu" else triton_tiles.PROGRAMS


def index_type(columns: int) -> tl.dtype:
    """Columns are counted in 32 bits where they and a last, partly filled block fit; addresses never are."""
    return tl.int32 if columns < 2**31 - 2**16 else tl.int64


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; the interpreter behaves as the smallest chip."""
    return 64 * 1024 if device.type == "cpu" else _shared_memory(device.index)


@cache
def _shared_memory(index: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
