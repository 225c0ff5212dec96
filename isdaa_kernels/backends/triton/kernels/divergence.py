"""Terms of `linear_kl` on a tile: two heads' final logits folded into partial sums, joined to the mixture's, or turned into the gradient.

M tokens and N vocabulary rows of a tile, T tokens of a slab, S slots of partial results. p, q: the probabilities of policy and reference.
With excess(x) = exp(x) - 1 - x, which is not negative, sum of b excess(log(o / b)) = KL(b || o), as sum of b = sum of o = 1: summed like
that a small divergence keeps its digits. Compiled without contraction: what a difference rounds off must come out exactly.
"""

import triton
import triton.language as tl

FORWARD = tl.constexpr(0)  # as in isdaa_kernels.divergence.DIRECTIONS
REVERSE = tl.constexpr(1)
JSD = tl.constexpr(2)
SMALL = tl.constexpr(0.5)  # beyond it exp(x) - 1 - x cancels little


@triton.jit
def exponential(x):
    """exp(x), 0 below -87: there fp32 has no more normal numbers."""
    return tl.where(x < -87.0, 0.0, tl.exp(x))


@triton.jit
def difference(a, b):
    """a - b in two parts, the second of which the first has rounded off. Two heads' logits may lie far apart and yet mean the same."""
    high = a - b
    back = high - a
    low = (a - (high - back)) - (b + back)
    return high, tl.where(low == low, low, 0.0)  # of infinities


@triton.jit
def small_excess(x):
    """exp(x) - 1 - x for |x| <= 1/2."""
    y = tl.fma(x, 2.7557319e-6, 2.4801587e-5)
    y = tl.fma(y, x, 1.9841270e-4)
    y = tl.fma(y, x, 1.3888889e-3)
    y = tl.fma(y, x, 8.3333333e-3)
    y = tl.fma(y, x, 4.1666667e-2)
    y = tl.fma(y, x, 1.6666667e-1)
    y = tl.fma(y, x, 0.5)
    return y * (x * x)


@triton.jit
def log_of_sum(u, t):
    """log1p(t), u being 1 + t rounded."""
    return tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def store_row(partial, place_M, row: tl.constexpr, stride, x_M, live_M):
    tl.store(partial + row * stride + place_M, x_M, mask=live_M)


@triton.jit
def kl_fold(zp_MN, zq_MN, begin, slot, S, T, row_M, live_M, partial, DIRECTION: tl.constexpr):
    """One tile's share of both log-sum-exps and of the divergence, written to its slot of `partial` [9, S, T] (jsd: [5, S, T]): maximum and
    sum of exponentials of the policy, of the reference, the column of the policy's largest logit (as bits); then, with d = z of other - z
    of base and b = exp(z of base - its maximum): d where the base is largest, the sums of b x and of b excess(x) with x = d - that, the
    latter without what is kept apart, the other's exponentials where |x| > 1/2. Columns that are none come with -inf."""
    place_M, stride = slot.to(tl.int64) * T + row_M, tl.cast(S, tl.int64) * T
    p_top_M, q_top_M = tl.max(zp_MN, 1), tl.max(zq_MN, 1)
    p_MN = exponential(zp_MN - tl.where(p_top_M == float("-inf"), 0.0, p_top_M)[:, None])
    q_MN = exponential(zq_MN - tl.where(q_top_M == float("-inf"), 0.0, q_top_M)[:, None])
    column_N = begin + tl.arange(0, zp_MN.shape[1])
    largest_M = tl.min(tl.where(zp_MN == p_top_M[:, None], column_N[None, :], 2147483647), 1)
    store_row(partial, place_M, 0, stride, p_top_M, live_M)
    store_row(partial, place_M, 1, stride, tl.sum(p_MN, 1), live_M)
    store_row(partial, place_M, 2, stride, q_top_M, live_M)
    store_row(partial, place_M, 3, stride, tl.sum(q_MN, 1), live_M)
    store_row(partial, place_M, 4, stride, largest_M.to(tl.float32, bitcast=True), live_M)
    if DIRECTION != JSD:
        if DIRECTION == FORWARD:
            high_MN, low_MN = difference(zp_MN, zq_MN)
            b_MN, o_MN, top_MN = q_MN, p_MN, zq_MN == q_top_M[:, None]
        else:
            high_MN, low_MN = difference(zq_MN, zp_MN)
            b_MN, o_MN, top_MN = p_MN, q_MN, zp_MN == p_top_M[:, None]
        center_M = tl.max(tl.where(top_MN, high_MN + low_MN, float("-inf")), 1)
        center_M = tl.where(tl.abs(center_M) < float("inf"), center_M, 0.0)
        x_MN = (high_MN - center_M[:, None]) + low_MN
        small_MN = tl.abs(x_MN) <= SMALL
        gap_MN = tl.where(b_MN == 0.0, 0.0, b_MN * x_MN)
        large_MN = tl.where(b_MN == 0.0, 0.0, -(b_MN + gap_MN))
        excess_MN = tl.where(small_MN, b_MN * small_excess(tl.where(small_MN, x_MN, 0.0)), large_MN)
        store_row(partial, place_M, 5, stride, center_M, live_M)
        store_row(partial, place_M, 6, stride, tl.sum(gap_MN, 1), live_M)
        store_row(partial, place_M, 7, stride, tl.sum(excess_MN, 1), live_M)
        store_row(partial, place_M, 8, stride, tl.sum(tl.where(small_MN, 0.0, o_MN), 1), live_M)


@triton.jit
def log_mixture(r_MN, rest, weight):
    """(log(m / p), log(m / q)) of m = rest p + weight q from r = log(p / q): log(m / max(p, q)), of which neither part cancels, less what
    is between them."""
    up_MN, size_MN = r_MN >= 0.0, tl.abs(r_MN)
    lesser_MN, greater_MN = tl.where(up_MN, weight, rest), tl.where(up_MN, rest, weight)
    small_MN = size_MN <= SMALL
    within_MN = tl.where(small_MN, -size_MN, 0.0)
    t_MN = lesser_MN * (small_excess(within_MN) + within_MN)
    near_MN = log_of_sum(1.0 + t_MN, t_MN)
    log_m_MN = tl.where(small_MN, near_MN, tl.log(greater_MN + lesser_MN * exponential(-size_MN)))
    return tl.where(up_MN, log_m_MN, log_m_MN - r_MN), tl.where(up_MN, log_m_MN + r_MN, log_m_MN)


@triton.jit
def mixture_term(b_MN, m_MN, x_MN):
    """b excess(x), m being b exp(x)."""
    small_MN = tl.abs(x_MN) <= SMALL
    large_MN = m_MN - (b_MN + b_MN * x_MN)
    terms_MN = tl.where(small_MN, b_MN * small_excess(tl.where(small_MN, x_MN, 0.0)), large_MN)
    return tl.where(b_MN == 0.0, m_MN, terms_MN)


@triton.jit
def log_terms(zp_MN, zq_MN, tokens_M, T):
    """(log p, log q, log(p / q), the latter less the mean where `tokens` say so). tokens_M: row 0 of [13, T], at the tile's tokens."""
    log_p_MN = (zp_MN - tl.load(tokens_M + 2 * T)[:, None]) - tl.load(tokens_M + 3 * T)[:, None]
    log_q_MN = (zq_MN - tl.load(tokens_M + 5 * T)[:, None]) - tl.load(tokens_M + 6 * T)[:, None]
    high_MN, low_MN = difference(zp_MN, zq_MN)
    r_MN = (high_MN - tl.load(tokens_M + 10 * T)[:, None]) + (low_MN - tl.load(tokens_M + 11 * T)[:, None])
    return log_p_MN, log_q_MN, r_MN


@triton.jit
def kl_mixture(zp_MN, zq_MN, tokens_M, rest, weight, slot, S, T, row_M, live_M, partial):
    """One tile's share of KL(p || m), KL(q || m) and the mean of log(p / m) under p, written to its slot of `partial` [3, S, T]."""
    place_M, stride = slot.to(tl.int64) * T + row_M, tl.cast(S, tl.int64) * T
    log_p_MN, log_q_MN, r_MN = log_terms(zp_MN, zq_MN, tokens_M, T)
    over_p_MN, over_q_MN = log_mixture(r_MN, rest, weight)
    p_MN, q_MN = exponential(log_p_MN), exponential(log_q_MN)
    m_MN = rest * p_MN + weight * q_MN
    store_row(partial, place_M, 0, stride, tl.sum(mixture_term(p_MN, m_MN, over_p_MN), 1), live_M)
    store_row(partial, place_M, 1, stride, tl.sum(mixture_term(q_MN, m_MN, over_q_MN), 1), live_M)
    store_row(partial, place_M, 2, stride, -tl.sum(tl.where(p_MN == 0.0, 0.0, p_MN * over_p_MN), 1), live_M)


@triton.jit
def kl_gradient(zp_MN, zq_MN, tokens_M, rest, weight, T, DIRECTION: tl.constexpr):
    """Gradient of the divergence with respect to the policy's final logits, times the token's coefficient."""
    log_p_MN, log_q_MN, r_MN = log_terms(zp_MN, zq_MN, tokens_M, T)
    p_MN = exponential(log_p_MN)
    if DIRECTION == FORWARD:
        q_MN = exponential(log_q_MN)
        small_MN = tl.abs(r_MN) <= SMALL
        x_MN = tl.where(small_MN, r_MN, 0.0)
        g_MN = tl.where(small_MN, q_MN * (x_MN + small_excess(x_MN)), p_MN - q_MN)  # q expm1(r)
    elif DIRECTION == REVERSE:
        g_MN = tl.where(p_MN == 0.0, 0.0, p_MN * r_MN)
    else:
        over_p_MN, _ = log_mixture(r_MN, rest, weight)
        above_MN = -over_p_MN - tl.load(tokens_M + 12 * T)[:, None]
        g_MN = tl.where(p_MN == 0.0, 0.0, rest * p_MN * above_MN)
    return g_MN * tl.load(tokens_M + 4 * T)[:, None]
