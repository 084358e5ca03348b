"""What is done once per pair of tokens: the mixing matrix, and the gradients that come back through it.

    mixing_kernel   P[kind, g]    = softmax of the logits over present keys, or the logits; absent tokens 0
    logits_kernel   dL[g]         = sum over kinds of P (dP - delta), or of dP without softmax
    table_kernel    dR(d)[g]      = sum over i of dL[i, i + d]

P is stored once per kind of window and group, in x's dtype: N^2 numbers for all windows of the batch, a
megabyte where x has hundreds, and they stay in the second-level cache. Its sides are padded with zeros to
what the product's tiles read, so that those load it without masks, in whole 16-byte pieces.

dP comes as one partial sum per share of the columns; shares and kinds are added up in a fixed order, in the
accumulation dtype, and multiplied by an unrounded P. delta[i] = rowsum(P dP) comes from the product by rows.
`table_kernel` gathers: an (i, j) belongs to one displacement, so dL is read once, neighbours in memory by
neighbours in the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import logits_tile, mixing_tile, present, split_program, window_kind


@triton.jit
def mixing_kernel(
    p_table, p_matrix, matrix_stride, p_mixing, p_max, p_rinv, M, SHIFT, W: tl.constexpr,
    KINDS: tl.constexpr, S: tl.constexpr, SIDE: tl.constexpr, SOFTMAX: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """mixing `[kinds, S, SIDE, SIDE]`; the rows' maxima and reciprocal sums `[kinds, S, N]`, or None."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    i_m, i_group, _, i_kind = split_program(tl.cdiv(SIDE, BM), S, 1)
    first, _ = window_kind(i_kind, M, SHIFT, W, KINDS)
    o_i = i_m * BM + tl.arange(0, BM)
    o_i2 = o_i[:, None]
    m_i = present(o_i, first, M, SHIFT, W)[:, None]

    if SOFTMAX:
        b_max = tl.full([BM], float("-inf"), ACC)
        for i_k in range(0, N, BK):
            o_j = (i_k + tl.arange(0, BK))[None, :]
            mask = m_i & present(o_j, first, M, SHIFT, W)  # [BM, BK]
            b_l = logits_tile(p_table, p_matrix, matrix_stride, i_group, o_i2, o_j, mask, W, ACC)
            b_max = tl.maximum(b_max, tl.max(tl.where(mask, b_l, float("-inf")), 1))
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)  # of rows that no window has
        b_sum = tl.zeros([BM], ACC)
        for i_k in range(0, N, BK):
            o_j = (i_k + tl.arange(0, BK))[None, :]
            mask = m_i & present(o_j, first, M, SHIFT, W)
            b_l = logits_tile(p_table, p_matrix, matrix_stride, i_group, o_i2, o_j, mask, W, ACC)
            b_sum += tl.sum(tl.exp(tl.where(mask, b_l - b_max[:, None], float("-inf"))), 1)
        b_rinv = 1.0 / tl.where(b_sum == 0, 1.0, b_sum)
        if p_max is not None:
            o_row = (i_kind * S + i_group) * N + o_i
            tl.store(p_max + o_row, b_max, mask=o_i < N)
            tl.store(p_rinv + o_row, b_rinv, mask=o_i < N)

    p_row = p_mixing + ((i_kind * S + i_group) * SIDE + o_i2) * SIDE
    for i_k in range(0, SIDE, BK):
        o_j = (i_k + tl.arange(0, BK))[None, :]
        mask = m_i & present(o_j, first, M, SHIFT, W)
        b_p = logits_tile(p_table, p_matrix, matrix_stride, i_group, o_i2, o_j, mask, W, ACC)
        if SOFTMAX:
            b_p = tl.exp(tl.where(mask, b_p - b_max[:, None], float("-inf"))) * b_rinv[:, None]
        b_p = tl.where(mask, b_p, 0.0).to(p_mixing.dtype.element_ty)
        tl.store(p_row + o_j, b_p, mask=(o_i2 < SIDE) & (o_j < SIDE))


@triton.jit
def logits_kernel(
    MIXING, p_dmixing, p_delta, p_dlogits, M, SHIFT, shares, W: tl.constexpr, KINDS: tl.constexpr,
    S: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dmixing `[kinds, shares, S, N, N]`, delta `[kinds, shares, S, N]` or None -> dlogits `[S, N, N]`."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    KEY_BLOCKS: tl.constexpr = (N + BK - 1) // BK
    i_block, i_group, _, _ = split_program((N + BM - 1) // BM * KEY_BLOCKS, S, 1)
    o_i = i_block // KEY_BLOCKS * BM + tl.arange(0, BM)
    o_j = i_block % KEY_BLOCKS * BK + tl.arange(0, BK)
    inside = (o_i < N)[:, None] & (o_j < N)[None, :]
    o_pair = o_i[:, None].to(tl.int64) * N + o_j[None, :]

    b_sum = tl.zeros([BM, BK], ACC)
    for i_kind in range(0, KINDS[0] * KINDS[1] * KINDS[2]):
        b_dp = tl.zeros([BM, BK], ACC)
        b_delta = tl.zeros([BM], ACC)
        for i_share in range(0, shares):
            i_partial = (i_kind * shares + i_share) * S + i_group
            b_dp += tl.load(p_dmixing + i_partial * N * N + o_pair, mask=inside, other=0.0)
            if p_delta is not None:
                b_delta += tl.load(p_delta + i_partial * N + o_i, mask=o_i < N, other=0.0)
        if p_delta is not None:
            first, _counts = window_kind(i_kind, M, SHIFT, W, KINDS)
            m_p = present(o_i, first, M, SHIFT, W)[:, None] & present(o_j, first, M, SHIFT, W)[None, :]
            b_p = mixing_tile(MIXING, i_kind, i_group, o_i[:, None], o_j[None, :], m_p, S, W, ACC)
            b_dp = b_p * (b_dp - b_delta[:, None])
        b_sum += b_dp
    tl.store(p_dlogits + i_group * N * N + o_pair, b_sum, mask=inside)


@triton.jit
def table_kernel(
    p_dlogits, p_dtable, W: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr, BI: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dlogits `[S, N, N]` -> dtable `[S, prod(2 W - 1)]`."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    T1: tl.constexpr = 2 * W[1] - 1
    T2: tl.constexpr = 2 * W[2] - 1
    TABLE: tl.constexpr = (2 * W[0] - 1) * T1 * T2
    i_block, i_group, _, _ = split_program((TABLE + BD - 1) // BD, S, 1)
    o_d = i_block * BD + tl.arange(0, BD)
    d0, d1, d2 = o_d // (T1 * T2) - (W[0] - 1), o_d // T2 % T1 - (W[1] - 1), o_d % T2 - (W[2] - 1)
    o_step = ((d0 * W[1] + d1) * W[2] + d2)[None, :]  # from query token to key token

    b_sum = tl.zeros([BD], ACC)
    for i_i in range(0, N, BI):
        o_i = (i_i + tl.arange(0, BI))[:, None]
        j0 = o_i // (W[1] * W[2]) + d0[None, :]
        j1 = o_i // W[2] % W[1] + d1[None, :]
        j2 = o_i % W[2] + d2[None, :]
        mask = (j0 >= 0) & (j0 < W[0]) & (j1 >= 0) & (j1 < W[1]) & (j2 >= 0) & (j2 < W[2])
        mask = mask & (o_i < N) & (o_d < TABLE)[None, :]
        o_pair = o_i.to(tl.int64) * N + o_i + o_step
        b_sum += tl.sum(tl.load(p_dlogits + i_group * N * N + o_pair, mask=mask, other=0.0), 0)
    tl.store(p_dtable + i_group * TABLE + o_d, b_sum, mask=o_d < TABLE)
