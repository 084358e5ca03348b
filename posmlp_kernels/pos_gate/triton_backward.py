"""The backward pass over the tokens: three products in one launch.

    rows                  dX2, db, delta        reads X1, X2, dZ, writes C a token        (triton_product.py)
    columns_of_gradient   dX1                   reads X2, dZ (, X1), writes C             (triton_product.py)
    outer                 dP[i, j] = sum_q dU[i, q] X1[j, q]       reads X1, X2, dZ

Each is 2 N C flops a token. As launches one after another they would bring x and dZ from device memory three
times, 10 C elements a token with the results. Here their programs sit side by side, group by group and share
by share, and take the columns in the same order; what one has read the next finds in the second-level cache.
The kernels ask for 8 C (10 C with an activation's slope) and write 2 C; device memory need move no more than
5 C. One program for all three would have to hold N^2 accumulators for dP beside the operands: 43,264 of a
multiprocessor's 65,536 registers for N = 196.

`outer` holds BM queries by a block of keys of dP and goes once through its share of the columns. Sums over
shares leave as partial sums, added up in a fixed order by `logits_kernel`: no atomics. A multiprocessor gets
about one program at a time, so that the partial sums, 4 N^2 bytes for a group and share, stay small.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    before,
    column_count,
    columns,
    load_gradient,
    load_mixed,
    present,
    split_program,
    sums_of,
    total,
    window_kind,
    zero_of,
)
from .triton_product import columns_of_gradient, rows


@triton.jit
def outer(
    i_block, i_group, i_share, i_kind, p_x, p_dz, p_dmixing, NORM, B, M, SHIFT, shares, X, DZ,
    W: tl.constexpr, KINDS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, BM: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    """dmixing `[kinds, shares, S, N, N]`."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    KEY_BLOCKS: tl.constexpr = (N + total(PIECES) - 1) // total(PIECES)
    first, counts = window_kind(i_kind, M, SHIFT, W, KINDS)
    o_i = i_block // KEY_BLOCKS * BM + tl.arange(0, BM)
    i_j = i_block % KEY_BLOCKS * total(PIECES)
    sums = sums_of(PIECES, BM, ACC)

    n_q = column_count(counts, B, D, INDEX)
    for i_q in range(i_share, tl.cdiv(n_q, BQ), shares):
        o_q = i_q * BQ + tl.arange(0, BQ).to(INDEX)
        m_q = (o_q < n_q)[None, :]
        column = columns(o_q, i_group, first, counts, SHIFT, W, D)
        i_zero = zero_of(i_q, INDEX)
        m_u = present(i_zero + o_i, first, M, SHIFT, W)[:, None] & m_q
        b_du = load_gradient(p_x + S * D, p_dz, i_zero + o_i, column, m_u, X, DZ, W, ACT, ACC, INDEX)
        added = ()
        for i in tl.static_range(len(PIECES)):
            o_j = i_zero + i_j + before(PIECES, i) + tl.arange(0, PIECES[i])
            m_x = present(o_j, first, M, SHIFT, W)[:, None] & m_q
            b_x = load_mixed(p_x, o_j, column, m_x, NORM, M, X, W, ACT, ACC, INDEX)
            b_dp = tl.dot(b_du, tl.trans(b_x), sums[i], input_precision=PRECISION, out_dtype=ACC)
            added += (b_dp,)
        sums = added

    p_partial = p_dmixing + ((i_kind * shares + i_share) * S + i_group) * N * N
    for i in tl.static_range(len(PIECES)):
        o_j = i_j + before(PIECES, i) + tl.arange(0, PIECES[i])
        o_pair = o_i[:, None].to(tl.int64) * N + o_j[None, :]
        tl.store(p_partial + o_pair, sums[i], mask=(o_i < N)[:, None] & (o_j < N)[None, :])


@triton.jit(do_not_specialize=["B", "shares"])
def backward_kernel(
    p_x, p_dz, p_dx, p_dnormed, p_mixing, p_bias, NORM, p_db, p_delta, p_dmixing, B, M, SHIFT, shares, X, DZ,
    DX, W: tl.constexpr, KINDS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, KEEP: tl.constexpr, SIDE: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """`p_dmixing` None: neither table nor matrix wants a gradient."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    BLOCKS: tl.constexpr = (N + total(PIECES) - 1) // total(PIECES)
    OUTER: tl.constexpr = 0 if p_dmixing is None else (N + BM - 1) // BM * BLOCKS
    i_block, i_group, i_share, i_kind = split_program(2 * BLOCKS + OUTER, S, shares)
    if i_block < BLOCKS:
        rows(
            i_block, i_group, i_share, i_kind, p_x, p_dz, p_dx + S * D, p_mixing, p_bias, NORM, p_db, p_delta,
            B, M, SHIFT, shares, X, DZ, DX, W, KINDS, S, D, ACT, ACC, INDEX, PRECISION, PIECES, BK, BN, KEEP,
            SIDE,
        )  # fmt: skip
    elif i_block < 2 * BLOCKS:
        columns_of_gradient(
            i_block - BLOCKS, i_group, i_share, i_kind, p_x, p_dz, p_dx, p_dnormed, p_mixing, B, M, SHIFT,
            shares, X, DZ, DX, W, KINDS, S, D, ACT, ACC, INDEX, PRECISION, PIECES, BK, BN, KEEP, SIDE,
        )  # fmt: skip
    else:
        if p_dmixing is not None:
            outer(
                i_block - 2 * BLOCKS, i_group, i_share, i_kind, p_x, p_dz, p_dmixing, NORM, B, M, SHIFT,
                shares, X, DZ, W, KINDS, S, D, ACT, ACC, INDEX, PRECISION, PIECES, BM, BQ,
            )  # fmt: skip
