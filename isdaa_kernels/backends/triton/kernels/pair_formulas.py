"""The loss of preference pairs and its derivatives: csrc/pair_loss.h in Triton. A new pairwise objective is a case of `base_loss`.

M pairs; a, b log-ratios of chosen and rejected, n_a, n_b their counts of scored tokens. Derivatives are by the policy's two sums of token
log-probs. All numbers are fp64.
"""

import triton
import triton.language as tl

from isdaa_kernels.pair_loss import BASES, MODES

_DPO, _IPO, _IPO_MEAN = (tl.constexpr(BASES.index(name)) for name in ("dpo", "ipo", "ipo_mean"))
_JOINT, _PER_COMPLETION = (tl.constexpr(MODES.index(name)) for name in ("joint", "per_completion"))


@triton.jit
def _dpo_loss(a_M, b_M, beta_M, smoothing_M):
    x_M = beta_M * (a_M - b_M)
    z_M = tl.exp(-tl.abs(x_M))
    u_M = 1.0 + z_M
    tail_M = tl.where(u_M == 1.0, z_M, tl.log(u_M) * (z_M / (u_M - 1.0)))  # log(1 + z) without its rounding
    small_M, large_M = z_M / u_M, 1.0 / u_M
    right_M, wrong_M = tl.where(x_M < 0, x_M, 0.0) - tail_M, tl.where(x_M > 0, -x_M, 0.0) - tail_M
    loss_M = -(1.0 - smoothing_M) * right_M - smoothing_M * wrong_M
    s_wrong_M, s_right_M = tl.where(x_M < 0, large_M, small_M), tl.where(x_M > 0, large_M, small_M)
    chosen_M = beta_M * (smoothing_M * s_right_M - (1.0 - smoothing_M) * s_wrong_M)
    return loss_M, chosen_M, -chosen_M


@triton.jit
def _ipo_loss(a_M, b_M, n_a_M, n_b_M, beta_M):
    r_M = a_M / n_a_M - b_M / n_b_M - 1.0 / (2.0 * beta_M)
    return r_M * r_M, 2.0 * r_M / n_a_M, -2.0 * r_M / n_b_M


@triton.jit
def _slic_loss(a_M, b_M, beta_M):
    hinge_M = 1.0 - beta_M * (a_M - b_M)
    satisfied_M = hinge_M <= 0
    chosen_M = tl.where(satisfied_M, 0.0, -beta_M)
    return tl.where(satisfied_M, 0.0, hinge_M), chosen_M, -chosen_M


@triton.jit
def base_loss(a_M, b_M, n_a_M, n_b_M, beta_M, smoothing_M, BASE: tl.constexpr):
    """The loss of each pair and its derivatives by the two sums."""
    one_M = tl.full(a_M.shape, 1.0, tl.float64)
    if BASE == _DPO:
        loss_M, chosen_M, rejected_M = _dpo_loss(a_M, b_M, beta_M, smoothing_M)
    elif BASE == _IPO:
        loss_M, chosen_M, rejected_M = _ipo_loss(a_M, b_M, one_M, one_M, beta_M)
    elif BASE == _IPO_MEAN:
        loss_M, chosen_M, rejected_M = _ipo_loss(a_M, b_M, n_a_M, n_b_M, beta_M)
    else:
        loss_M, chosen_M, rejected_M = _slic_loss(a_M, b_M, beta_M)
    return loss_M, chosen_M, rejected_M


@triton.jit
def _capped(x_M, cap_M, slope_M):
    return tl.where(x_M > cap_M, cap_M, x_M), tl.where(x_M <= cap_M, slope_M, 0.0)


@triton.jit
def _tempered(x_M, n_M, power_M, exponent_M, BY_LENGTH: tl.constexpr):
    """(tempered log-ratio, its derivative)"""
    slope_M = power_M
    if BY_LENGTH:
        over_M = tl.where(exponent_M == 1.0, n_M, tl.exp(exponent_M * tl.log(n_M)))
        x_M, slope_M = x_M / over_M, slope_M / over_M
    return x_M * power_M, slope_M


@triton.jit
def log_weight(
    a_M, b_M, n_a_M, n_b_M, epsilon, floor, power, length_exponent, MODE: tl.constexpr, FLOOR: tl.constexpr, BY_LENGTH: tl.constexpr,
):  # fmt: skip
    """(log weight, a' + b' before clip and floor, its derivatives by the two sums, where the clip bites)"""
    power_M, exponent_M = tl.full(a_M.shape, power, tl.float64), tl.full(a_M.shape, length_exponent, tl.float64)
    epsilon_M = tl.full(a_M.shape, epsilon, tl.float64)
    a_M, chosen_M = _tempered(a_M, n_a_M, power_M, exponent_M, BY_LENGTH)
    b_M, rejected_M = _tempered(b_M, n_b_M, power_M, exponent_M, BY_LENGTH)
    total_M = a_M + b_M
    log_M, clipped_M = total_M, total_M != total_M
    if MODE == _JOINT:
        log_M, passes_M = _capped(total_M, 2.0 * epsilon_M, tl.full(a_M.shape, 1.0, tl.float64))
        clipped_M = total_M >= 2.0 * epsilon_M
        chosen_M, rejected_M = chosen_M * passes_M, rejected_M * passes_M
    elif MODE == _PER_COMPLETION:
        clipped_M = (a_M == a_M) & (b_M == b_M) & ((a_M >= epsilon_M) | (b_M >= epsilon_M))
        a_M, chosen_M = _capped(a_M, epsilon_M, chosen_M)
        b_M, rejected_M = _capped(b_M, epsilon_M, rejected_M)
        log_M = a_M + b_M
    else:
        clipped_M = (total_M < 0) & (total_M > 0)
    if FLOOR:
        least_M = tl.log(tl.full(a_M.shape, floor, tl.float64))
        chosen_M, rejected_M = tl.where(log_M >= least_M, chosen_M, 0.0), tl.where(log_M >= least_M, rejected_M, 0.0)
        log_M = tl.where(log_M < least_M, least_M, log_M)
    return log_M, total_M, chosen_M, rejected_M, clipped_M
