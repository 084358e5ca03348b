"""The backward pass's other two products, and the gradient of the relative table.

    dX1[j, q] = sum_i P[i, j] dU[i, q]                         columns_kernel: X2, dZ (, X1) in, C out a token
    dL[i, j]  = P[i, j] (sum_q dU[i, q] X1[j, q] - delta[i])   logits_kernel: X1, X2, dZ in
    dR(d)     = sum over i of dL[i, i + d]                     table_kernel: dL in

`columns_kernel` is the forward product with P read the other way round: tiles of P^T are built directly.
With a LayerNorm it leaves the gradient of the normalised X1 for the token-wise kernel. In `logits_kernel` a
program owns a tile of dL and a share of the columns of every kind of window, and multiplies by P once per
kind; without softmax the product itself is dL. Its 2 N C flops a token are the forward's. Sums over shares
are partial sums in a fixed order: no atomics. `table_kernel` gathers: an (i, j) belongs to one displacement,
so dL is read once, neighbours in memory by neighbours in the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    activation_slope,
    column_count,
    columns,
    dense_strides,
    load_gradient,
    load_mixed,
    mixing_tile,
    present,
    split_program,
    tile_offsets,
    window_kind,
)


@triton.jit
def columns_kernel(
    p_x, p_dz, p_dx, p_dnormed, MIXING, B, M, SHIFT, shares, X, DZ, DX,
    W: tl.constexpr, KINDS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`p_dnormed` None: the first half of dx; else the gradient before the LayerNorm, dense [B, *map, C]."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    dtype = p_x.dtype.element_ty
    i_m, i_group, i_share, i_kind = split_program((N + BM - 1) // BM, S, shares)
    first, counts = window_kind(i_kind, M, SHIFT, W, KINDS)

    o_j = i_m * BM + tl.arange(0, BM)
    m_j = present(o_j, first, M, SHIFT, W)
    if BK >= N:
        o_i = tl.arange(0, BK)
        m_p = m_j[:, None] & present(o_i, first, M, SHIFT, W)[None, :]
        b_pt = mixing_tile(MIXING, i_kind, i_group, o_i[None, :], o_j[:, None], m_p, S, W, ACC).to(dtype)

    n_q = column_count(counts, B, D, INDEX)
    for i_q in range(i_share, tl.cdiv(n_q, BN), shares):
        o_q = i_q * BN + tl.arange(0, BN).to(INDEX)
        m_q = o_q < n_q
        column = columns(o_q, i_group, first, counts, SHIFT, W, D)

        b_dx = tl.zeros([BM, BN], ACC)
        for i_k in range(0, N, BK):
            o_i = i_k + tl.arange(0, BK)
            m_i = present(o_i, first, M, SHIFT, W)
            if BK < N:
                m_p = m_j[:, None] & m_i[None, :]
                b_pt = mixing_tile(MIXING, i_kind, i_group, o_i[None, :], o_j[:, None], m_p, S, W, ACC)
                b_pt = b_pt.to(dtype)
            m_u = m_i[:, None] & m_q[None, :]
            b_du = load_gradient(p_dz, p_x + S * D, o_i, column, m_u, DZ, X, W, ACT, ACC).to(dtype)
            b_dx = tl.dot(b_pt, b_du, b_dx, input_precision=PRECISION, out_dtype=ACC)

        mask = m_j[:, None] & m_q[None, :]
        if p_dnormed is not None:
            C: tl.constexpr = S * D
            o_token = tile_offsets(o_j, column, dense_strides(M), W)
            tl.store(p_dnormed + o_token * C + column[4][None, :], b_dx, mask=mask)
        else:
            if ACT != "none":
                b_x1 = tl.load(p_x + tile_offsets(o_j, column, X, W), mask=mask, other=0.0).to(ACC)
                b_dx = b_dx * activation_slope(b_x1, ACT)
            tl.store(p_dx + tile_offsets(o_j, column, DX, W), b_dx.to(dtype), mask=mask)


@triton.jit
def logits_kernel(
    p_x, p_dz, p_dlogits, MIXING, NORM, p_delta, B, M, SHIFT, shares, X, DZ,
    W: tl.constexpr, KINDS: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dlogits `[shares, S, N, N]`, delta `[kinds, S, N]` (of all shares) or None."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    KEY_BLOCKS: tl.constexpr = (N + BK - 1) // BK
    dtype = p_x.dtype.element_ty
    i_block, i_group, i_share, _ = split_program((N + BM - 1) // BM * KEY_BLOCKS, S, shares)
    o_i = i_block // KEY_BLOCKS * BM + tl.arange(0, BM)
    o_j = i_block % KEY_BLOCKS * BK + tl.arange(0, BK)

    b_sum = tl.zeros([BM, BK], ACC)
    for i_kind in range(0, KINDS[0] * KINDS[1] * KINDS[2]):
        first, counts = window_kind(i_kind, M, SHIFT, W, KINDS)
        m_i, m_j = present(o_i, first, M, SHIFT, W), present(o_j, first, M, SHIFT, W)
        b_dp = tl.zeros([BM, BK], ACC)
        n_q = column_count(counts, B, D, INDEX)
        for i_q in range(i_share, tl.cdiv(n_q, BN), shares):
            o_q = i_q * BN + tl.arange(0, BN).to(INDEX)
            m_q = (o_q < n_q)[None, :]
            column = columns(o_q, i_group, first, counts, SHIFT, W, D)
            m_u, m_x = m_i[:, None] & m_q, m_j[:, None] & m_q
            b_du = load_gradient(p_dz, p_x + S * D, o_i, column, m_u, DZ, X, W, ACT, ACC).to(
                dtype
            )  # [BM, BN]
            b_x = load_mixed(p_x, o_j, column, m_x, NORM, M, X, W, ACT, ACC)  # [BK, BN]
            b_dp = tl.dot(b_du, tl.trans(b_x), b_dp, input_precision=PRECISION, out_dtype=ACC)
        if p_delta is None:
            b_sum += b_dp
        else:
            m_p = m_i[:, None] & m_j[None, :] & (n_q > 0)  # a kind with no windows has no row sums
            b_p = mixing_tile(MIXING, i_kind, i_group, o_i[:, None], o_j[None, :], m_p, S, W, ACC)
            m_delta = m_i & (i_share == 0)
            b_delta = tl.load(p_delta + (i_kind * S + i_group) * N + o_i, mask=m_delta, other=0.0)
            b_sum += b_p * (b_dp - b_delta[:, None])

    o_dlogits = ((i_share * S + i_group) * N + o_i[:, None]) * N + o_j[None, :]
    tl.store(p_dlogits + o_dlogits, b_sum, mask=(o_i < N)[:, None] & (o_j < N)[None, :])


@triton.jit
def table_kernel(
    p_dlogits, p_dtable, shares, W: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr, BI: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dlogits `[shares, S, N, N]` -> dtable `[S, prod(2 W - 1)]`."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    T1: tl.constexpr = 2 * W[1] - 1
    T2: tl.constexpr = 2 * W[2] - 1
    TABLE: tl.constexpr = (2 * W[0] - 1) * T1 * T2
    i_block, i_group, _, _ = split_program((TABLE + BD - 1) // BD, S, 1)
    o_d = i_block * BD + tl.arange(0, BD)
    d0, d1, d2 = o_d // (T1 * T2) - (W[0] - 1), o_d // T2 % T1 - (W[1] - 1), o_d % T2 - (W[2] - 1)
    o_step = ((d0 * W[1] + d1) * W[2] + d2)[None, :]  # from query token to key token

    b_sum = tl.zeros([BD], ACC)
    for i_share in range(0, shares):
        p_share = p_dlogits + (i_share * S + i_group) * N * N
        for i_i in range(0, N, BI):
            o_i = (i_i + tl.arange(0, BI))[:, None]
            j0 = o_i // (W[1] * W[2]) + d0[None, :]
            j1 = o_i // W[2] % W[1] + d1[None, :]
            j2 = o_i % W[2] + d2[None, :]
            mask = (j0 >= 0) & (j0 < W[0]) & (j1 >= 0) & (j1 < W[1]) & (j2 >= 0) & (j2 < W[2])
            mask = mask & (o_i < N) & (o_d < TABLE)[None, :]
            o_pair = o_i.to(tl.int64) * N + o_i + o_step
            b_sum += tl.sum(tl.load(p_share + o_pair, mask=mask, other=0.0), 0)
    tl.store(p_dtable + i_group * TABLE + o_d, b_sum, mask=o_d < TABLE)
