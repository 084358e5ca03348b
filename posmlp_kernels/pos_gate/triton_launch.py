"""From tensors to launches: the forward and the backward of the Triton back end.

Arguments are those of the ops' schemas. Nothing here reads the device, so a CUDA graph can capture a call;
all launches go to the current stream of x's device.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem, accumulate_dtype
from . import triton_backward, triton_mixing, triton_norm, triton_product, triton_tiles
from .ops import problem_of

Norm = tuple[Tensor, Tensor, Tensor, Tensor]  # mean, rstd: a number per token; weight, shift: [C]


def forward(x, table, bias, matrix, norm_weight, norm_bias, *settings) -> Tensor:
    """`posmlp_kernels::pos_gate`."""
    call = Call(x, table, matrix, problem_of(x, table, matrix, settings), backward=False)
    z = x.new_empty((*x.shape[:-1], call.problem.channels))
    if z.numel():
        with call.device():
            mixing, _ = call.mixing(statistics=False)
            call.gate(
                mixing, None if bias is None else bias.contiguous(), call.norm(norm_weight, norm_bias), z
            )
    return z


def backward(dz, x, table, bias, matrix, norm_weight, norm_bias, *settings_and_flag) -> tuple[Tensor, ...]:
    """`posmlp_kernels::pos_gate_backward`; a gradient that is not wanted has no elements."""
    *settings, mixing_grad = settings_and_flag
    call = Call(x, table, matrix, problem_of(x, table, matrix, tuple(settings)), backward=True)
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
        mixing, statistics = call.mixing(statistics=mixing_grad)
        norm = call.norm(norm_weight, norm_bias)
        bias = None if bias is None else bias.contiguous()
        db, delta, dmixing, dnormed = call.products(mixing, bias, norm, dz, dx, mixing_grad)
        if bias is not None:
            grads[1] = db.sum((0, 1, 2))
        if norm is not None:
            grads[3], grads[4] = call.norm_backward(norm, dnormed, dx)
        if mixing_grad:
            dlogits = call.logits(statistics, dmixing, delta)
            if table is not None:
                grads[0] = call.table_gradient(dlogits).view(table.shape)
            if matrix is not None:
                grads[2] = dlogits if matrix.dim() == 3 else dlogits.sum(0)
    return dx, *grads


class Call:
    """One call of the operator: what its launches have in common."""

    def __init__(
        self, x: Tensor, table: Tensor | None, matrix: Tensor | None, problem: Problem, backward: bool
    ) -> None:
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
        self.accumulate = tl.float64 if self.dtype == torch.float64 else tl.float32
        self.windows = {"M": self.map, "SHIFT": self.shift, "W": self.window, "KINDS": self.kind_counts}
        self.groups = {"S": p.groups, "ACC": self.accumulate}

        self.architecture = architecture(p.device)
        tf32 = x.dtype == torch.float32 and may_round_operands(self.architecture)
        self.precision = "tf32" if tf32 else "ieee"
        self.tile = triton_tiles.tile_of(self.architecture, p.tokens, x.dtype, tf32, backward)
        self.side = self.tile.side(p.tokens)
        self.blocks = _blocks(p.tokens, sum(self.tile.pieces(p.tokens)))

    def device(self) -> AbstractContextManager:
        device = self.problem.device
        return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """`[B, *map, channel]`, with a stride for the dimensions that the map lacks."""
        batch, *rest = tensor.stride()
        return (batch, *(0,) * (5 - tensor.dim()), *rest)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.problem.device)

    def shares(self, owners: int) -> int:
        """Into how many programs the columns of each of so many owners of output are cut.

        Rounded down: one program more than run side by side would take as long as all of them.
        """
        wanted = wanted_programs(self.architecture, self.tile.waves)
        return min(_blocks(self.column_count, self.tile.columns), max(1, wanted // owners))

    def product(self, *tensors: Tensor) -> dict:
        """What the kernels of the product have in common; `tensors` are all that they address by token."""
        tile, tokens = self.tile, self.problem.tokens
        return {
            **self.windows,
            **self.groups,
            "D": self.group_channels,
            "ACT": self.problem.activation,
            "INDEX": index_type(self.column_count, max(map(self.extent, tensors))),
            "PRECISION": self.precision,
            "PIECES": tile.pieces(tokens),
            "BK": tile.keys,
            "BN": tile.columns,
            "KEEP": tile.keep > 0,
            "SIDE": self.side,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def extent(self, tensor: Tensor) -> int:
        """From a window's first token to its last, in elements of a tensor `[B, *map, channels]`."""
        return sum((w - 1) * abs(s) for w, s in zip(self.window, self.strides(tensor)[1:4], strict=True))

    def mixing(self, statistics: bool) -> tuple[Tensor, tuple]:
        """P for the products, and what `mixing_tile` reads to rebuild it without rounding."""
        p, group_stride = self.problem, 0
        if self.matrix is not None and self.matrix.dim() == 3:
            group_stride = p.tokens**2
        row_max = row_rinv = None
        if p.softmax and statistics:
            row_max, row_rinv = self.empty(2, self.kinds, p.groups, p.tokens)
        mixing = self.x.new_empty(self.kinds, p.groups, self.side, self.side)
        rows, keys = 16, min(256, triton.next_power_of_2(self.side))
        grid = (self.kinds * p.groups * _blocks(self.side, rows),)
        triton_mixing.mixing_kernel[grid](
            self.table, self.matrix, group_stride, mixing, row_max, row_rinv, **self.windows, **self.groups,
            SIDE=self.side, SOFTMAX=p.softmax, BM=rows, BK=keys,
        )  # fmt: skip
        return mixing, (self.table, self.matrix, group_stride, row_max, row_rinv)

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

    def gate(self, mixing: Tensor, bias: Tensor | None, norm: Norm | None, z: Tensor) -> None:
        p = self.problem
        owners = self.kinds * p.groups * self.blocks
        shares = self.shares(owners)
        triton_product.gate_kernel[(owners * shares,)](
            self.x, z, mixing, bias, norm, p.batch, shares=shares, X=self.strides(self.x), Z=self.strides(z),
            **self.product(self.x, z),
        )  # fmt: skip

    def products(
        self,
        mixing: Tensor,
        bias: Tensor | None,
        norm: Norm | None,
        dz: Tensor,
        dx: Tensor,
        mixing_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        """Fills dx; db, delta and dmixing in partial sums, and the gradient of the normalised X1."""
        p, tile = self.problem, self.tile
        blocks = 2 * self.blocks + (_blocks(p.tokens, tile.rows) * self.blocks if mixing_grad else 0)
        owners = self.kinds * p.groups * blocks
        shares = self.shares(owners)
        sums = (self.kinds, shares, p.groups, p.tokens)
        db = None if bias is None else self.empty(*sums)
        delta = self.empty(*sums) if mixing_grad and p.softmax else None
        dmixing = self.empty(*sums, p.tokens) if mixing_grad else None
        dnormed = None if norm is None else self.empty(*self.x.shape[:-1], p.channels)
        triton_backward.backward_kernel[(owners * shares,)](
            self.x, dz, dx, dnormed, mixing, bias, norm, db, delta, dmixing, p.batch, shares=shares,
            X=self.strides(self.x), DZ=self.strides(dz), DX=self.strides(dx), BM=tile.rows, BQ=tile.run,
            **self.product(self.x, dz, dx),
        )  # fmt: skip
        return db, delta, dmixing, dnormed

    def logits(self, statistics: tuple, dmixing: Tensor, delta: Tensor | None) -> Tensor:
        """The gradient of the logits, `[S, N, N]`."""
        p, rows, keys = self.problem, 16, min(128, triton.next_power_of_2(self.problem.tokens))
        dlogits = self.empty(p.groups, p.tokens, p.tokens)
        grid = (p.groups * _blocks(p.tokens, rows) * _blocks(p.tokens, keys),)
        triton_mixing.logits_kernel[grid](
            statistics, dmixing, delta, dlogits, shares=dmixing.shape[1], **self.windows, **self.groups,
            BM=rows, BK=keys,
        )  # fmt: skip
        return dlogits

    def table_gradient(self, dlogits: Tensor) -> Tensor:
        groups, size = self.problem.groups, math.prod(2 * w - 1 for w in self.window)
        dtable = self.empty(groups, size)
        triton_mixing.table_kernel[(groups * _blocks(size, 64),)](
            dlogits, dtable, W=self.window, **self.groups, BI=32, BD=64
        )
        return dtable

    def norm_backward(self, norm: Norm, dnormed: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        mean, rstd, weight, _ = norm
        channels, tokens = self.problem.channels, mean.numel()
        rows, columns = _token_block(channels)
        shares = min(_blocks(tokens, rows), wanted_programs(self.architecture))
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


def _token_block(channels: int) -> tuple[int, int]:
    """Whole tokens of about 4096 elements together."""
    columns = triton.next_power_of_2(channels)
    return max(1, min(16, 4096 // columns)), columns


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def wanted_programs(architecture: str, waves: int = 4) -> int:
    """Into how many programs a launch is cut, if it has the work; the interpreter runs them one by one."""
    return triton_tiles.processors(architecture) * waves


def may_round_operands(architecture: str) -> bool:
    """Whether float32 products take TF32 operands: PyTorch's setting, where the chip has such products."""
    has_tf32 = architecture in triton_tiles.WITH_TF32
    return has_tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def index_type(columns: int, extent: int) -> tl.dtype:
    """Columns and places in a window are counted in 32 bits where they and a last, partly filled block fit;
    windows are addressed in 64 bits always."""
    return tl.int32 if max(columns, extent) < 2**31 - 2**16 else tl.int64


def architecture(device: torch.device) -> str:
    """The name in the table of tiles: sm_90, gfx942, ..."""
    return "interpreter" if triton.knobs.runtime.interpret else _architecture(device.index)


@cache
def _architecture(index: int | None) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
