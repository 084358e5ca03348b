"""The product by rows, for the forward pass and for the gate's half of the backward pass.

    forward    Z[i, q]   = (Y[i, q] + b[i]) X2[i, q],    Y[i, q] = sum_j P[i, j] X1[j, q]
    backward   dX2[i, q] = dZ[i, q] (Y[i, q] + b[i])
               db[i]     = sum_q dU[i, q],   delta[i] = sum_q dU[i, q] Y[i, q],   dU = dZ X2

One program makes the rows of one query block for its share of the columns of (kind of window, group). X1
goes past a tile of P that stays in registers; the epilogue is done on the accumulator. Device memory sees 2C
in and C out per token forward, 3C in and C out backward; query blocks re-read X1 from the cache, as they run
side by side. The flops are 2 N C a token. `delta` is what the softmax's backward subtracts from a row of dP,
rowsum(P * dP), without ever forming dP. It and db leave as partial sums, added up in a fixed order.

Row maxima and sums of the softmax come from `softmax_kernel`, one program per (kind, group, query block): two
passes over the logits, N^2 work per kind against N Q D for the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    activate,
    activation_slope,
    column_count,
    columns,
    load_mixed,
    logits_tile,
    mixing_tile,
    present,
    split_program,
    tile_offsets,
    window_kind,
)


@triton.jit
def softmax_kernel(
    p_table, p_matrix, matrix_stride, p_max, p_rinv, M, SHIFT, W: tl.constexpr, KINDS: tl.constexpr,
    S: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = W[0] * W[1] * W[2]
    i_m, i_group, _, i_kind = split_program((N + BM - 1) // BM, S, 1)
    first, _ = window_kind(i_kind, M, SHIFT, W, KINDS)
    o_i = i_m * BM + tl.arange(0, BM)
    o_i2 = o_i[:, None]

    b_max = tl.full([BM], float("-inf"), ACC)
    for i_k in range(0, N, BK):
        o_j = (i_k + tl.arange(0, BK))[None, :]
        mask = (o_i2 < N) & present(o_j, first, M, SHIFT, W)  # [BM, BK]
        b_l = logits_tile(p_table, p_matrix, matrix_stride, i_group, o_i2, o_j, mask, W, ACC)
        b_max = tl.maximum(b_max, tl.max(tl.where(mask, b_l, float("-inf")), 1))
    b_sum = tl.zeros([BM], ACC)
    for i_k in range(0, N, BK):
        o_j = (i_k + tl.arange(0, BK))[None, :]
        mask = (o_i2 < N) & present(o_j, first, M, SHIFT, W)
        b_l = logits_tile(p_table, p_matrix, matrix_stride, i_group, o_i2, o_j, mask, W, ACC)
        b_sum += tl.sum(tl.exp(tl.where(mask, b_l - b_max[:, None], float("-inf"))), 1)

    o_row = (i_kind * S + i_group) * N + o_i
    tl.store(p_max + o_row, b_max, mask=o_i < N)
    b_sum = tl.where(b_sum == 0, 1.0, b_sum)  # of rows that no window has
    tl.store(p_rinv + o_row, 1.0 / b_sum, mask=o_i < N)


@triton.jit
def rows_kernel(
    p_x, p_dz, p_out, MIXING, p_bias, NORM, p_db, p_delta, B, M, SHIFT, shares, X, DZ, OUT,
    W: tl.constexpr, KINDS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`p_dz` None: out = z [B, *map, C]; else out = the second half of dx [B, *map, 2C]."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    dtype = p_x.dtype.element_ty
    i_m, i_group, i_share, i_kind = split_program((N + BM - 1) // BM, S, shares)
    first, counts = window_kind(i_kind, M, SHIFT, W, KINDS)

    o_i = i_m * BM + tl.arange(0, BM)
    m_i = present(o_i, first, M, SHIFT, W)
    b_bias = tl.zeros([BM], ACC)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_i, mask=m_i, other=0.0)
    b_db = tl.zeros([BM], ACC)
    b_delta = tl.zeros([BM], ACC)
    if BK >= N:  # the matrix tile stays while the columns go by
        o_j = tl.arange(0, BK)
        m_j = present(o_j, first, M, SHIFT, W)
        m_p = m_i[:, None] & m_j[None, :]
        b_p = mixing_tile(MIXING, i_kind, i_group, o_i[:, None], o_j[None, :], m_p, S, W, ACC).to(dtype)

    n_q = column_count(counts, B, D, INDEX)
    for i_q in range(i_share, tl.cdiv(n_q, BN), shares):
        o_q = i_q * BN + tl.arange(0, BN).to(INDEX)
        m_q = o_q < n_q
        column = columns(o_q, i_group, first, counts, SHIFT, W, D)

        b_y = tl.zeros([BM, BN], ACC)
        for i_k in range(0, N, BK):
            o_j = i_k + tl.arange(0, BK)
            m_j = present(o_j, first, M, SHIFT, W)
            if BK < N:
                m_p = m_i[:, None] & m_j[None, :]
                b_p = mixing_tile(MIXING, i_kind, i_group, o_i[:, None], o_j[None, :], m_p, S, W, ACC)
                b_p = b_p.to(dtype)
            m_x = m_j[:, None] & m_q[None, :]
            b_x = load_mixed(p_x, o_j, column, m_x, NORM, M, X, W, ACT, ACC)
            b_y = tl.dot(b_p, b_x, b_y, input_precision=PRECISION, out_dtype=ACC)

        mask = m_i[:, None] & m_q[None, :]
        b_x2 = tl.load(p_x + S * D + tile_offsets(o_i, column, X, W), mask=mask, other=0.0).to(ACC)
        b_out = b_y + b_bias[:, None]
        if p_dz is None:
            b_out = b_out * activate(b_x2, ACT)
        else:
            b_dz = tl.load(p_dz + tile_offsets(o_i, column, DZ, W), mask=mask, other=0.0).to(ACC)
            b_du = b_dz * activate(b_x2, ACT)
            b_db += tl.sum(b_du, 1)
            b_delta += tl.sum(b_du * b_y, 1)
            b_out = b_out * b_dz
            if ACT != "none":
                b_out = b_out * activation_slope(b_x2, ACT)
        tl.store(p_out + tile_offsets(o_i, column, OUT, W), b_out.to(dtype), mask=mask)

    o_row = ((i_kind * shares + i_share) * S + i_group) * N + o_i
    if p_db is not None:
        tl.store(p_db + o_row, b_db, mask=o_i < N)
    if p_delta is not None:
        tl.store(p_delta + o_row, b_delta, mask=o_i < N)
