"""Kernels whose work goes by token: gathering, the end of the log-sum-exp, coefficients of the backward, the end of the gradients.

T tokens of a slab, M of them a program, C vocabulary rows of a chunk, K a step along the hidden size D, V vocabulary, B slots of
partial results.
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.tiles import narrow


@triton.jit
def gather_kernel(
    hidden, rows, count, scale, out, first, T, D, stride_n, stride_d, stride_out, SCALED: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """out[i] = hidden[rows[first + i]] * scale[i], 0 past the count. Grid: (cdiv(T, M), cdiv(D, K))."""
    i_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (i_M < T) & (first + i_M < tl.load(count))
    d_K = tl.program_id(1) * K + tl.arange(0, K)
    n_M = tl.load(rows + first + i_M, mask=live_M, other=0)
    source_MK = hidden + n_M[:, None] * stride_n + d_K.to(tl.int64)[None, :] * stride_d
    x_MK = tl.load(source_MK, mask=live_M[:, None] & (d_K < D)[None, :], other=0.0)
    if SCALED:
        x_MK = x_MK.to(tl.float32) * tl.load(scale + i_M, mask=i_M < T, other=1.0)[:, None]
    place_MK = i_M.to(tl.int64)[:, None] * stride_out + d_K[None, :]
    tl.store(out + place_MK, x_MK.to(out.dtype.element_ty), mask=(i_M < T)[:, None] & (d_K < D)[None, :])


@triton.jit
def combine_kernel(
    partial_max, partial_sum, partial_entropy, partial_total, partial_squares,  # [B, T]
    target_logit, targets,  # [T]
    rows, count,
    logprob, lse,  # [N], in token order
    entropy, lse_stat, mean_logit, log_sum_sq, is_top1,  # fp32 [N], or None where not asked for
    first, T, V, B,
    ENTROPY: tl.constexpr, LSE: tl.constexpr, TOTAL: tl.constexpr, SQUARES: tl.constexpr, TOP1: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The partial results of each token in one order of their slots, summed in fp64; NaN where the target is no vocabulary row."""
    i_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (i_M < T) & (first + i_M < tl.load(count))
    target_M = tl.load(targets + i_M, mask=live_M, other=-1)
    target_logit_M = tl.load(target_logit + i_M, mask=live_M, other=0.0)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    for slot in range(0, B, SLOTS):
        b_S = slot + tl.arange(0, SLOTS)
        place_SM = b_S.to(tl.int64)[:, None] * T + i_M[None, :]
        mask_SM = (b_S < B)[:, None] & live_M[None, :]
        top_M = tl.maximum(top_M, tl.max(tl.load(partial_max + place_SM, mask=mask_SM, other=float("-inf")), 0))
    shift_M = tl.where(top_M == float("-inf"), 0.0, top_M)
    sum_M = tl.zeros((M,), tl.float64)
    entropy_M, total_M, squares_M = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64)
    for slot in range(0, B, SLOTS):
        b_S = slot + tl.arange(0, SLOTS)
        place_SM = b_S.to(tl.int64)[:, None] * T + i_M[None, :]
        mask_SM = (b_S < B)[:, None] & live_M[None, :]
        max_SM = tl.load(partial_max + place_SM, mask=mask_SM, other=float("-inf"))
        part_SM = tl.load(partial_sum + place_SM, mask=mask_SM, other=0.0)
        below_SM = max_SM - shift_M[None, :]
        factor_SM = tl.where(below_SM == 0.0, 1.0, tl.exp(below_SM)).to(tl.float64)
        sum_M += tl.sum(factor_SM * part_SM, 0)
        if ENTROPY:
            above_SM = tl.where(max_SM == float("-inf"), 0.0, -below_SM).to(tl.float64)
            spread_SM = tl.load(partial_entropy + place_SM, mask=mask_SM, other=0.0).to(tl.float64)
            entropy_M += tl.sum(factor_SM * (spread_SM + above_SM * part_SM), 0)
        if TOTAL:
            total_M += tl.sum(tl.load(partial_total + place_SM, mask=mask_SM, other=0.0).to(tl.float64), 0)
        if SQUARES:
            squares_SM = tl.load(partial_squares + place_SM, mask=mask_SM, other=0.0).to(tl.float64)
            squares_M += tl.sum(factor_SM * factor_SM * squares_SM, 0)
    nan_M = tl.where((target_M >= 0) & (target_M < V), 0.0, float("nan")).to(tl.float64)
    log_sum_M = tl.log(sum_M) + nan_M
    n_M = tl.load(rows + first + i_M, mask=live_M, other=0)
    lse_M = shift_M.to(tl.float64) + log_sum_M
    tl.store(
        logprob + n_M,
        ((target_logit_M.to(tl.float64) - shift_M.to(tl.float64)) - log_sum_M).to(tl.float32),
        mask=live_M,
    )
    tl.store(lse + n_M, lse_M, mask=live_M)
    if ENTROPY:
        tl.store(entropy + n_M, (log_sum_M + entropy_M / sum_M).to(tl.float32), mask=live_M)
    if LSE:
        tl.store(lse_stat + n_M, lse_M.to(tl.float32), mask=live_M)
    if TOTAL:
        tl.store(mean_logit + n_M, (total_M / V + nan_M).to(tl.float32), mask=live_M)
    if SQUARES:
        tl.store(log_sum_sq + n_M, (tl.log(squares_M) - 2.0 * log_sum_M).to(tl.float32), mask=live_M)
    if TOP1:
        tl.store(is_top1 + n_M, tl.where((target_logit_M >= top_M) & (log_sum_M == log_sum_M), 1.0, 0.0), mask=live_M)


@triton.jit
def power_of_two(exponent):
    """fp64 2 ** exponent for -1022 <= exponent <= 1023, exact."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(x):
    """floor(log2 x) of positive finite fp32 numbers; of 0 it is -150."""
    bits = (x * 4294967296.0).to(tl.int32, bitcast=True)  # 2 ** 32: no number stays subnormal
    raised = ((bits >> 23) & 0xFF) - 127 - 32
    plain = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    return tl.where(x == 0.0, -150, tl.where(x < 1.0, raised, plain))


@triton.jit
def token_kernel(
    rows, count, top,
    logprob_gradient, prob_gradient, log_prob_gradient, flat_gradient,  # fp32 [N], all but the first may be None
    logprob, lse,  # fp32, fp64 [N]
    inverse_temperature,  # fp32 [T]
    out,  # fp32 [10, T] or None
    weight_entry,  # fp32 [T] or None
    first, T, logit_scale, softcap,
    PROB: tl.constexpr, LOG_PROB: tl.constexpr, FLAT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LEAST: tl.constexpr,
    SHIFT: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr, ENTRY: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Coefficients of the backward, scaled by powers of two so that 16-bit numbers hold them.

    A token's largest coefficient, times the slope of z, is below 2 ** (e + 1), that of the call below 2 ** (top + 1). The hidden
    state is scaled by 2 ** r, the gradient of its logits by 2 ** (q + SHIFT - e), with r + q = e - top and r >= LEAST: then their
    product is in units of 2 ** (top - SHIFT) for all tokens alike. `out` holds the inverse temperature, 2 ** -r, the two halves of
    lse, the three coefficients of `tiles.gradient`, 2 ** r, the target's own entry, and the exponent that d_hidden is multiplied by.
    Without SCALED all coefficients stay as they are.
    """
    i_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (i_M < T) & (first + i_M < tl.load(count))
    n_M = tl.load(rows + first + i_M, mask=live_M, other=0)
    g_M = tl.load(logprob_gradient + n_M, mask=live_M, other=0.0)
    prob_M, log_prob_M, flat_M = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    if PROB:
        prob_M = tl.load(prob_gradient + n_M, mask=live_M, other=0.0)
    if LOG_PROB:
        log_prob_M = tl.load(log_prob_gradient + n_M, mask=live_M, other=0.0)
    if FLAT:
        flat_M = tl.load(flat_gradient + n_M, mask=live_M, other=0.0)
    largest_M = tl.maximum(tl.maximum(tl.abs(g_M), tl.abs(prob_M)), tl.maximum(tl.abs(log_prob_M), tl.abs(flat_M)))
    inverse_M = tl.load(inverse_temperature + i_M, mask=live_M, other=1.0)
    largest_M *= tl.abs(logit_scale) * inverse_M  # the slope of z at most
    sum_M = g_M + prob_M + log_prob_M + flat_M
    top_exponent = tl.load(top)
    finite_M = (tl.abs(sum_M) < float("inf")) & (largest_M < float("inf"))
    e_M = tl.minimum(tl.where(finite_M, exponent_of(tl.where(finite_M, largest_M, 0.0)), top_exponent), top_exponent)
    r_M = tl.maximum(e_M - top_exponent, LEAST)
    scale_M = power_of_two(SHIFT - top_exponent - r_M)  # q + SHIFT - e
    if not SCALED:
        r_M, scale_M = tl.zeros((M,), tl.int32), tl.full((M,), 1.0, tl.float64)
    logprob_M = tl.load(logprob + n_M, mask=live_M, other=0.0).to(tl.float64)
    lse_M = tl.load(lse + n_M, mask=live_M, other=0.0)
    p_M = tl.exp(logprob_M)
    rest_M = tl.where(logprob_M > -1e-4, -logprob_M * (1.0 + logprob_M * (0.5 + logprob_M / 6.0)), 1.0 - p_M)
    entry_M = g_M * rest_M + p_M * prob_M + flat_M
    if LOG_PROB:
        entry_M += tl.where(p_M > 0, p_M * log_prob_M * logprob_M, 0.0)
    entry_M *= logit_scale * inverse_M
    if HAS_SOFTCAP:
        tanh_M = (logprob_M + lse_M) / (softcap * inverse_M)
        entry_M *= 1.0 - tanh_M * tanh_M
    entry_M = tl.where(live_M, entry_M, 0.0)
    if ENTRY:
        tl.store(weight_entry + i_M, (entry_M * power_of_two(SHIFT - top_exponent)).to(tl.float32), mask=i_M < T)
    if TILE:
        out_M, inside_M = out + i_M, i_M < T
        high_M = lse_M.to(tl.float32)
        tl.store(out_M, inverse_M, mask=inside_M)
        tl.store(out_M + T, power_of_two(-r_M).to(tl.float32), mask=inside_M)
        tl.store(out_M + 2 * T, high_M, mask=inside_M)
        tl.store(out_M + 3 * T, (lse_M - high_M.to(tl.float64)).to(tl.float32), mask=inside_M)
        tl.store(out_M + 4 * T, ((prob_M.to(tl.float64) - g_M) * scale_M).to(tl.float32), mask=inside_M)
        tl.store(out_M + 5 * T, (log_prob_M * scale_M).to(tl.float32), mask=inside_M)
        tl.store(out_M + 6 * T, (flat_M * scale_M).to(tl.float32), mask=inside_M)
        tl.store(out_M + 7 * T, power_of_two(r_M).to(tl.float32), mask=inside_M)
        tl.store(out_M + 8 * T, (entry_M * scale_M).to(tl.float32), mask=inside_M)
        tl.store(out_M + 9 * T, (top_exponent + r_M - SHIFT).to(tl.float32), mask=inside_M)


@triton.jit
def scale_by_power(x, exponent):
    """x * 2 ** exponent in two steps: the power itself may be no fp32 number."""
    half = exponent >> 1
    return x * power_of_two(half).to(tl.float32) * power_of_two(exponent - half).to(tl.float32)


@triton.jit
def finish_hidden_kernel(
    sums, tokens, targets, weight, rows, count, d_hidden, first, T, D, V, stride_sums, stride_weight_v, stride_weight_d,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """d_hidden[rows[first + i]] = (sums[i] + the target's entry * weight[target]) * the token's power of two.

    Grid: (cdiv(T, M), cdiv(D, K)).
    """
    i_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (i_M < T) & (first + i_M < tl.load(count))
    d_K = tl.program_id(1) * K + tl.arange(0, K)
    mask_MK = live_M[:, None] & (d_K < D)[None, :]
    target_M = tl.load(targets + i_M, mask=live_M, other=0)
    row_M = tl.where((target_M >= 0) & (target_M < V), target_M, 0).to(tl.int64)
    weight_MK = weight + row_M[:, None] * stride_weight_v + d_K.to(tl.int64)[None, :] * stride_weight_d
    x_MK = tl.load(sums + i_M.to(tl.int64)[:, None] * stride_sums + d_K[None, :], mask=mask_MK, other=0.0)
    entry_M = tl.load(tokens + 8 * T + i_M, mask=live_M, other=0.0)
    x_MK += entry_M[:, None] * tl.load(weight_MK, mask=mask_MK, other=0.0).to(tl.float32)
    x_MK = scale_by_power(x_MK, tl.load(tokens + 9 * T + i_M, mask=live_M, other=0.0).to(tl.int32)[:, None])
    n_M = tl.load(rows + first + i_M, mask=live_M, other=0)
    tl.store(d_hidden + n_M[:, None] * D + d_K[None, :], narrow(x_MK, d_hidden.dtype.element_ty), mask=mask_MK)


@triton.jit
def finish_weight_kernel(
    sums, order, starts, targets, rows, weight_entry, hidden, top, d_weight,
    mean, rest,  # fp32 [V], [B, D], or None
    vocab_order,  # int64 [V] or None
    begin, C, D, stride_sums, stride_n, stride_d, shift,
    REST: tl.constexpr, ORDER: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """d_weight[begin + c] = (sums[c] + sum of entry * hidden over the tokens whose target is begin + c) * 2 ** (top - shift).

    REST adds mean[begin + c] * rest[its block of BLOCK rows], what a routed backward did not recompute. ORDER: begin + c is a place in
    the order of the blocks, the row is vocab_order[begin + c].

    `order` lists the tokens by target, `targets` theirs in that order, `starts` where each vocabulary row begins in it: every sum has
    one order, without atomics. R rows at once, as a product of their tokens' entries [R, M] with hidden [M, K].
    Grid: (cdiv(C, R), cdiv(D, K)).
    """
    first = tl.program_id(0) * R
    c_R = first + tl.arange(0, R)
    d_K = tl.program_id(1) * K + tl.arange(0, K)
    mask_RK = (c_R < C)[:, None] & (d_K < D)[None, :]
    x_RK = tl.load(sums + c_R.to(tl.int64)[:, None] * stride_sums + d_K[None, :], mask=mask_RK, other=0.0)
    begin_token, end_token = tl.load(starts + begin + first), tl.load(starts + begin + tl.minimum(first + R, C))
    for step in range(begin_token, end_token, M):
        place_M = step + tl.arange(0, M)
        here_M = place_M < end_token
        i_M = tl.load(order + place_M, mask=here_M, other=0)
        entry_M = tl.load(weight_entry + i_M, mask=here_M, other=0.0)
        row_M = tl.load(targets + place_M, mask=here_M, other=-1)
        n_M = tl.load(rows + i_M, mask=here_M, other=0)
        hidden_MK = hidden + n_M[:, None] * stride_n + d_K.to(tl.int64)[None, :] * stride_d
        h_MK = tl.load(hidden_MK, mask=here_M[:, None] & (d_K < D)[None, :], other=0.0).to(tl.float32)
        entry_RM = tl.where((begin + c_R)[:, None] == row_M[None, :], entry_M[None, :], 0.0)
        x_RK = tl.dot(entry_RM, h_MK, x_RK, input_precision="ieee")
    if REST:  # R divides BLOCK: the rows of a program share one
        rest_K = tl.load(rest + ((begin + first) // BLOCK).to(tl.int64) * D + d_K, mask=d_K < D, other=0.0)
        x_RK += tl.load(mean + begin + c_R, mask=c_R < C, other=0.0)[:, None] * rest_K[None, :]
    x_RK = scale_by_power(x_RK, tl.load(top) - shift)
    row_R = (begin + c_R).to(tl.int64)
    if ORDER:
        row_R = tl.load(vocab_order + row_R, mask=c_R < C, other=0)
    place_RK = row_R[:, None] * D + d_K[None, :]
    tl.store(d_weight + place_RK, narrow(x_RK, d_weight.dtype.element_ty), mask=mask_RK)
