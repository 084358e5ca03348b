"""What the Triton kernels share: windows by address, tiles of the mixing matrix, activations.

Maps of one and two dimensions are maps of three with leading ones. Per dimension, windows come in at most
three kinds: one that sticks out at the front, the whole ones, one that sticks out at the back. All windows of
a kind have the same tokens present, so one tile of the mixing matrix serves all of them, and the long axis of
the product runs over (batch, window of the kind, channel of the group): the tile is built once for many
columns, and no group is padded to a power of two.

    column q -> c = q % D, window u = (q // D) % U, b = q // D // U
    address  =  column's (window origin, channel; 64 bits) + token's (place in the window)

Tuples: M map, SHIFT, W window, KINDS (1, 2 or 3), one entry per map dimension; X, DZ, ... strides of the
tensor of that name, [B, 3 map dimensions, channel].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_program(BLOCKS: tl.constexpr, S: tl.constexpr, shares):
    """Block fastest, then group: programs that read the same cache lines run together."""
    pid = tl.program_id(0)
    i_block = pid % BLOCKS
    i_group = (pid // BLOCKS) % S
    i_share = pid // (BLOCKS * S) % shares
    i_kind = pid // (BLOCKS * S) // shares
    return i_block, i_group.to(tl.int64), i_share, i_kind


@triton.jit
def axis_kind(i_kind, size, shift, WINDOW: tl.constexpr, KINDS: tl.constexpr):
    """The first window of a kind along one dimension, and how many there are (perhaps none)."""
    total = (size + shift + WINDOW - 1) // WINDOW
    if KINDS == 1:
        start, end = i_kind * 0, total
    else:
        i_kind = i_kind + (3 - KINDS)  # of two kinds there is none at the front
        whole = (shift + WINDOW - 1) // WINDOW  # 0 or 1 in front of the first whole window
        back = tl.maximum(whole, (size + shift) // WINDOW)
        start = tl.where(i_kind == 0, 0, tl.where(i_kind == 1, whole, back))
        end = tl.where(i_kind == 0, whole, tl.where(i_kind == 1, back, total))
    return start, end - start


@triton.jit
def window_kind(i_kind, M, SHIFT, W: tl.constexpr, KINDS: tl.constexpr):
    """The first window of a kind, (t0, t1, t2), and the counts per dimension."""
    t0, n0 = axis_kind(i_kind // (KINDS[1] * KINDS[2]), M[0], SHIFT[0], W[0], KINDS[0])
    t1, n1 = axis_kind(i_kind // KINDS[2] % KINDS[1], M[1], SHIFT[1], W[1], KINDS[1])
    t2, n2 = axis_kind(i_kind % KINDS[2], M[2], SHIFT[2], W[2], KINDS[2])
    return (t0, t1, t2), (n0, n1, n2)


@triton.jit
def column_count(counts, B, D: tl.constexpr, INDEX: tl.constexpr):
    return (counts[0] * counts[1] * counts[2]).to(INDEX) * B * D


@triton.jit
def columns(o_q, i_group, first, counts, SHIFT, W: tl.constexpr, D: tl.constexpr):
    """The batch entry, the window's origin on the map (three coordinates) and the channel of every column."""
    windows = tl.maximum(counts[0] * counts[1] * counts[2], 1)  # no columns are wanted of a kind with none
    n1, n2 = tl.maximum(counts[1], 1), tl.maximum(counts[2], 1)
    o_u = (o_q // D % windows).to(tl.int32)
    p0 = (first[0] + o_u // (n1 * n2)) * W[0] - SHIFT[0]
    p1 = (first[1] + o_u // n2 % n1) * W[1] - SHIFT[1]
    p2 = (first[2] + o_u % n2) * W[2] - SHIFT[2]
    return o_q // D // windows, p0, p1, p2, i_group * D + o_q % D


@triton.jit
def coordinates(o_n, W: tl.constexpr):
    return o_n // (W[1] * W[2]), o_n // W[2] % W[1], o_n % W[2]


@triton.jit
def addresses(p, o_n, column, STRIDE, W: tl.constexpr, INDEX: tl.constexpr):
    """`[tokens, columns]`: 64 bits for a column's window, INDEX for a place in it, which saves registers."""
    b, p0, p1, p2, c = column
    o_column = b.to(tl.int64) * STRIDE[0] + p0.to(tl.int64) * STRIDE[1] + p1.to(tl.int64) * STRIDE[2]
    o_column = o_column + p2.to(tl.int64) * STRIDE[3] + c * STRIDE[4]
    i0, i1, i2 = coordinates(o_n.to(INDEX), W)
    o_token = (i0 * STRIDE[1] + i1 * STRIDE[2] + i2 * STRIDE[3]).to(INDEX)
    return (p + o_column)[None, :] + o_token[:, None]


@triton.jit
def dense_strides(M, WIDTH: tl.constexpr, CHANNEL: tl.constexpr):
    """Of a dense `[B, *map, WIDTH]`; CHANNEL 0 where there is one number per token."""
    s2 = tl.cast(WIDTH, tl.int64)
    s1 = s2 * M[2]
    s0 = s1 * M[1]
    return s0 * M[0], s0, s1, s2, CHANNEL


@triton.jit
def present(o_n, first, M, SHIFT, W: tl.constexpr):
    """Which places of a kind's windows are tokens of the map; a block's tail is not."""
    i0, i1, i2 = coordinates(o_n, W)
    p0 = first[0] * W[0] - SHIFT[0] + i0
    p1 = first[1] * W[1] - SHIFT[1] + i1
    p2 = first[2] * W[2] - SHIFT[2] + i2
    inside = (p0 >= 0) & (p0 < M[0]) & (p1 >= 0) & (p1 < M[1]) & (p2 >= 0) & (p2 < M[2])
    return inside & (o_n < W[0] * W[1] * W[2])


@triton.jit
def displacement_code(o_n, W: tl.constexpr):
    """A number per token such that code(j) - code(i) is the table's index of delta_ij, up to a constant."""
    i0, i1, i2 = coordinates(o_n, W)
    return (i0 * (2 * W[1] - 1) + i1) * (2 * W[2] - 1) + i2


@triton.jit
def logits_tile(
    p_table, p_matrix, matrix_stride, i_group, o_i, o_j, mask, W: tl.constexpr, ACC: tl.constexpr
):
    """L = table[delta] + matrix; o_i and o_j broadcast to the tile, either way round."""
    N: tl.constexpr = W[0] * W[1] * W[2]
    TABLE: tl.constexpr = (2 * W[0] - 1) * (2 * W[1] - 1) * (2 * W[2] - 1)
    b_logits = tl.zeros(mask.shape, ACC)
    if p_table is not None:  # the table's middle is delta = 0
        o_delta = displacement_code(o_j, W) - displacement_code(o_i, W) + TABLE // 2
        b_logits += tl.load(p_table + i_group * TABLE + o_delta, mask=mask, other=0.0)
    if p_matrix is not None:
        o_matrix = o_i.to(tl.int64) * N + o_j
        b_logits += tl.load(p_matrix + i_group * matrix_stride + o_matrix, mask=mask, other=0.0)
    return b_logits


@triton.jit
def mixing_tile(MIXING, i_kind, i_group, o_i, o_j, mask, S: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr):
    """P = exp(L - max_i) / sum_i under softmax, else L; absent tokens 0.

    MIXING is (table, matrix, its stride by group, row maxima, reciprocal row sums); maximum and reciprocal
    stay apart, because subtracting a log-sum-exp would round the exponent twice.
    """
    p_table, p_matrix, matrix_stride, p_max, p_rinv = MIXING
    b_p = logits_tile(p_table, p_matrix, matrix_stride, i_group, o_i, o_j, mask, W, ACC)
    if p_max is not None:
        N: tl.constexpr = W[0] * W[1] * W[2]
        o_row = (i_kind * S + i_group) * N + o_i
        b_max = tl.load(p_max + o_row, mask=o_i < N, other=0.0)
        b_rinv = tl.load(p_rinv + o_row, mask=o_i < N, other=0.0)
        b_p = tl.exp(tl.where(mask, b_p - b_max, float("-inf"))) * b_rinv
    return tl.where(mask, b_p, 0.0)


@triton.jit
def normal_cdf(b_x):
    """In float32 1/2 + x P(x^2) / Q(x^2), within 1e-8, as on the CPU: half the instructions of an erf."""
    if b_x.dtype == tl.float64:
        b_cdf = 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476))
    else:
        b_bounded = tl.minimum(b_x, 5.55)
        b_s = b_bounded * b_bounded
        b_p = 2.244276942e-8 * b_s + 6.352734090e-6
        b_p = (b_p * b_s + 1.712741359e-4) * b_s + 4.691817798e-3
        b_p = (b_p * b_s + 3.410917521e-2) * b_s + 3.989422321e-1
        b_q = 1.188617262e-6 * b_s + 7.434884174e-5
        b_q = (b_q * b_s + 1.898334478e-3) * b_s + 2.878968976e-2
        b_q = (b_q * b_s + 2.521648407e-1) * b_s + 1.0
        b_cdf = tl.where(b_x < -5.55, 0.0, b_bounded * (b_p / b_q) + 0.5)
    return b_cdf


@triton.jit
def activate(b_x, ACT: tl.constexpr):
    if ACT == "gelu":
        b_x = b_x * normal_cdf(b_x)
    elif ACT == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        b_x = b_x / (1.0 + tl.exp(-1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x)))
    return b_x


@triton.jit
def activation_slope(b_x, ACT: tl.constexpr):
    b_slope = tl.full(b_x.shape, 1.0, b_x.dtype)
    if ACT == "gelu":
        b_slope = normal_cdf(b_x) + b_x * 0.3989422804014327 * tl.exp(-0.5 * b_x * b_x)
    elif ACT == "gelu_tanh":
        b_twice = 1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x)
        b_gate = 1.0 / (1.0 + tl.exp(-b_twice))
        b_rest = 1.0 / (1.0 + tl.exp(b_twice))  # 1 - gate, uncancelled
        b_inner = 1.5957691216057308 * (1.0 + 0.134145 * b_x * b_x)
        b_slope = b_gate + b_x * b_gate * b_rest * b_inner
    return b_slope


@triton.jit
def load_mixed(
    p_x, o_j, column, mask, NORM, M, X, W: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of X1 `[keys, columns]` as the product takes it: activated, normalised, in x's dtype."""
    b_x = tl.load(addresses(p_x, o_j, column, X, W, INDEX), mask=mask, other=0.0)
    if ACT != "none" or NORM is not None:
        b_wide = activate(b_x.to(ACC), ACT)
        if NORM is not None:
            p_mean, p_rstd, p_weight, p_shift = NORM
            DENSE = dense_strides(M, 1, 0)
            b_mean = tl.load(addresses(p_mean, o_j, column, DENSE, W, INDEX), mask=mask, other=0.0)
            b_rstd = tl.load(addresses(p_rstd, o_j, column, DENSE, W, INDEX), mask=mask, other=0.0)
            b_weight = tl.load(p_weight + column[4])[None, :]
            b_wide = (b_wide - b_mean) * b_rstd * b_weight + tl.load(p_shift + column[4])[None, :]
            b_wide = tl.where(mask, b_wide, 0.0)
        b_x = b_wide.to(b_x.dtype)
    return b_x


@triton.jit
def load_gradient(
    p_x, p_dz, o_i, column, mask, X, DZ, W: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of dU = dZ act(X2) `[queries, columns]` as the product takes it; p_x points at X2."""
    b_dz = tl.load(addresses(p_dz, o_i, column, DZ, W, INDEX), mask=mask, other=0.0).to(ACC)
    b_x2 = tl.load(addresses(p_x, o_i, column, X, W, INDEX), mask=mask, other=0.0)
    return (b_dz * activate(b_x2.to(ACC), ACT)).to(b_x2.dtype)


@triton.constexpr_function
def total(pieces):
    return sum(pieces)


@triton.constexpr_function
def before(pieces, i):
    """The tokens of a block in front of its i-th piece."""
    return sum(pieces[:i])


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    return tl.zeros([COLUMNS], ACC) if ROWS == 0 else tl.zeros([ROWS, COLUMNS], ACC)


@triton.jit
def sums_of(PIECES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """An accumulator `[ROWS, piece]` for each piece, or `[piece]` if ROWS is 0."""
    sums = ()
    for i in tl.static_range(len(PIECES)):
        sums += (zeros(ROWS, PIECES[i], ACC),)
    return sums


@triton.jit
def zero_of(i_q, INDEX: tl.constexpr):
    """Zero, as the compiler does not know: offsets that contain it are computed inside the loop over i_q.
    Ahead of it they would fill the registers, two for every address of the epilogue."""
    return tl.where(tl.cast(i_q, INDEX) < 0, 1, 0)
