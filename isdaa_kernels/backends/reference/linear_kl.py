"""`linear_kl` by definition, in plain PyTorch on any device: forward and hand-written backward over chunks of tokens.

N tokens, D hidden size (E that of the reference), V vocabulary, C tokens of a chunk. p, q, m: the probabilities of policy, reference and
mixture, r = log(p / q).
"""

import math

import torch
from torch import Tensor

from isdaa_kernels.backends.reference import _bad, _exponentials, _minus_lse, _product, _transform, compact
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.divergence import KlGradient, Model
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

_CHUNK_MIB = 32  # of logits of one head, when no workspace is given
_COPIES = 14  # matrices as large as a chunk's logits, at once
_SMALL = 0.5  # beyond it exp(x) - 1 - x cancels little
_TERMS = 18  # of its series within


def make_plan(problem: Problem) -> Plan:
    size, divergence = problem.compute_dtype.itemsize, problem.divergence
    widened = problem.D * (problem.weight_dtype != problem.compute_dtype)
    widened += divergence.reference_D * (divergence.reference_weight_dtype != problem.compute_dtype)
    if problem.need_weight:
        widened += problem.D * (1 + (problem.weight_dtype != problem.compute_dtype))
    row, fixed = _COPIES * problem.V * size, problem.V * widened * size
    budget = _COPIES * _CHUNK_MIB * MIB if problem.max_workspace_mb is None else problem.max_workspace_mb * MIB - fixed
    if problem.max_workspace_mb is not None and budget < row:
        raise refuse_budget(problem.max_workspace_mb, fixed + row)
    tokens = max(1, min(problem.N, int(budget // row)))
    products = 1 + divergence.reference_D / problem.D
    work = problem.need_hidden + problem.need_weight
    units = products * (1 + (work > 0)) + work
    return Plan("reference", tokens, problem.V, ceil_div(problem.N, tokens), 0, False, fixed + tokens * row, units)


def forward(
    problem: Problem, policy: Model, reference: Model, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    scored_N, bad_N = targets_N != ignore_index, _bad(targets_N, problem, ignore_index)
    value_N = policy.hidden_ND.new_zeros(len(targets_N), dtype=problem.compute_dtype)
    numbers_4N = policy.hidden_ND.new_zeros(4, len(targets_N), dtype=torch.float64)
    logprob_2N = value_N.new_zeros(2 if problem.divergence.logprobs else 0, len(targets_N))
    safe_N = targets_N.clamp(0, problem.V - 1).long()
    for rows_C, zp_CV, zq_CV, _ in _logits(problem, policy, reference, scored_N):
        lse_p_C, lse_q_C = _lse(zp_CV), _lse(zq_CV)
        if problem.divergence.logprobs:
            at_target_2C = torch.stack([z_CV.gather(1, safe_N[rows_C, None])[:, 0] for z_CV in (zp_CV, zq_CV)])
            logprob_2N[:, rows_C] = (at_target_2C - torch.stack([lse_p_C, lse_q_C])).to(logprob_2N.dtype)
        r_CV = _log_ratio(zp_CV, zq_CV, (lse_p_C - lse_q_C)[:, None])
        p_CV, q_CV = _minus_lse(zp_CV, lse_p_C[:, None]).exp_(), _minus_lse(zq_CV, lse_q_C[:, None]).exp_()
        value_C, mean_C = _divergence(problem, p_CV, q_CV, r_CV)
        value_N[rows_C] = value_C.to(value_N.dtype)
        numbers_4N[:, rows_C] = torch.stack([lse_p_C, lse_q_C, lse_p_C - lse_q_C, mean_C])
    value_N, logprob_2N = (torch.where(scored_N, x.masked_fill(bad_N, float("nan")), 0) for x in (value_N, logprob_2N))
    numbers_4N[0].masked_fill_(bad_N, float("nan"))
    return value_N, numbers_4N, logprob_2N


def backward(
    problem: Problem,
    grad: KlGradient,
    policy: Model,
    reference: Model,
    targets_N: Tensor,
    ignore_index: int,
    numbers_4N: Tensor,
    logprob_2N: Tensor,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype, (hidden_ND, weight_VD, transform) = problem.compute_dtype, policy
    d_hidden_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format) if problem.need_hidden else None
    d_weight_VD = hidden_ND.new_zeros(weight_VD.shape, dtype=dtype) if problem.need_weight else None
    d_bias_V = hidden_ND.new_zeros(problem.V, dtype=dtype) if need_bias else None
    active_N = (targets_N != ignore_index) & grad.active()
    safe_N = targets_N.clamp(0, problem.V - 1).long()
    weight = weight_VD.to(dtype)
    for rows_C, zp_CV, zq_CV, slope in _logits(problem, policy, reference, active_N):
        skip_C1 = ~active_N[rows_C, None]
        log_p_CV = None if grad.logprob_N is None else _minus_lse(zp_CV.clone(), numbers_4N[0, rows_C, None])
        g_CV = _logit_gradient(problem, zp_CV, zq_CV, numbers_4N[:, rows_C, None])
        of_divergence_C1, of_logprob_C1 = (None if x is None else x[rows_C, None].to(dtype) for x in grad)
        g_CV = g_CV.mul_(of_divergence_C1).masked_fill_(of_divergence_C1 == 0, 0)  # g may be infinite
        if log_p_CV is not None:
            # onehot - p, 1 - p with the digits that it has near p = 1
            at_target_CV = torch.zeros_like(g_CV, dtype=torch.bool).scatter_(1, safe_N[rows_C, None], True)
            g_CV -= of_logprob_C1 * torch.where(at_target_CV, log_p_CV.expm1(), log_p_CV.exp())
        g_CV = g_CV.mul_(slope).masked_fill_(skip_C1, 0)
        if d_hidden_ND is not None:
            d_hidden_ND[rows_C] = (g_CV @ weight).to(d_hidden_ND.dtype)
        if d_weight_VD is not None:
            d_weight_VD += g_CV.T @ hidden_ND[rows_C].to(dtype).masked_fill_(skip_C1, 0)
        if d_bias_V is not None:
            d_bias_V += g_CV.sum(0)
    if d_weight_VD is not None:
        d_weight_VD = d_weight_VD.to(weight_VD.dtype)
    if d_bias_V is not None:
        d_bias_V = d_bias_V.to(transform.bias_V.dtype)
    return d_hidden_ND, d_weight_VD, d_bias_V


def _logits(problem: Problem, policy: Model, reference: Model, wanted_N: Tensor):
    """Yields (rows, policy's logits, reference's logits, dz/dx of the policy) of the tokens wanted, chunk by chunk."""
    weights = [model.weight_VD.to(problem.compute_dtype) for model in (policy, reference)]
    rows_N = wanted_N.nonzero()[:, 0] if wanted_N.device.type == "cpu" else compact(wanted_N, problem.N)
    for rows_C in rows_N.split(make_plan(problem).token_tile):
        if len(rows_C):
            (zp_CV, slope), (zq_CV, _) = (
                _transform(_product(model.hidden_ND, weight, model.transform, rows_C), model.transform, rows_C)
                for model, weight in zip((policy, reference), weights, strict=True)
            )
            yield rows_C, zp_CV, zq_CV, slope


def _lse(z_CV: Tensor) -> Tensor:
    top_C, _, sum_C = _exponentials(z_CV)
    return top_C.double() + sum_C.log()


def _divergence(problem: Problem, p_CV: Tensor, q_CV: Tensor, r_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(the divergence, what its gradient subtracts) in fp64. The latter is a plain mean: where p = 1 it is log(p / m) to the bit."""
    direction, weight = problem.divergence.direction, problem.divergence.jsd_weight
    if direction == "forward":
        value_C = _sum(q_CV, p_CV, r_CV)
        return value_C, value_C
    if direction == "reverse":
        return _sum(p_CV, q_CV, -r_CV), _mean(p_CV, r_CV)
    m_CV = (1 - weight) * p_CV + weight * q_CV
    over_p_CV, over_q_CV = _mixture(r_CV, weight)
    value_C = (1 - weight) * _sum(p_CV, m_CV, over_p_CV) + weight * _sum(q_CV, m_CV, over_q_CV)
    return value_C, -_mean(p_CV, over_p_CV)


def _mean(p_CV: Tensor, x_CV: Tensor) -> Tensor:
    return (p_CV * x_CV.masked_fill(p_CV == 0, 0)).sum(-1, dtype=torch.float64)


def _log_ratio(zp_CV: Tensor, zq_CV: Tensor, gap_C1: Tensor) -> Tensor:
    """(zp - zq) - gap, with what the difference rounds off: two heads' logits may lie far apart and yet mean the same."""
    difference_CV = zp_CV - zq_CV
    back_CV = difference_CV - zp_CV
    rest_CV = (zp_CV - (difference_CV - back_CV)).sub_(back_CV.add_(zq_CV)).nan_to_num_(nan=0.0)
    return _minus_lse(difference_CV, gap_C1).add_(rest_CV)


def _sum(b_CV: Tensor, o_CV: Tensor, x_CV: Tensor) -> Tensor:
    """sum of b (exp(x) - 1 - x), x = log(o / b): KL(b || o)."""
    large_CV = o_CV - (b_CV + b_CV * x_CV)
    terms_CV = torch.where(x_CV.abs() <= _SMALL, b_CV * _small_excess(x_CV), large_CV)
    return torch.where(b_CV == 0, o_CV, terms_CV).sum(-1, dtype=torch.float64)


def _small_excess(x_CV: Tensor) -> Tensor:
    """exp(x) - 1 - x for |x| <= 1/2."""
    x_CV = x_CV.clamp(-_SMALL, _SMALL)
    sum_CV = torch.full_like(x_CV, 1 / math.factorial(_TERMS))
    for k in range(_TERMS - 1, 1, -1):
        sum_CV.mul_(x_CV).add_(1 / math.factorial(k))
    return sum_CV.mul_(x_CV).mul_(x_CV)


def _mixture(r_CV: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(log(m / p), log(m / q)) from r = log(p / q): log(m / max(p, q)), of which neither part cancels, less what is between them."""
    size_CV, up_CV = r_CV.abs(), r_CV >= 0
    weight, rest = (r_CV.new_tensor(value) for value in (weight, 1 - weight))
    lesser_CV, greater_CV = torch.where(up_CV, weight, rest), torch.where(up_CV, rest, weight)
    near_CV, far_CV = (lesser_CV * (-size_CV).expm1()).log1p(), (greater_CV + lesser_CV * (-size_CV).exp()).log()
    log_m_CV = torch.where(size_CV <= _SMALL, near_CV, far_CV)
    return torch.where(up_CV, log_m_CV, log_m_CV - r_CV), torch.where(up_CV, log_m_CV + r_CV, log_m_CV)


def _logit_gradient(problem: Problem, zp_CV: Tensor, zq_CV: Tensor, numbers_4C1: Tensor) -> Tensor:
    """The formulas of the docstring of `linear_kl`. Overwrites zp and zq."""
    direction, weight = problem.divergence.direction, problem.divergence.jsd_weight
    lse_p_C1, lse_q_C1, gap_C1, mean_C1 = numbers_4C1
    r_CV = _log_ratio(zp_CV, zq_CV, gap_C1)
    p_CV = _minus_lse(zp_CV, lse_p_C1).exp_()
    if direction == "forward":
        q_CV = _minus_lse(zq_CV, lse_q_C1).exp_()
        return torch.where(r_CV.abs() <= _SMALL, q_CV * r_CV.expm1(), p_CV - q_CV)
    mean_C1 = mean_C1.to(p_CV.dtype)
    if direction == "reverse":
        return torch.where(p_CV == 0, 0, p_CV * (r_CV - mean_C1))
    over_p_CV, _ = _mixture(r_CV, weight)
    return torch.where(p_CV == 0, 0, (weight - 1) * p_CV * (over_p_CV + mean_C1))
