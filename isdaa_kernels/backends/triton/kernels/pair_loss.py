"""The loss stage on GPUs in Triton, one launch a direction: csrc/pair_loss.h says what it computes, csrc/pair_loss_params.h what of.

N numbers of the policy, S sequences, P pairs, K pieces that a sequence is cut into for summing, T tokens and M pairs of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.pair_formulas import base_loss, log_weight
from isdaa_kernels.pair_loss import BASES, RECORD, SUMS, Packing, PairLossCall

_SLIC = tl.constexpr(BASES.index("slic"))
_SUMS = tl.constexpr(SUMS)
_TINY = tl.constexpr(2.2250738585072014e-308)


@triton.jit
def _piece(cu_seqlens, s, k, N, K):
    """The tokens of piece k of sequence s: all of it lies in [0, N)."""
    begin = tl.maximum(tl.load(cu_seqlens + s).to(tl.int64), 0)
    end = tl.minimum(tl.load(cu_seqlens + s + 1).to(tl.int64), N)
    length = (tl.maximum(end - begin, 0) + K - 1) // K
    begin += k * length
    return begin, tl.minimum(begin + length, end)


@triton.jit
def _add_tokens(sum_T, pointer, n_T, scored_T):
    return sum_T + tl.load(pointer + n_T, mask=scored_T, other=0.0).to(tl.float64)


@triton.jit
def _sum_of_row(sums, row_M, valid_M, K, which: tl.constexpr):
    total_M = tl.zeros(row_M.shape, tl.float64)
    for k in range(0, K):
        # past the first-level cache: another program wrote it
        total_M += tl.load(sums + (row_M * K + k) * _SUMS + which, mask=valid_M, other=0.0, cache_modifier=".cg")
    return total_M


@triton.jit
def _logprob_of_row(logprob, sums, row_M, valid_M, K, which: tl.constexpr, BY_TOKEN: tl.constexpr):
    if BY_TOKEN:  # noqa: SIM108
        total_M = _sum_of_row(sums, row_M, valid_M, K, which)
    else:
        total_M = tl.load(logprob + row_M, mask=valid_M, other=0.0).to(tl.float64)
    return total_M


@triton.jit
def _completion(
    policy, reference, behaviour, lengths, sums, row_M, here_M, S, K, PACKED: tl.constexpr, REFERENCE_BY_TOKEN: tl.constexpr,
    BEHAVIOUR_BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """(policy, reference, behaviour, length) of each row; NaN where there is no such row."""
    valid_M = here_M & (row_M >= 0) & (row_M < S)
    nan_M = tl.where(valid_M | ~here_M, 0.0, float("nan")).to(tl.float64)
    policy_M = _logprob_of_row(policy, sums, row_M, valid_M, K, 0, PACKED) + nan_M
    reference_M = _logprob_of_row(reference, sums, row_M, valid_M, K, 1, REFERENCE_BY_TOKEN)
    behaviour_M = reference_M
    if behaviour is not None:
        behaviour_M = _logprob_of_row(behaviour, sums, row_M, valid_M, K, 2, BEHAVIOUR_BY_TOKEN)
    length_M = tl.full(row_M.shape, 1.0, tl.float64)
    if PACKED:
        length_M = tl.where(valid_M, _sum_of_row(sums, row_M, valid_M, K, 3), length_M)
    elif lengths is not None:
        length_M = tl.load(lengths + row_M, mask=valid_M, other=1.0)
    return policy_M, reference_M, behaviour_M, length_M


@triton.jit
def _row_of(pairs, p_M, here_M, P, side: tl.constexpr):
    if pairs is None:  # noqa: SIM108
        row_M = p_M.to(tl.int64) + side * P
    else:
        row_M = tl.load(pairs + 2 * p_M + side, mask=here_M, other=0).to(tl.int64)
    return row_M


@triton.jit
def _term(terms, number, p_M, here_M, P, which: tl.constexpr):
    if terms is None:  # noqa: SIM108
        term_M = tl.full(p_M.shape, number, tl.float64)
    else:
        term_M = tl.load(terms + which * P + p_M, mask=here_M, other=1.0)
    return term_M


@triton.jit
def _keep(records, which: tl.constexpr, p_M, here_M, P, value_M):
    tl.store(records + which * P + p_M, value_M, mask=here_M)


@triton.jit
def _kept(records, which: tl.constexpr, p_M, here_M, P):
    return tl.load(records + which * P + p_M, mask=here_M, other=0.0)


# Rows of the records [RECORD, P]; those of an empty pair are 0 but for the weight.
_LOSS, _CHOSEN, _REJECTED, _LOG, _TOTAL, _W_CHOSEN, _W_REJECTED, _CLIPPED, _WEIGHT, _A, _B, _SAMPLE, _NONEMPTY = (
    tl.constexpr(i) for i in range(RECORD)
)


@triton.jit
def _enters_mean(records, p_M, here_M, P):
    log_M = _kept(records, _LOG, p_M, here_M, P)
    return (_kept(records, _NONEMPTY, p_M, here_M, P) != 0) & (log_M - log_M == 0)


@triton.jit
def _normalize(records, P, M: tl.constexpr):
    """Divides the weights by their mean over the pairs that enter it, whose number it returns; shifted by the largest logarithm."""
    m_M = tl.arange(0, M)
    peak = tl.max(tl.full((M,), -1e300, tl.float64), 0)
    for start in range(0, P, M):
        p_M = start + m_M
        here_M = p_M < P
        log_M = _kept(records, _LOG, p_M, here_M, P)
        peak = tl.maximum(peak, tl.max(tl.where(_enters_mean(records, p_M, here_M, P), log_M, -1e300), 0))
    total, entering = tl.sum(tl.zeros((M,), tl.float64), 0), tl.sum(tl.zeros((M,), tl.float64), 0)
    for start in range(0, P, M):
        p_M = start + m_M
        here_M = p_M < P
        enters_M = _enters_mean(records, p_M, here_M, P)
        shifted_M = tl.exp(tl.where(enters_M, _kept(records, _LOG, p_M, here_M, P) - peak, 0.0))
        total += tl.sum(tl.where(enters_M, shifted_M, 0.0), 0)
        entering += tl.sum(enters_M.to(tl.float64), 0)
    mean = total / tl.maximum(entering, 1.0)
    for start in range(0, P, M):
        p_M = start + m_M
        here_M = p_M < P
        nonempty_M = here_M & (_kept(records, _NONEMPTY, p_M, here_M, P) != 0)
        weight_M = tl.exp(_kept(records, _LOG, p_M, here_M, P) - peak) / mean
        _keep(records, _WEIGHT, p_M, nonempty_M, P, weight_M)
    return entering


@triton.jit
def _report(records, loss, metrics, denominator, P, M: tl.constexpr):
    """Writes loss and metrics; the sum of the weighted losses."""
    m_M = tl.arange(0, M)
    zero = tl.sum(tl.zeros((M,), tl.float64), 0)
    top, nan_weights = zero, zero
    for start in range(0, P, M):
        p_M = start + m_M
        here_M = p_M < P
        weight_M = tl.where(
            _kept(records, _NONEMPTY, p_M, here_M, P) != 0, _kept(records, _WEIGHT, p_M, here_M, P), 0.0
        )
        nan_weights += tl.sum((weight_M != weight_M).to(tl.float64), 0)
        top = tl.maximum(top, tl.max(tl.where(weight_M != weight_M, 0.0, weight_M), 0))
    top = tl.where(nan_weights > 0, float("nan"), top)
    unit = tl.where(top < _TINY, _TINY, top)
    count, losses, margins, right, chosen, rejected = zero, zero, zero, zero, zero, zero
    weights, clipped, vanished, totals, scaled, squares = zero, zero, zero, zero, zero, zero
    for start in range(0, P, M):
        p_M = start + m_M
        here_M = p_M < P
        full_M = _kept(records, _NONEMPTY, p_M, here_M, P) != 0
        a_M, b_M = _kept(records, _A, p_M, here_M, P), _kept(records, _B, p_M, here_M, P)
        weight_M = tl.where(full_M, _kept(records, _WEIGHT, p_M, here_M, P), 0.0)
        own_M = weight_M * _kept(records, _LOSS, p_M, here_M, P) * _kept(records, _SAMPLE, p_M, here_M, P)
        count += tl.sum(full_M.to(tl.float64), 0)
        losses += tl.sum(tl.where(full_M, own_M, 0.0), 0)
        margins += tl.sum(a_M - b_M, 0)
        right += tl.sum((a_M - b_M > 0).to(tl.float64), 0)
        chosen += tl.sum(a_M, 0)
        rejected += tl.sum(b_M, 0)
        weights += tl.sum(weight_M, 0)
        clipped += tl.sum(_kept(records, _CLIPPED, p_M, here_M, P), 0)
        vanished += tl.sum((full_M & (weight_M < 1e-3)).to(tl.float64), 0)
        totals += tl.sum(_kept(records, _TOTAL, p_M, here_M, P), 0)
        scaled_M = tl.where(full_M, weight_M / unit, 0.0)
        scaled += tl.sum(scaled_M, 0)
        squares += tl.sum(scaled_M * scaled_M, 0)
    n = tl.maximum(count, 1.0)
    ess = scaled * scaled / tl.where(squares < _TINY, _TINY, squares)
    tl.store(loss, (losses / denominator).to(tl.float32))
    tl.store(metrics + 0, (losses / n).to(tl.float32))
    tl.store(metrics + 1, (margins / n).to(tl.float32))
    tl.store(metrics + 2, (right / n).to(tl.float32))
    tl.store(metrics + 3, (chosen / n).to(tl.float32))
    tl.store(metrics + 4, (rejected / n).to(tl.float32))
    tl.store(metrics + 5, (weights / n).to(tl.float32))
    tl.store(metrics + 6, top.to(tl.float32))
    tl.store(metrics + 7, (clipped / n).to(tl.float32))
    tl.store(metrics + 8, (vanished / n).to(tl.float32))
    tl.store(metrics + 9, ess.to(tl.float32))
    tl.store(metrics + 10, (totals / n).to(tl.float32))
    tl.store(metrics + 11, (-(chosen / n + rejected / n) / 2.0).to(tl.float32))
    tl.store(metrics + 12, (P - count).to(tl.float32))
    return losses


@triton.jit
def _slopes(
    records, slope, total, entering, denominator, P, BASE: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, NORMALIZE: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    m_M = tl.arange(0, M)
    for start in range(0, P, M):
        p_M = start + m_M
        here_M = p_M < P
        full_M = _kept(records, _NONEMPTY, p_M, here_M, P) != 0
        weight_M = _kept(records, _WEIGHT, p_M, here_M, P)
        share_M = _kept(records, _SAMPLE, p_M, here_M, P) / denominator
        by_chosen_M, by_rejected_M = _kept(records, _CHOSEN, p_M, here_M, P), _kept(records, _REJECTED, p_M, here_M, P)
        active_M = full_M
        if BASE == _SLIC:  # a satisfied hinge has no gradient, be its weight NaN
            active_M = full_M & (by_chosen_M != 0)
        chosen_M = tl.where(active_M, share_M * weight_M * by_chosen_M, 0.0)
        rejected_M = tl.where(active_M, share_M * weight_M * by_rejected_M, 0.0)
        if WEIGHT_GRADIENT:
            by_weight_M = share_M * _kept(records, _LOSS, p_M, here_M, P)
            if NORMALIZE:
                shared = total / denominator / tl.maximum(entering, 1.0)
                by_weight_M -= tl.where(_enters_mean(records, p_M, here_M, P), shared, 0.0)
            log_chosen_M = _kept(records, _W_CHOSEN, p_M, here_M, P)
            log_rejected_M = _kept(records, _W_REJECTED, p_M, here_M, P)
            # a slope of 0 takes out even what is not finite
            chosen_M += tl.where(full_M & (log_chosen_M != 0), by_weight_M * weight_M * log_chosen_M, 0.0)
            rejected_M += tl.where(full_M & (log_rejected_M != 0), by_weight_M * weight_M * log_rejected_M, 0.0)
        tl.store(slope + p_M, chosen_M, mask=here_M)
        tl.store(slope + P + p_M, rejected_M, mask=here_M)


@triton.jit
def _record_pairs(
    policy, reference, behaviour, lengths, pairs, terms, sums, records, S, P, K,
    beta, label_smoothing, epsilon, floor, power, length_exponent,
    PACKED: tl.constexpr, REFERENCE_BY_TOKEN: tl.constexpr, BEHAVIOUR_BY_TOKEN: tl.constexpr, BASE: tl.constexpr, WEIGHTED: tl.constexpr,
    MODE: tl.constexpr, FLOOR: tl.constexpr, BY_LENGTH: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """All that each pair tells on its own."""
    m_M = tl.arange(0, M)
    for start in range(0, P, M):
        p_M = start + m_M
        here_M = p_M < P
        row_c_M, row_r_M = _row_of(pairs, p_M, here_M, P, 0), _row_of(pairs, p_M, here_M, P, 1)
        policy_c_M, reference_c_M, behaviour_c_M, n_a_M = _completion(
            policy, reference, behaviour, lengths, sums, row_c_M, here_M, S, K, PACKED, REFERENCE_BY_TOKEN, BEHAVIOUR_BY_TOKEN,
        )  # fmt: skip
        policy_r_M, reference_r_M, behaviour_r_M, n_b_M = _completion(
            policy, reference, behaviour, lengths, sums, row_r_M, here_M, S, K, PACKED, REFERENCE_BY_TOKEN, BEHAVIOUR_BY_TOKEN,
        )  # fmt: skip
        full_M = here_M & (n_a_M > 0) & (n_b_M > 0)
        a_M = tl.where(full_M, policy_c_M - reference_c_M, 0.0)
        b_M = tl.where(full_M, policy_r_M - reference_r_M, 0.0)
        n_a_M, n_b_M = tl.where(full_M, n_a_M, 1.0), tl.where(full_M, n_b_M, 1.0)
        beta_M, smoothing_M = _term(terms, beta, p_M, here_M, P, 0), _term(terms, label_smoothing, p_M, here_M, P, 1)
        loss_M, chosen_M, rejected_M = base_loss(a_M, b_M, n_a_M, n_b_M, beta_M, smoothing_M, BASE)
        _keep(records, _LOSS, p_M, here_M, P, loss_M)
        _keep(records, _CHOSEN, p_M, here_M, P, chosen_M)
        _keep(records, _REJECTED, p_M, here_M, P, rejected_M)
        log_M, total_M = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float64)
        w_chosen_M, w_rejected_M, clipped_M = log_M, log_M, log_M
        if WEIGHTED:
            ratio_c_M = tl.where(full_M, policy_c_M - behaviour_c_M, 0.0)
            ratio_r_M = tl.where(full_M, policy_r_M - behaviour_r_M, 0.0)
            log_M, total_M, w_chosen_M, w_rejected_M, bites_M = log_weight(
                ratio_c_M, ratio_r_M, n_a_M, n_b_M, epsilon, floor, power, length_exponent, MODE, FLOOR, BY_LENGTH
            )
            clipped_M = (bites_M & full_M).to(tl.float64)
        _keep(records, _LOG, p_M, here_M, P, log_M)
        _keep(records, _TOTAL, p_M, here_M, P, total_M)
        _keep(records, _W_CHOSEN, p_M, here_M, P, w_chosen_M)
        _keep(records, _W_REJECTED, p_M, here_M, P, w_rejected_M)
        _keep(records, _CLIPPED, p_M, here_M, P, clipped_M)
        _keep(records, _WEIGHT, p_M, here_M, P, tl.exp(log_M))
        _keep(records, _A, p_M, here_M, P, a_M)
        _keep(records, _B, p_M, here_M, P, b_M)
        _keep(records, _SAMPLE, p_M, here_M, P, _term(terms, 1.0, p_M, here_M, P, 2))
        _keep(records, _NONEMPTY, p_M, here_M, P, full_M.to(tl.float64))


@triton.jit
def _sum_tokens(
    policy, reference, behaviour, cu_seqlens, targets, sums, N, K, ignore_index, REFERENCE_BY_TOKEN: tl.constexpr,
    BEHAVIOUR_BY_TOKEN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """sums[s, k] = {policy, reference, behaviour, scored tokens} of the program's piece."""
    s, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = _piece(cu_seqlens, s, k, N, K)
    policy_T, reference_T = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
    behaviour_T, count_T = tl.zeros((T,), tl.float64), tl.zeros((T,), tl.float64)
    for first in range(begin, end, T):
        n_T = first + tl.arange(0, T)
        scored_T = n_T < end
        if targets is not None:
            scored_T = scored_T & (tl.load(targets + n_T, mask=n_T < end, other=0).to(tl.int64) != ignore_index)
        policy_T = _add_tokens(policy_T, policy, n_T, scored_T)
        if REFERENCE_BY_TOKEN:
            reference_T = _add_tokens(reference_T, reference, n_T, scored_T)
        if BEHAVIOUR_BY_TOKEN:
            behaviour_T = _add_tokens(behaviour_T, behaviour, n_T, scored_T)
        count_T += scored_T.to(tl.float64)
    place = sums + (s * K + k) * _SUMS
    tl.store(place, tl.sum(policy_T, 0))
    tl.store(place + 1, tl.sum(reference_T, 0))
    tl.store(place + 2, tl.sum(behaviour_T, 0))
    tl.store(place + 3, tl.sum(count_T, 0))


@triton.jit
def pair_loss_forward_kernel(
    policy, reference, behaviour, cu_seqlens, targets, lengths, pairs, terms,  # PairLossCall; those that are not there None
    sums, records, counter,  # workspace: fp64 [S, K, SUMS], fp64 [RECORD, P], int32 [1] that holds 0
    slope, loss, metrics,
    N, S, P, K, ignore_index,
    beta: tl.float64, label_smoothing: tl.float64, denominator: tl.float64,
    epsilon: tl.float64, floor: tl.float64, power: tl.float64, length_exponent: tl.float64,
    PACKED: tl.constexpr, REFERENCE_BY_TOKEN: tl.constexpr, BEHAVIOUR_BY_TOKEN: tl.constexpr, BASE: tl.constexpr, WEIGHTED: tl.constexpr,
    MODE: tl.constexpr, FLOOR: tl.constexpr, BY_LENGTH: tl.constexpr, NORMALIZE: tl.constexpr, DETACH: tl.constexpr, T: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Every program sums a piece of a sequence; the one that comes last works on the pairs. Grid: (S, K), or (1, 1) where not PACKED."""
    last = True
    if PACKED:
        _sum_tokens(
            policy, reference, behaviour, cu_seqlens, targets, sums, N, K, ignore_index, REFERENCE_BY_TOKEN, BEHAVIOUR_BY_TOKEN, T,
        )  # fmt: skip
        tl.debug_barrier()  # all threads have written before the program is counted
        last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1
    if last:
        if terms is not None:
            denominator = tl.load(terms + 3 * P)
        _record_pairs(
            policy, reference, behaviour, lengths, pairs, terms, sums, records, S, P, K, beta, label_smoothing, epsilon, floor, power,
            length_exponent, PACKED, REFERENCE_BY_TOKEN, BEHAVIOUR_BY_TOKEN, BASE, WEIGHTED, MODE, FLOOR, BY_LENGTH, M,
        )  # fmt: skip
        tl.debug_barrier()
        entering = 0.0
        if NORMALIZE:
            entering = _normalize(records, P, M)
            tl.debug_barrier()
        total = _report(records, loss, metrics, denominator, P, M)
        _slopes(records, slope, total, entering, denominator, P, BASE, WEIGHTED and not DETACH, NORMALIZE, M)


@triton.jit
def _clear(out, begin, end, T: tl.constexpr):
    for first in range(begin, end, T):
        n_T = first + tl.arange(0, T)
        tl.store(out + n_T, tl.zeros((T,), out.dtype.element_ty), mask=n_T < end)


@triton.jit
def pair_loss_backward_kernel(
    grad, slope, cu_seqlens, targets, pairs, out, N, S, P, K, ignore_index, PACKED: tl.constexpr, T: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """out[n] = grad * slope of the sequence of n, over its pairs; 0 where the target is ignored. Grid: (S, K)."""
    s, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if pairs is None:
        total = tl.load(slope + s)
    else:
        total_M = tl.zeros((M,), tl.float64)
        for start in range(0, 2 * P, M):
            i_M = start + tl.arange(0, M)
            own_M = (i_M < 2 * P) & (tl.load(pairs + i_M, mask=i_M < 2 * P, other=-1).to(tl.int64) == s)
            total_M += tl.load(slope + i_M % 2 * P + i_M // 2, mask=own_M, other=0.0)
        total = tl.sum(total_M, 0)
    total = tl.where(total == 0, 0.0, total * tl.load(grad).to(tl.float64))  # 0 is no gradient, be the upstream one inf
    if PACKED:
        if (s == 0) & (k == 0):  # tokens before the first sequence and behind the last
            _clear(out, 0, tl.minimum(tl.load(cu_seqlens).to(tl.int64), N), T)
            _clear(out, tl.maximum(tl.load(cu_seqlens + S).to(tl.int64), 0), N, T)
        begin, end = _piece(cu_seqlens, s, k, N, K)
        for first in range(begin, end, T):
            n_T = first + tl.arange(0, T)
            value_T = tl.full((T,), 0.0, tl.float64) + total
            if targets is not None:
                value_T = tl.where(
                    tl.load(targets + n_T, mask=n_T < end, other=0).to(tl.int64) != ignore_index, value_T, 0.0
                )
            tl.store(out + n_T, value_T.to(out.dtype.element_ty), mask=n_T < end)
    else:
        tl.store(out + s, total.to(out.dtype.element_ty))


_T, _M = 1024, 128
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # said outright: versions of Triton differ in their default


def forward(call: PairLossCall) -> tuple[Tensor, Tensor, Tensor]:
    packing, numbers = call.packing, call.numbers
    packed = packing.cu_seqlens is not None and packing.n_sequences > 0
    K, S, P = packing.pieces(), packing.n_sequences, packing.n_pairs
    loss, metrics, slope = call.outputs()
    new = lambda size: torch.empty(size, dtype=torch.float64, device=slope.device)  # noqa: E731
    terms = call.terms if P else None
    pair_loss_forward_kernel[(S, K) if packed else (1, 1)](
        call.policy, call.reference, call.behaviour, packing.cu_seqlens, packing.targets, call.lengths, packing.pairs, terms,
        new(S * K * SUMS) if packed else None,
        new(P * RECORD),
        torch.zeros(1, dtype=torch.int32, device=slope.device) if packed else None,
        slope, loss, metrics,
        packing.N, S, P, K, packing.ignore_index,
        numbers.beta, numbers.label_smoothing, call.denominator,
        numbers.epsilon, numbers.floor, numbers.power, numbers.length_exponent,
        PACKED=packed,
        REFERENCE_BY_TOKEN=packed and call.reference.ndim == 1,
        BEHAVIOUR_BY_TOKEN=packed and call.behaviour is not None and call.behaviour.ndim == 1,
        BASE=numbers.base,
        WEIGHTED=numbers.weighted,
        MODE=numbers.mode,
        FLOOR=numbers.floor > 0,
        BY_LENGTH=numbers.length_exponent > 0,
        NORMALIZE=numbers.normalize and numbers.weighted,
        DETACH=numbers.detach,
        T=_T,
        M=_M,
        **OPTIONS,
    )  # fmt: skip
    return loss, metrics, slope


def backward(packing: Packing, grad: Tensor, slope: Tensor, like: Tensor) -> Tensor:
    out = torch.empty(packing.N, dtype=like.dtype, device=like.device)
    K, S, P = packing.pieces(), packing.n_sequences, packing.n_pairs
    if S == 0 or P == 0:
        return out.zero_()
    pair_loss_backward_kernel[(S, K)](
        grad, slope, packing.cu_seqlens, packing.targets, packing.pairs, out, packing.N, S, P, K, packing.ignore_index,
        PACKED=packing.cu_seqlens is not None, T=_T, M=_M, **OPTIONS,
    )  # fmt: skip
    return out
