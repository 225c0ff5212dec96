"""Terms of `linear_kl` on a tile: two heads' final logits folded into partial sums, joined to the mixture's, or turned into the gradient.

M tokens and N vocabulary rows of a tile, T tokens of a slab, S slots of partial results. p, q: the probabilities of policy and reference.
With excess(x) = exp(x) - 1 - x, which is not negative, sum of b excess(log(o / b)) = KL(b || o), as sum of b = sum of o = 1: summed like
that a small divergence keeps its digits. Compiled without contraction: what a difference rounds off must come out exactly.
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.tiles import narrow

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
def tops(zp_MN, zq_MN, DIRECTION: tl.constexpr):
    """(the policy's largest logit, the reference's, z of other - z of base where the base is largest: 0 of jsd)."""
    p_top_M, q_top_M = tl.max(zp_MN, 1), tl.max(zq_MN, 1)
    if DIRECTION == JSD:
        center_M = tl.zeros_like(p_top_M)
    elif DIRECTION == FORWARD:
        center_M = _center(zq_MN, q_top_M, zp_MN)
    else:
        center_M = _center(zp_MN, p_top_M, zq_MN)
    return p_top_M, q_top_M, center_M


@triton.jit
def _center(base_MN, top_M, other_MN):
    """other - base where the base is largest; 0 where there is no such number."""
    center_M = tl.max(tl.where(base_MN == top_M[:, None], other_MN, float("-inf")), 1) - top_M
    return tl.where(tl.abs(center_M) < float("inf"), center_M, 0.0)


@triton.jit
def kl_sums(zp_MN, zq_MN, p_top_M, q_top_M, center_M, DIRECTION: tl.constexpr):
    """(of the policy's exponentials the sum of those below 1 and the number of ones, the same of the reference's, the sums of b x, of
    b excess(x), of the other's exponentials that are apart), [M] each (jsd: 0 from the fifth on). Columns that are none come with -inf."""
    gap_M, excess_M, apart_M = tl.zeros_like(p_top_M), tl.zeros_like(p_top_M), tl.zeros_like(p_top_M)
    p_MN, p_small_M, p_ones_M = _exponentials(zp_MN, p_top_M)
    q_MN, q_small_M, q_ones_M = _exponentials(zq_MN, q_top_M)
    if DIRECTION != JSD:
        if DIRECTION == FORWARD:
            zb_MN, zo_MN, b_MN, o_MN = zq_MN, zp_MN, q_MN, p_MN
        else:
            zb_MN, zo_MN, b_MN, o_MN = zp_MN, zq_MN, p_MN, q_MN
        high_MN, low_MN = difference(zo_MN, zb_MN)
        x_MN = (high_MN - center_M[:, None]) + low_MN
        small_MN = tl.abs(x_MN) <= SMALL
        apart_M = tl.sum(tl.where(small_MN, 0.0, o_MN), 1)
        gap_MN = tl.where(b_MN == 0.0, 0.0, b_MN * x_MN)
        gap_M = tl.sum(gap_MN, 1)
        large_MN = tl.where(b_MN == 0.0, 0.0, -(b_MN + gap_MN))
        excess_M = tl.sum(tl.where(small_MN, b_MN * small_excess(tl.where(small_MN, x_MN, 0.0)), large_MN), 1)
    return p_small_M, p_ones_M, q_small_M, q_ones_M, gap_M, excess_M, apart_M


@triton.jit
def _exponentials(z_MN, top_M):
    """exp(z - top), the sum of those below 1, how many are 1: beside a 1 the small terms would lose their digits."""
    below_MN = z_MN - tl.where(top_M == float("-inf"), 0.0, top_M)[:, None]
    e_MN, ones_MN = exponential(below_MN), below_MN == 0.0
    return e_MN, tl.sum(tl.where(ones_MN, 0.0, e_MN), 1), tl.sum(tl.where(ones_MN, 1.0, 0.0), 1)


@triton.jit
def store_fold(
    p_top_M, q_top_M, center_M, p_small_M, p_ones_M, q_small_M, q_ones_M, gap_M, excess_M, apart_M, slot, S, T, row_M, live_M, partial,
    DIRECTION: tl.constexpr,
):  # fmt: skip
    """A tile's slot of `partial` [R, S, T]: maximum, small terms and ones of the policy, of the reference, then what jsd has none of."""
    place_M, stride = slot.to(tl.int64) * T + row_M, tl.cast(S, tl.int64) * T
    store_row(partial, place_M, 0, stride, p_top_M, live_M)
    store_row(partial, place_M, 1, stride, p_small_M, live_M)
    store_row(partial, place_M, 2, stride, p_ones_M, live_M)
    store_row(partial, place_M, 3, stride, q_top_M, live_M)
    store_row(partial, place_M, 4, stride, q_small_M, live_M)
    store_row(partial, place_M, 5, stride, q_ones_M, live_M)
    if DIRECTION != JSD:
        store_row(partial, place_M, 6, stride, center_M, live_M)
        store_row(partial, place_M, 7, stride, gap_M, live_M)
        store_row(partial, place_M, 8, stride, excess_M, live_M)
        store_row(partial, place_M, 9, stride, apart_M, live_M)


@triton.jit
def store_target(zp_MN, zq_MN, begin, target_M, row_M, live_M, T, target_logit):
    """Both logits of the tokens whose target is among the columns from `begin` on."""
    within_M = target_M - begin
    here_M = (within_M >= 0) & (within_M < zp_MN.shape[1])
    if tl.max(here_M.to(tl.int32), 0) > 0:  # few tiles hold one
        there_MN = tl.arange(0, zp_MN.shape[1])[None, :] == within_M[:, None]
        tl.store(target_logit + row_M, tl.sum(tl.where(there_MN, zp_MN, 0.0), 1), mask=live_M & here_M)
        tl.store(target_logit + T + row_M, tl.sum(tl.where(there_MN, zq_MN, 0.0), 1), mask=live_M & here_M)


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
    """(log p, log q, log(p / q), the latter less the mean where `tokens` say so). tokens_M: row 0 of [17, T], at the tile's tokens."""
    log_p_MN = (zp_MN - tl.load(tokens_M + 2 * T)[:, None]) - tl.load(tokens_M + 3 * T)[:, None]
    log_q_MN = (zq_MN - tl.load(tokens_M + 5 * T)[:, None]) - tl.load(tokens_M + 6 * T)[:, None]
    high_MN, low_MN = difference(zp_MN, zq_MN)
    r_MN = (high_MN - tl.load(tokens_M + 10 * T)[:, None]) + (low_MN - tl.load(tokens_M + 11 * T)[:, None])
    return log_p_MN, log_q_MN, r_MN


@triton.jit
def kl_mixture(zp_MN, zq_MN, tokens_M, rest, weight, T):
    """One tile's share of KL(p || m), KL(q || m) and the mean of log(p / m) under p, [M] each."""
    log_p_MN, log_q_MN, r_MN = log_terms(zp_MN, zq_MN, tokens_M, T)
    over_p_MN, over_q_MN = log_mixture(r_MN, rest, weight)
    p_MN, q_MN = exponential(log_p_MN), exponential(log_q_MN)
    m_MN = rest * p_MN + weight * q_MN
    p_M, q_M = tl.sum(mixture_term(p_MN, m_MN, over_p_MN), 1), tl.sum(mixture_term(q_MN, m_MN, over_q_MN), 1)
    return p_M, q_M, -tl.sum(tl.where(p_MN == 0.0, 0.0, p_MN * over_p_MN), 1)


@triton.jit
def store_mixture(p_M, q_M, mean_M, slot, S, T, row_M, live_M, partial):
    """Rows 0, 1, 2 of the tile's slot."""
    place_M, stride = slot.to(tl.int64) * T + row_M, tl.cast(S, tl.int64) * T
    store_row(partial, place_M, 0, stride, p_M, live_M)
    store_row(partial, place_M, 1, stride, q_M, live_M)
    store_row(partial, place_M, 2, stride, mean_M, live_M)


@triton.jit
def kl_gradient(
    zp_MN, zq_MN, column_N, target_M, tokens_M, rest, weight, T, DIRECTION: tl.constexpr, LOGPROBS: tl.constexpr
):  # fmt: skip
    """Gradient of the divergence with respect to the policy's final logits, times the token's coefficient; LOGPROBS: and that of the
    log-prob of its target, onehot - p, times its own."""
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
        above_MN = (-over_p_MN - tl.load(tokens_M + 12 * T)[:, None]) - tl.load(tokens_M + 13 * T)[:, None]
        g_MN = tl.where(p_MN == 0.0, 0.0, rest * p_MN * above_MN)
    coefficient_M = tl.load(tokens_M + 4 * T)
    g_MN *= coefficient_M[:, None]
    if LOGPROBS:
        g_MN = tl.where(coefficient_M[:, None] == 0.0, 0.0, g_MN)  # of a divergence that may be infinite
        here_MN = column_N[None, :] == target_M[:, None]
        rest_M, own_M = tl.load(tokens_M + 15 * T), tl.load(tokens_M + 14 * T)
        g_MN += tl.where(here_MN, rest_M[:, None], -(own_M[:, None] * p_MN))
    return g_MN


@triton.jit
def store_gradient(g_MN, out, low, place_MN, mask, PARTS: tl.constexpr, LOW: tl.constexpr):
    """g rounded, and, of two parts, what that leaves, divided by LOW."""
    high_MN = narrow(g_MN, out.dtype.element_ty)
    tl.store(out + place_MN, high_MN, mask=mask)
    if PARTS == 2:
        tl.store(low + place_MN, narrow((g_MN - high_MN.to(tl.float32)) * (1.0 / LOW), low.dtype.element_ty), mask=mask)
