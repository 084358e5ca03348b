"""The product with P, for the forward pass and for two thirds of the backward pass.

    rows       Y[i, q]   = sum_j P[i, j] X1[j, q],    Z = (Y + b) X2
               backward: dX2 = dZ (Y + b),  db[i] = sum_q dU[i, q],  delta[i] = sum_q dU[i, q] Y[i, q]
    columns    dX1[j, q] = sum_i P[i, j] dU[i, q],    dU = dZ X2

A program makes *all* queries (of up to 256) for a run of BN columns q, so that X1 is read once: 3 C elements
a token, nothing twice. It computes the transpose, columns x queries: the long axis is the product's M, in
which no group is padded, and the window is N, cut into PIECES of powers of two (196 = 128 + 64 + 4, of 16).
Each piece has an accumulator of its own, and the epilogue goes piece by piece: with the whole block at once
its loads, results and addresses would not fit the registers.

How P gets to the multipliers is a matter of the chip (`KEEP`). Where the multiplier reads its right operand
from shared memory (sm_90), all of P stays there, 104 KB for N = 196 in 16 bits, while columns go past and the
next block of X1 loads. Elsewhere the right operand sits in registers, which cannot hold it; P then streams
through shared memory beside X1, BK keys at a time, out of the second-level cache.

`delta` is what the softmax's backward subtracts from a row of dP, rowsum(P * dP), without ever forming dP. It
and db leave as partial sums, added up in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    activate,
    activation_slope,
    addresses,
    before,
    column_count,
    columns,
    dense_strides,
    load_gradient,
    load_mixed,
    present,
    split_program,
    sums_of,
    total,
    window_kind,
    zero_of,
)


@triton.jit
def mixing_operand(
    p_p, i_out, i_in, OUT: tl.constexpr, IN: tl.constexpr, SIDE: tl.constexpr, BACK: tl.constexpr
):
    """`[IN, OUT]` of P for the product by rows, or of its transpose (BACK) for the product by columns."""
    o_out, o_in = tl.arange(0, OUT), tl.arange(0, IN)
    i_out, i_in = tl.cast(i_out, tl.int64), tl.cast(i_in, tl.int64)
    if BACK:
        b_p = tl.load(p_p + i_in * SIDE + i_out + (o_in[:, None] * SIDE + o_out[None, :]))
    else:
        b_p = tl.trans(tl.load(p_p + i_out * SIDE + i_in + (o_out[:, None] * SIDE + o_in[None, :])))
    return b_p


@triton.jit
def mixing_operands(
    p_p, i_out, i_in, PIECES: tl.constexpr, IN: tl.constexpr, SIDE: tl.constexpr, BACK: tl.constexpr
):
    operands = ()
    for i in tl.static_range(len(PIECES)):
        piece = mixing_operand(p_p, i_out + before(PIECES, i), i_in, PIECES[i], IN, SIDE, BACK)
        operands += (piece,)
    return operands


@triton.jit
def streamed_product(
    p_x, p_dz, p_p, i_out, column, m_q, first, NORM, M, SHIFT, X, DZ, W: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """All pieces `[BN, piece]`, BK tokens at a time; of X1, or with p_dz of dU (p_x then points at X2)."""
    sums = sums_of(PIECES, BN, ACC)
    for i_in in range(0, W[0] * W[1] * W[2], BK):
        o_n = i_in + tl.arange(0, BK)
        mask = present(o_n, first, M, SHIFT, W)[:, None] & m_q[None, :]
        if p_dz is None:
            b_x = load_mixed(p_x, o_n, column, mask, NORM, M, X, W, ACT, ACC, INDEX)
        else:
            b_x = load_gradient(p_x, p_dz, o_n, column, mask, X, DZ, W, ACT, ACC, INDEX)
        operands = mixing_operands(p_p, i_out, i_in, PIECES, BK, SIDE, p_dz is not None)
        added = ()
        for i in tl.static_range(len(PIECES)):
            b_sum = tl.dot(tl.trans(b_x), operands[i], sums[i], input_precision=PRECISION, out_dtype=ACC)
            added += (b_sum,)
        sums = added
    return sums


@triton.jit
def rows(
    i_block, i_group, i_share, i_kind, p_x, p_dz, p_out, p_mixing, p_bias, NORM, p_db, p_delta, B, M, SHIFT,
    shares, X, DZ, OUT, W: tl.constexpr, KINDS: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    ACT: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    PIECES: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, KEEP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """`p_dz` None: out = z [B, *map, C]; else out = the second half of dx [B, *map, 2C]."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    dtype = p_x.dtype.element_ty
    first, counts = window_kind(i_kind, M, SHIFT, W, KINDS)
    i_out = i_block * total(PIECES)
    p_p = p_mixing + (i_kind * S + i_group) * SIDE * SIDE
    if KEEP:
        kept = mixing_operands(p_p, i_out, 0, PIECES, BK, SIDE, False)
    b_db, b_delta = sums_of(PIECES, 0, ACC), sums_of(PIECES, 0, ACC)

    n_q = column_count(counts, B, D, INDEX)
    for i_q in range(i_share, tl.cdiv(n_q, BN), shares):
        o_q = i_q * BN + tl.arange(0, BN).to(INDEX)
        m_q = o_q < n_q
        column = columns(o_q, i_group, first, counts, SHIFT, W, D)
        i_zero = zero_of(i_q, INDEX)
        if KEEP:
            o_j = i_zero + tl.arange(0, BK)
            m_x = present(o_j, first, M, SHIFT, W)[:, None] & m_q[None, :]
            b_x = load_mixed(p_x, o_j, column, m_x, NORM, M, X, W, ACT, ACC, INDEX)
        else:
            sums = streamed_product(
                p_x, None, p_p, i_out, column, m_q, first, NORM, M, SHIFT, X, X, W, ACT, ACC, INDEX,
                PRECISION, PIECES, BK, BN, SIDE,
            )  # fmt: skip
        added_db, added_delta = (), ()
        for i in tl.static_range(len(PIECES)):
            o_i = i_zero + i_out + before(PIECES, i) + tl.arange(0, PIECES[i])
            m_i = present(o_i, first, M, SHIFT, W)
            mask = m_i[:, None] & m_q[None, :]
            p_x2 = addresses(p_x + S * D, o_i, column, X, W, INDEX)
            b_x2 = tl.load(p_x2, mask=mask, other=0.0)
            if KEEP:
                b_y = tl.dot(tl.trans(b_x), kept[i], input_precision=PRECISION, out_dtype=ACC)
            else:
                b_y = sums[i]
            b_y = tl.trans(b_y)  # [queries, columns]
            b_out, b_x2 = b_y, b_x2.to(ACC)
            if p_bias is not None:
                b_out += tl.load(p_bias + o_i, mask=m_i, other=0.0)[:, None]
            if p_dz is None:
                b_out = b_out * activate(b_x2, ACT)
            else:
                b_dz = tl.load(addresses(p_dz, o_i, column, DZ, W, INDEX), mask=mask, other=0.0).to(ACC)
                b_du = b_dz * activate(b_x2, ACT)
                added_db += (b_db[i] + tl.sum(b_du, 1),)
                added_delta += (b_delta[i] + tl.sum(b_du * b_y, 1),)
                b_out = b_out * b_dz * activation_slope(b_x2, ACT)
            tl.store(addresses(p_out, o_i, column, OUT, W, INDEX), b_out.to(dtype), mask=mask)
        if p_dz is not None:
            b_db, b_delta = added_db, added_delta

    for i in tl.static_range(len(PIECES)):
        o_i = i_out + before(PIECES, i) + tl.arange(0, PIECES[i])
        o_row = ((i_kind * shares + i_share) * S + i_group) * N + o_i
        if p_db is not None:
            tl.store(p_db + o_row, b_db[i], mask=o_i < N)
        if p_delta is not None:
            tl.store(p_delta + o_row, b_delta[i], mask=o_i < N)


@triton.jit(do_not_specialize=["B", "shares"])
def gate_kernel(
    p_x, p_z, p_mixing, p_bias, NORM, B, M, SHIFT, shares, X, Z, W: tl.constexpr, KINDS: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr, PIECES: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, KEEP: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """The forward pass."""
    i_block, i_group, i_share, i_kind = split_program(tl.cdiv(W[0] * W[1] * W[2], total(PIECES)), S, shares)
    rows(
        i_block, i_group, i_share, i_kind, p_x, None, p_z, p_mixing, p_bias, NORM, None, None, B, M, SHIFT,
        shares, X, X, Z, W, KINDS, S, D, ACT, ACC, INDEX, PRECISION, PIECES, BK, BN, KEEP, SIDE,
    )  # fmt: skip


@triton.jit
def columns_of_gradient(
    i_block, i_group, i_share, i_kind, p_x, p_dz, p_dx, p_dnormed, p_mixing, B, M, SHIFT, shares, X, DZ, DX,
    W: tl.constexpr, KINDS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, KEEP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """`p_dnormed` None: the first half of dx; else the gradient before the LayerNorm, dense [B, *map, C]."""
    dtype = p_x.dtype.element_ty
    first, counts = window_kind(i_kind, M, SHIFT, W, KINDS)
    i_out = i_block * total(PIECES)
    p_p = p_mixing + (i_kind * S + i_group) * SIDE * SIDE
    if KEEP:
        kept = mixing_operands(p_p, i_out, 0, PIECES, BK, SIDE, True)

    n_q = column_count(counts, B, D, INDEX)
    for i_q in range(i_share, tl.cdiv(n_q, BN), shares):
        o_q = i_q * BN + tl.arange(0, BN).to(INDEX)
        m_q = o_q < n_q
        column = columns(o_q, i_group, first, counts, SHIFT, W, D)
        i_zero = zero_of(i_q, INDEX)
        if KEEP:
            o_i = i_zero + tl.arange(0, BK)
            m_u = present(o_i, first, M, SHIFT, W)[:, None] & m_q[None, :]
            b_du = load_gradient(p_x + S * D, p_dz, o_i, column, m_u, X, DZ, W, ACT, ACC, INDEX)
        else:
            sums = streamed_product(
                p_x + S * D, p_dz, p_p, i_out, column, m_q, first, None, M, SHIFT, X, DZ, W, ACT, ACC, INDEX,
                PRECISION, PIECES, BK, BN, SIDE,
            )  # fmt: skip
        for i in tl.static_range(len(PIECES)):
            o_j = i_zero + i_out + before(PIECES, i) + tl.arange(0, PIECES[i])
            mask = present(o_j, first, M, SHIFT, W)[:, None] & m_q[None, :]
            if KEEP:
                b_dx = tl.dot(tl.trans(b_du), kept[i], input_precision=PRECISION, out_dtype=ACC)
            else:
                b_dx = sums[i]
            b_dx = tl.trans(b_dx)  # [keys, columns]
            if p_dnormed is not None:
                p_g = addresses(p_dnormed, o_j, column, dense_strides(M, S * D, 1), W, INDEX)
                tl.store(p_g, b_dx, mask=mask)
            else:
                if ACT != "none":
                    b_x1 = tl.load(addresses(p_x, o_j, column, X, W, INDEX), mask=mask, other=0.0)
                    b_dx = b_dx * activation_slope(b_x1.to(ACC), ACT)
                tl.store(addresses(p_dx, o_j, column, DX, W, INDEX), b_dx.to(dtype), mask=mask)
