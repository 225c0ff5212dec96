"""What the kernels share: the matrix product of a tile, the head's transform, the fold into the log-sum-exp, the gradient of a tile.

M tokens and N vocabulary rows of a tile, K a step along the hidden size, V vocabulary, D hidden size.
"""

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a_MK, b_KN, acc_MN, PRECISION: tl.constexpr):
    if INTERPRET:  # the interpreter multiplies bf16 numbers by their bits
        a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest."""
    if INTERPRET and dtype == tl.bfloat16:  # the interpreter cuts the lower bits off
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles share each stretch of weight while it is in the cache."""
    group = tile // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % height, within // height


@triton.jit
def product_tile(
    hidden, weight, row, column, V, D, stride_hidden, stride_weight_v, stride_weight_d,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N]: hidden[row : row + M] @ weight[column : column + N].T. Columns from V on hold nothing of use."""
    acc_MN = tl.zeros((M, N), dtype=tl.float32)
    if TMA:
        for k in range(0, D, K):
            acc_MN = dot(hidden.load([row, k]), weight.load([column, k]).T, acc_MN, PRECISION)
    else:
        rows_M = (row + tl.arange(0, M)).to(tl.int64)
        columns_N = tl.minimum(column + tl.arange(0, N), V - 1).to(tl.int64)
        hidden_M1 = hidden + rows_M[:, None] * stride_hidden
        weight_1N = weight + columns_N[None, :] * stride_weight_v
        for k in range(0, D, K):
            d_K = k + tl.arange(0, K).to(tl.int64)
            if EVEN_D:
                a_MK = tl.load(hidden_M1 + d_K[None, :])
                b_KN = tl.load(weight_1N + d_K[:, None] * stride_weight_d)
            else:
                a_MK = tl.load(hidden_M1 + d_K[None, :], mask=d_K[None, :] < D, other=0.0)
                b_KN = tl.load(weight_1N + d_K[:, None] * stride_weight_d, mask=d_K[:, None] < D, other=0.0)
            acc_MN = dot(a_MK, b_KN, acc_MN, PRECISION)
    return acc_MN


@triton.jit
def split_columns(x_MN, PIECES: tl.constexpr):
    """x in 1, 2 or 4 pieces of neighbouring columns: what follows a product needs registers for one piece at a time."""
    M: tl.constexpr = x_MN.shape[0]
    N: tl.constexpr = x_MN.shape[1]
    if PIECES == 1:
        pieces = (x_MN,)
    elif PIECES == 2:
        pieces = tl.split(tl.permute(tl.reshape(x_MN, (M, 2, N // 2)), (0, 2, 1)))
    else:
        left, right = tl.split(tl.permute(tl.reshape(x_MN, (M, 2, N // 2)), (0, 2, 1)))
        a, b = tl.split(tl.permute(tl.reshape(left, (M, 2, N // 4)), (0, 2, 1)))
        c, d = tl.split(tl.permute(tl.reshape(right, (M, 2, N // 4)), (0, 2, 1)))
        pieces = (a, b, c, d)
    return pieces


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2|x|) + 1) loses digits near 0; there an odd polynomial, fitted to a relative error of 4e-9, is exact to fp32."""
    square = x * x
    inner = -0.053739714301 + square * (0.020639084706 - square * 0.0057049841591)
    series = x + x * square * (-0.33333281942 + square * (0.13331442189 + square * inner))
    size = tl.abs(x)
    tail = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 20.0)) + 1.0)
    tail = tl.where(x < 0, -tail, tail)
    capped = tl.where(size < 0.625, series, tail)
    return tl.where(x == x, capped, x)


@triton.jit
def transform(x_MN, bias_N, logit_scale, softcap, inverse_M, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z of the product x, and dz / dx, which broadcasts to [M, N]."""
    if HAS_BIAS:
        x_MN += bias_N[None, :]
    if HAS_SOFTCAP:
        tanh_MN = tanh(x_MN * (logit_scale / softcap))
        slope_MN = (1.0 - tanh_MN * tanh_MN) * (logit_scale * inverse_M)[:, None]
        z_MN = tanh_MN * (softcap * inverse_M)[:, None]
    else:
        slope_MN = (logit_scale * inverse_M)[:, None]
        z_MN = x_MN * slope_MN
    return z_MN, slope_MN


@triton.jit
def fold(
    z_MN, begin, V, target_M, row_M, live_M, slot, stride_partial, partial_max, partial_sum, partial_entropy, partial_total,
    partial_squares, target_logit, EVEN: tl.constexpr, ENTROPY: tl.constexpr, TOTAL: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """One tile's share of each token's log-sum-exp and statistics, written to its slot [., row], and the target's logit if it is here.

    Terms equal to 1 are counted apart: where the target has nearly all of the probability, 1 - p lives in the small terms, and
    beside a 1 they would lose their digits.
    """
    place_M = slot.to(tl.int64) * stride_partial + row_M
    column_N = tl.arange(0, z_MN.shape[1])
    if not EVEN:
        z_MN = tl.where((column_N < V - begin)[None, :], z_MN, float("-inf"))
    within_M = target_M - begin
    here_M = (within_M >= 0) & (within_M < z_MN.shape[1])
    if tl.max(here_M.to(tl.int32), 0) > 0:  # few tiles hold a target
        z_M = tl.sum(tl.where(column_N[None, :] == within_M[:, None], z_MN, 0.0), 1)
        tl.store(target_logit + row_M, z_M, mask=live_M & here_M)
    if TOTAL:
        total_MN = z_MN
        if not EVEN:
            total_MN = tl.where((column_N < V - begin)[None, :], z_MN, 0.0)
        tl.store(partial_total + place_M, tl.sum(total_MN, 1), mask=live_M)
    top_M = tl.max(z_MN, 1)
    difference_MN = z_MN - tl.where(top_M == float("-inf"), 0.0, top_M)[:, None]
    e_MN = tl.exp(difference_MN)
    if SQUARES:
        tl.store(partial_squares + place_M, tl.sum(e_MN * e_MN, 1), mask=live_M)
    ones_MN = difference_MN == 0.0
    small_M = tl.sum(tl.where(ones_MN, 0.0, e_MN), 1)
    count_M = tl.sum(tl.where(ones_MN, 1.0, 0.0), 1)
    tl.store(partial_max + place_M, top_M, mask=live_M)
    tl.store(partial_sum + place_M, small_M.to(tl.float64) + count_M.to(tl.float64), mask=live_M)
    if ENTROPY:  # the sum of e * -difference: nothing cancels
        tl.store(partial_entropy + place_M, tl.sum(e_MN * tl.minimum(-difference_MN, 1e30), 1), mask=live_M)


@triton.jit
def gradient(z_MN, lse_high_M, lse_low_M, plain_M, log_prob_M, flat_M, LOG_PROB: tl.constexpr, FLAT: tl.constexpr):
    """p * (plain + log_prob * log p) + flat, the gradient of z outside the target's column."""
    log_p_MN = (z_MN - lse_high_M[:, None]) - lse_low_M[:, None]
    p_MN = tl.exp(log_p_MN)
    if LOG_PROB:
        factor_MN = plain_M[:, None] + log_prob_M[:, None] * tl.where(p_MN > 0, log_p_MN, 0.0)
        g_MN = p_MN * factor_MN
    else:
        g_MN = p_MN * plain_M[:, None]
    if FLAT:
        g_MN += flat_M[:, None]
    return g_MN
