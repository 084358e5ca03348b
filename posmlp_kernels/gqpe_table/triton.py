"""The quadratic table in Triton, a launch for each direction; see ops.py for the equations.

A program makes the table of a group, or its gradients: it holds the group's few parameters and goes over the
entries in blocks, always in the same order. There is less than 100 KB of table in any layer of PosMLP: what
counts is the number of launches. Moments are taken about the centre itself, which costs nothing and keeps u
small where the centre is near the window. The first axes of a block are coordinates, filled up to a power of
two with zeros; entries are its last.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256  # entries; [4, 4, 256] products of coordinates are 32 registers a thread in float32


@triton.jit
def offsets_from_center(p_center, i_group, o_d, o_t, W: tl.constexpr, RANK: tl.constexpr, ACC: tl.constexpr):
    """u = delta - center of table entries, `[BD, BT]`."""
    b_center = tl.load(p_center + i_group * RANK + o_d, mask=o_d < RANK, other=0.0)
    b_delta = tl.zeros([o_d.shape[0], o_t.shape[0]], tl.int32)
    for d in tl.static_range(RANK - 1, -1, -1):  # the last coordinate changes fastest
        b_delta = tl.where((o_d == d)[:, None], (o_t % (2 * W[d] - 1) - (W[d] - 1))[None, :], b_delta)
        o_t = o_t // (2 * W[d] - 1)
    return b_delta.to(ACC) - b_center[:, None]


@triton.jit
def factor_offsets(i_group, o_d, RANK: tl.constexpr):
    """The addresses of M_g, `[BD, BD]`, and which of them there are."""
    m_d = o_d < RANK
    return (i_group * RANK + o_d[:, None]) * RANK + o_d[None, :], m_d[:, None] & m_d[None, :]


@triton.jit
def table_kernel(
    p_center, p_factor, p_table, ENTRIES: tl.constexpr, W: tl.constexpr, RANK: tl.constexpr,
    ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_group = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_m, m_m = factor_offsets(i_group, o_d, RANK)
    b_m = tl.load(p_factor + o_m, mask=m_m, other=0.0)
    for start in range(0, ENTRIES, BT):
        o_t = start + tl.arange(0, BT)
        b_u = offsets_from_center(p_center, i_group, o_d, o_t, W, RANK, ACC)
        b_projected = tl.sum(b_m[:, :, None] * b_u[:, None, :], 0)  # M^T u, [BD, BT]
        b_table = -0.5 * tl.sum(b_projected * b_projected, 0)
        tl.store(p_table + i_group * ENTRIES + o_t, b_table, mask=o_t < ENTRIES)


@triton.jit
def table_backward_kernel(
    p_dtable, p_center, p_factor, p_dcenter, p_dfactor, ENTRIES: tl.constexpr, W: tl.constexpr,
    RANK: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_group = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_first = tl.zeros([BD, BT], ACC)  # summed over a block at the very end: short chains of additions
    b_second = tl.zeros([BD, BD, BT], ACC)
    for start in range(0, ENTRIES, BT):
        o_t = start + tl.arange(0, BT)
        b_u = offsets_from_center(p_center, i_group, o_d, o_t, W, RANK, ACC)
        b_dtable = tl.load(p_dtable + i_group * ENTRIES + o_t, mask=o_t < ENTRIES, other=0.0)
        b_weighted = b_u * b_dtable[None, :]
        b_first += b_weighted
        b_second += b_weighted[:, None, :] * b_u[None, :, :]
    b_s1, b_s2 = tl.sum(b_first, 1), tl.sum(b_second, 2)  # [BD], [BD, BD]

    o_m, m_m = factor_offsets(i_group, o_d, RANK)
    b_m = tl.load(p_factor + o_m, mask=m_m, other=0.0)
    b_projected = tl.sum(b_m * b_s1[:, None], 0)  # M^T s1
    b_dcenter = tl.sum(b_m * b_projected[None, :], 1)
    b_dfactor = -tl.sum(b_s2[:, :, None] * b_m[None, :, :], 1)
    tl.store(p_dcenter + i_group * RANK + o_d, b_dcenter, mask=o_d < RANK)
    tl.store(p_dfactor + o_m, b_dfactor, mask=m_m)


def forward(center: Tensor, factor: Tensor, window: list[int]) -> Tensor:
    """`posmlp_kernels::gqpe_table`."""
    table = center.new_empty((center.shape[0], *(2 * w - 1 for w in window)))
    _launch(table_kernel, window, center.contiguous(), factor.contiguous(), table)
    return table


def backward(dtable: Tensor, center: Tensor, factor: Tensor, window: list[int]) -> tuple[Tensor, Tensor]:
    """`posmlp_kernels::gqpe_table_backward`."""
    dcenter, dfactor = center.new_empty(center.shape), factor.new_empty(factor.shape)
    inputs = (dtable.contiguous(), center.contiguous(), factor.contiguous())
    _launch(table_backward_kernel, window, *inputs, dcenter, dfactor)
    return dcenter, dfactor


def _launch(kernel: triton.JITFunction, window: list[int], *tensors: Tensor) -> None:
    device, groups = tensors[-1].device, tensors[-1].shape[0]
    if not groups:
        return
    with nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index):
        kernel[(groups,)](
            *tensors,
            ENTRIES=math.prod(2 * w - 1 for w in window),
            W=tuple(window),
            RANK=len(window),
            ACC=tl.float64 if tensors[0].dtype == torch.float64 else tl.float32,
            BT=_BLOCK,
            BD=triton.next_power_of_2(len(window)),
        )
