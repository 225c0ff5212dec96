"""Kernels of `linear_kl` over products that the library made, and the sums of partial results.

T tokens of a slab, M tokens and N columns of a tile, C columns of the chunk, V vocabulary, S slots of partial results, N_ALL tokens of the
call.
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.divergence import (
    FORWARD,
    JSD,
    kl_gradient,
    kl_mixture,
    kl_sums,
    log_of_sum,
    store_fold,
    store_gradient,
    store_mixture,
    store_target,
    tops,
)
from isdaa_kernels.backends.triton.kernels.linear_kl import final_logits


@triton.jit
def kl_fold_logits_kernel(
    policy, reference,  # fp32 [T, C]: the products for the vocabulary rows from `begin` on
    policy_bias, reference_bias,  # [V] or None
    inverse_temperature,  # fp32 [T]
    tokens,  # fp32 [17, T], where MIXTURE
    targets,  # int32 [T], where LOGPROBS
    target_logit,  # fp32 [2, T], where LOGPROBS
    count,  # int32 [1]
    partial,  # fp32 [., S, T]
    first, T, S, begin, end, stride_policy, stride_reference,
    policy_scale, policy_softcap, reference_scale, reference_softcap, rest, weight,
    POLICY_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REFERENCE_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
    DIRECTION: tl.constexpr, MIXTURE: tl.constexpr, LOGPROBS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As `linear_kl_forward_kernel`. Grid: (cdiv(T, M), cdiv(C, N)); the slot of a tile is begin / N + its column."""
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    inside_M = row_M < T
    live_M = inside_M & (first + row_M < tl.load(count))
    column_N = begin + tl.program_id(1) * N + tl.arange(0, N)
    x_MN = _chunk(policy, row_M, column_N - begin, stride_policy, live_M, column_N < end)
    y_MN = _chunk(reference, row_M, column_N - begin, stride_reference, live_M, column_N < end)
    inverse_M = tl.load(inverse_temperature + row_M, mask=inside_M, other=1.0)
    zp_MN, zq_MN, _ = final_logits(
        x_MN, y_MN, policy_bias, reference_bias, column_N, end, inverse_M, policy_scale, policy_softcap, reference_scale,
        reference_softcap, POLICY_BIAS, POLICY_SOFTCAP, REFERENCE_BIAS, REFERENCE_SOFTCAP, False,
    )  # fmt: skip
    slot = begin // N + tl.program_id(1)
    if MIXTURE:
        tokens_M = tokens + tl.minimum(row_M, T - 1)
        p_M, q_M, mean_M = kl_mixture(zp_MN, zq_MN, tokens_M, rest, weight, T)
        store_mixture(p_M, q_M, mean_M, slot, S, T, row_M, live_M, partial)
    else:
        p_top_M, q_top_M, center_M = tops(zp_MN, zq_MN, DIRECTION)
        p_M, p_ones_M, q_M, q_ones_M, gap_M, excess_M, apart_M = kl_sums(
            zp_MN, zq_MN, p_top_M, q_top_M, center_M, DIRECTION
        )
        store_fold(
            p_top_M, q_top_M, center_M, p_M, p_ones_M, q_M, q_ones_M, gap_M, excess_M, apart_M, slot, S, T, row_M, live_M, partial,
            DIRECTION,
        )  # fmt: skip
        if LOGPROBS:
            target_M = tl.load(targets + row_M, mask=inside_M, other=-1)
            store_target(zp_MN, zq_MN, begin + tl.program_id(1) * N, target_M, row_M, live_M, T, target_logit)


@triton.jit
def kl_gradient_logits_kernel(
    policy, reference,  # as above
    out,  # [T, C], gradient of the policy's product; fp32 may be `policy` itself
    low,  # [T, C], what rounding that left divided by LOW, where PARTS is 2
    policy_bias, reference_bias,  # [V] or None
    targets,  # int32 [T], where LOGPROBS
    tokens,  # fp32 [17, T]
    live,  # uint8 [T]: rows that carry a gradient; the others become 0
    bias_sums,  # fp32 [T / M, C] or None
    T, begin, end, stride_policy, stride_reference, stride_out,
    policy_scale, policy_softcap, reference_scale, reference_softcap, rest, weight,
    POLICY_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REFERENCE_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
    DIRECTION: tl.constexpr, BIAS_SUMS: tl.constexpr, LOGPROBS: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """As `linear_kl_backward_kernel`. Grid: (cdiv(T, M), cdiv(C, N))."""
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    inside_M = row_M < T
    live_M = tl.load(live + row_M, mask=inside_M, other=0) != 0
    place_N = tl.program_id(1) * N + tl.arange(0, N)
    column_N = begin + place_N
    tokens_M = tokens + tl.minimum(row_M, T - 1)
    x_MN = _chunk(policy, row_M, place_N, stride_policy, live_M, column_N < end) * tl.load(tokens_M + T)[:, None]
    y_MN = _chunk(reference, row_M, place_N, stride_reference, live_M, column_N < end)
    zp_MN, zq_MN, slope_MN = final_logits(
        x_MN, y_MN, policy_bias, reference_bias, column_N, end, tl.load(tokens_M), policy_scale, policy_softcap, reference_scale,
        reference_softcap, POLICY_BIAS, POLICY_SOFTCAP, REFERENCE_BIAS, REFERENCE_SOFTCAP, False,
    )  # fmt: skip
    target_M = tl.load(targets + row_M, mask=inside_M, other=-1) if LOGPROBS else None
    g_MN = kl_gradient(zp_MN, zq_MN, column_N, target_M, tokens_M, rest, weight, T, DIRECTION, LOGPROBS)
    g_MN = tl.where(live_M[:, None], g_MN * slope_MN, 0.0)
    if BIAS_SUMS:
        sums_N = tl.sum(g_MN * tl.load(tokens_M + 7 * T)[:, None], 0)
        tl.store(bias_sums + tl.program_id(0).to(tl.int64) * (end - begin) + place_N, sums_N, mask=column_N < end)
    place_MN = row_M.to(tl.int64)[:, None] * stride_out + place_N[None, :]
    store_gradient(g_MN, out, low, place_MN, inside_M[:, None] & (column_N < end)[None, :], PARTS, LOW)


@triton.jit
def _chunk(logits, row_M, place_N, stride, live_M, inside_N):
    place_MN = row_M.to(tl.int64)[:, None] * stride + place_N[None, :]
    return tl.load(logits + place_MN, mask=live_M[:, None] & inside_N[None, :], other=0.0)


@triton.jit
def excess64(x):
    """exp(x) - 1 - x in fp64."""
    small = tl.abs(x) <= 0.5
    y = tl.where(small, x, 0.0)
    term = y * y * 0.5
    total = tl.zeros_like(y)
    for k in tl.static_range(3, 18):
        total += term
        term *= y / k
    return tl.where(small, total, (tl.exp(x) - 1.0) - x)


@triton.jit
def kl_combine_kernel(
    partial,  # fp32 [R, S, T], as `divergence.store_fold` writes it
    rows, count,
    targets,  # int32 [T], as the next where LOGPROBS
    target_logit,  # fp32 [2, T]
    value,  # fp32 [N_ALL], in token order; not of jsd
    numbers,  # fp64 [4, N_ALL]: both log-sum-exps, their difference; not jsd's: the divergence
    logprob,  # fp32 [2, N_ALL], where LOGPROBS; tokens whose target is no vocabulary row keep theirs
    first, T, S, N_ALL, DIRECTION: tl.constexpr, LOGPROBS: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Slots in one order, summed in fp64, their sums moved to the center of the slot where the base is largest. Grid: (cdiv(T, M),)."""
    i_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (i_M < T) & (first + i_M < tl.load(count))
    stride = tl.cast(S, tl.int64) * T
    p_top_M = tl.full((M,), float("-inf"), tl.float32)
    q_top_M, center_M = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    for slot in range(0, S, SLOTS):
        place_SM, mask_SM = _slots(slot, S, T, i_M, live_M, SLOTS)
        p_SM = tl.load(partial + place_SM, mask=mask_SM, other=float("-inf"))
        q_SM = tl.load(partial + 3 * stride + place_SM, mask=mask_SM, other=float("-inf"))
        p_M, q_M = tl.max(p_SM, 0), tl.max(q_SM, 0)
        if DIRECTION != JSD:
            b_SM, b_M = (q_SM, q_M) if DIRECTION == FORWARD else (p_SM, p_M)
            center_SM = tl.load(partial + 6 * stride + place_SM, mask=mask_SM, other=0.0)
            here_M = tl.max(tl.where(mask_SM & (b_SM == b_M[None, :]), center_SM, float("-inf")), 0)
            center_M = tl.where(b_M > (q_top_M if DIRECTION == FORWARD else p_top_M), here_M, center_M)
        p_top_M, q_top_M = tl.maximum(p_top_M, p_M), tl.maximum(q_top_M, q_M)
    p_shift_M = tl.where(p_top_M == float("-inf"), 0.0, p_top_M)
    q_shift_M = tl.where(q_top_M == float("-inf"), 0.0, q_top_M)
    b_shift_M = q_shift_M if DIRECTION == FORWARD else p_shift_M
    p_sum_M, q_sum_M = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64)
    gap_M, excess_M = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64)
    for slot in range(0, S, SLOTS):
        place_SM, mask_SM = _slots(slot, S, T, i_M, live_M, SLOTS)
        p_SM = tl.load(partial + place_SM, mask=mask_SM, other=float("-inf"))
        q_SM = tl.load(partial + 3 * stride + place_SM, mask=mask_SM, other=float("-inf"))
        p_part_SM = _sum_of_terms(partial + stride, stride, place_SM, mask_SM)
        q_part_SM = _sum_of_terms(partial + 4 * stride, stride, place_SM, mask_SM)
        p_factor_SM, q_factor_SM = _factor(p_SM - p_shift_M[None, :]), _factor(q_SM - q_shift_M[None, :])
        p_sum_M += tl.sum(p_factor_SM * p_part_SM, 0)
        q_sum_M += tl.sum(q_factor_SM * q_part_SM, 0)
        if DIRECTION != JSD:
            factor_SM, part_SM = (q_factor_SM, q_part_SM) if DIRECTION == FORWARD else (p_factor_SM, p_part_SM)
            center_SM = tl.load(partial + 6 * stride + place_SM, mask=mask_SM, other=0.0)
            slot_gap_SM = tl.load(partial + 7 * stride + place_SM, mask=mask_SM, other=0.0).to(tl.float64)
            slot_excess_SM = tl.load(partial + 8 * stride + place_SM, mask=mask_SM, other=0.0).to(tl.float64)
            apart_SM = tl.load(partial + 9 * stride + place_SM, mask=mask_SM, other=0.0).to(tl.float64)
            step_SM = center_M[None, :].to(tl.float64) - center_SM.to(tl.float64)
            back_SM = excess64(-step_SM)  # exp(-step) - 1 + step
            moved_SM = (
                (back_SM - step_SM + 1.0) * slot_excess_SM + back_SM * part_SM + (back_SM - step_SM) * slot_gap_SM
            )
            none_SM = factor_SM == 0.0  # a slot without probability in the base
            gap_M += tl.sum(tl.where(none_SM, 0.0, factor_SM * (slot_gap_SM - step_SM * part_SM)), 0)
            excess_M += tl.sum(tl.where(none_SM, 0.0, factor_SM * moved_SM), 0)
            o_SM = p_SM if DIRECTION == FORWARD else q_SM
            above_SM = (o_SM - b_shift_M[None, :]) - center_M[None, :]
            apart_SM = tl.where(apart_SM == 0.0, 0.0, apart_SM * tl.exp(above_SM.to(tl.float64)))
            excess_M += tl.sum(apart_SM, 0)
    p_log_M, q_log_M = tl.log(p_sum_M), tl.log(q_sum_M)
    lse_gap_M = (p_shift_M.to(tl.float64) - q_shift_M.to(tl.float64)) + (p_log_M - q_log_M)
    n_M = tl.load(rows + first + i_M, mask=live_M, other=0)
    if DIRECTION != JSD:
        # With E the mean under the base and x = d - center, KL = log E[exp(x)] - E[x], where E[exp(x)] - 1 is E[excess(x)] + E[x]. Where
        # the divergence is large, or the center far from the difference of the log-sum-exps, the plain formula cancels nothing.
        base_sum_M = q_sum_M if DIRECTION == FORWARD else p_sum_M
        mean_M = gap_M / base_sum_M
        center64_M = center_M.to(tl.float64)
        far_M = (lse_gap_M if DIRECTION == FORWARD else -lse_gap_M) - center64_M
        above_M = excess_M / base_sum_M + mean_M
        near_M = log_of_sum(1.0 + above_M, above_M)
        small_M = (far_M - mean_M < 0.25) & (tl.abs(far_M) < 4.0) & (tl.abs(near_M) < float("inf"))
        divergence_M = tl.where(small_M, near_M, far_M) - mean_M
        divergence_M = tl.where(divergence_M < 0.0, 0.0, divergence_M)
        near_gap_M = center64_M + near_M
        lse_gap_M = tl.where(small_M, near_gap_M if DIRECTION == FORWARD else -near_gap_M, lse_gap_M)
        tl.store(value + n_M, divergence_M.to(tl.float32), mask=live_M)
        tl.store(numbers + 3 * N_ALL + n_M, divergence_M, mask=live_M)
    tl.store(numbers + n_M, p_shift_M.to(tl.float64) + p_log_M, mask=live_M)
    tl.store(numbers + N_ALL + n_M, q_shift_M.to(tl.float64) + q_log_M, mask=live_M)
    tl.store(numbers + 2 * N_ALL + n_M, lse_gap_M, mask=live_M)
    if LOGPROBS:
        there_M = live_M & (tl.load(targets + i_M, mask=live_M, other=-1) >= 0)
        zp_M = tl.load(target_logit + i_M, mask=there_M, other=0.0).to(tl.float64)
        zq_M = tl.load(target_logit + T + i_M, mask=there_M, other=0.0).to(tl.float64)
        tl.store(logprob + n_M, ((zp_M - p_shift_M) - p_log_M).to(tl.float32), mask=there_M)
        tl.store(logprob + N_ALL + n_M, ((zq_M - q_shift_M) - q_log_M).to(tl.float32), mask=there_M)


@triton.jit
def kl_combine_mixture_kernel(
    partial,  # fp32 [R, S, T], as `divergence.store_mixture` writes it
    rows, count, value, numbers, first, T, S, N_ALL, rest, weight, M: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """jsd: value fp32 [N_ALL], and row 3 of numbers, the mean of log(p / m) under p. Grid: (cdiv(T, M),)."""
    i_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (i_M < T) & (first + i_M < tl.load(count))
    stride = tl.cast(S, tl.int64) * T
    p_M, q_M, mean_M = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64)
    for slot in range(0, S, SLOTS):
        place_SM, mask_SM = _slots(slot, S, T, i_M, live_M, SLOTS)
        p_M += tl.sum(tl.load(partial + place_SM, mask=mask_SM, other=0.0).to(tl.float64), 0)
        q_M += tl.sum(tl.load(partial + stride + place_SM, mask=mask_SM, other=0.0).to(tl.float64), 0)
        mean_M += tl.sum(tl.load(partial + 2 * stride + place_SM, mask=mask_SM, other=0.0).to(tl.float64), 0)
    n_M = tl.load(rows + first + i_M, mask=live_M, other=0)
    tl.store(value + n_M, (rest * p_M + weight * q_M).to(tl.float32), mask=live_M)
    tl.store(numbers + 3 * N_ALL + n_M, mean_M, mask=live_M)


@triton.jit
def _sum_of_terms(small, stride, place_SM, mask_SM):
    """fp64: terms below 1 and ones of a head's slots."""
    below_SM = tl.load(small + place_SM, mask=mask_SM, other=0.0)
    ones_SM = tl.load(small + stride + place_SM, mask=mask_SM, other=0.0)
    return below_SM.to(tl.float64) + ones_SM.to(tl.float64)


@triton.jit
def _slots(slot, S, T, i_M, live_M, SLOTS: tl.constexpr):
    b_S = slot + tl.arange(0, SLOTS)
    return b_S.to(tl.int64)[:, None] * T + i_M[None, :], (b_S < S)[:, None] & live_M[None, :]


@triton.jit
def _factor(below):
    """exp(below) in fp64, 1 to the bit at 0, 0 below -87."""
    factor = tl.where(below == 0.0, 1.0, tl.exp(below))
    return tl.where(below < -87.0, 0.0, factor).to(tl.float64)
