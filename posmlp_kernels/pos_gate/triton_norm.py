"""The LayerNorm on X1, token by token: its statistics, and its backward.

    xhat = (act(x1) - mean) * rstd;  normed = xhat * weight + shift         over the C channels of a token
    dx1  = act'(x1) * rstd * (g - mean(g) - xhat * mean(g * xhat)),         g = dnormed * weight
    dweight = sum over tokens of dnormed * xhat,  dshift = sum over tokens of dnormed

The normalised tokens are never stored: the products apply the statistics, two numbers a token, as they load.
Both kernels hold a block of whole tokens in registers and are bound by memory: C in forward; x1 and dnormed
in and dx1 out backward. The sums over tokens leave as one partial sum per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import activate, activation_slope


@triton.jit
def map_offsets(o_token, M, STRIDE):
    """The address of tokens counted over the dense `[B, *map]`."""
    o_2, o_r = o_token % M[2], o_token // M[2]
    o_1, o_r = o_r % M[1], o_r // M[1]
    o_0, o_b = o_r % M[0], o_r // M[0]
    return o_b * STRIDE[0] + o_0 * STRIDE[1] + o_1 * STRIDE[2] + o_2 * STRIDE[3]


@triton.jit
def statistics_kernel(
    p_x, p_mean, p_rstd, tokens, M, X, C: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    ACC: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    m_t = o_t < tokens
    mask = m_t[:, None] & (o_c < C)[None, :]
    o_x = map_offsets(o_t, M, X)[:, None] + o_c[None, :]

    b_x = activate(tl.load(p_x + o_x, mask=mask, other=0.0).to(ACC), ACT)  # [BT, BC]
    b_mean = tl.sum(b_x, 1) / C
    b_centred = tl.where(mask, b_x - b_mean[:, None], 0.0)
    b_variance = tl.sum(b_centred * b_centred, 1) / C
    tl.store(p_mean + o_t, b_mean, mask=m_t)
    tl.store(p_rstd + o_t, 1.0 / tl.sqrt(b_variance + EPS), mask=m_t)


@triton.jit
def norm_backward_kernel(
    p_x, p_mean, p_rstd, p_weight, p_dnormed, p_dx, p_dweight, p_dshift, tokens, shares, M, X, DX,
    C: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dweight and dshift `[shares, C]`."""
    i_share = tl.program_id(0)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0)
    b_dweight = tl.zeros([BC], ACC)
    b_dshift = tl.zeros([BC], ACC)
    for i_t in range(i_share, tl.cdiv(tokens, BT), shares):
        o_t = tl.cast(i_t, tl.int64) * BT + tl.arange(0, BT)
        m_t = o_t < tokens
        mask = m_t[:, None] & m_c[None, :]
        o_x = map_offsets(o_t, M, X)[:, None] + o_c[None, :]
        b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(ACC)  # [BT, BC]
        b_dnormed = tl.load(p_dnormed + o_t[:, None] * C + o_c[None, :], mask=mask, other=0.0)
        b_mean = tl.load(p_mean + o_t, mask=m_t, other=0.0)
        b_rstd = tl.load(p_rstd + o_t, mask=m_t, other=0.0)

        b_xhat = tl.where(mask, (activate(b_x, ACT) - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_g = b_dnormed * b_weight[None, :]
        b_mean_g = tl.sum(b_g, 1) / C
        b_mean_gx = tl.sum(b_g * b_xhat, 1) / C
        b_dx = b_rstd[:, None] * (b_g - b_mean_g[:, None] - b_xhat * b_mean_gx[:, None])
        if ACT != "none":
            b_dx = b_dx * activation_slope(b_x, ACT)
        o_dx = map_offsets(o_t, M, DX)[:, None] + o_c[None, :]
        tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        b_dweight += tl.sum(b_dnormed * b_xhat, 0)
        b_dshift += tl.sum(b_dnormed, 0)
    o_partial = i_share.to(tl.int64) * C + o_c
    tl.store(p_dweight + o_partial, b_dweight, mask=m_c)
    tl.store(p_dshift + o_partial, b_dshift, mask=m_c)
