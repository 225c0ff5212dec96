"""The definition, in plain PyTorch on any device: forward and hand-written backward over chunks of tokens.

N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.reference.routed import RoutedGradient, block_logsumexp
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest, TokenGradient
from isdaa_kernels.targets import bad_targets, report_bad_targets
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

_CHUNK_MIB = 32  # of logits, when no workspace is given
_COPIES = 4  # logits, transformed logits, probabilities and their gradient at once


def refusal(problem: Problem) -> str | None:
    return None


def describe() -> str:
    return "plain PyTorch, any device"


def make_plan(problem: Problem) -> Plan:
    size = problem.compute_dtype.itemsize
    row = _COPIES * problem.V * size
    fixed = size * problem.V * problem.D * (problem.weight_dtype != problem.compute_dtype)
    if problem.need_weight:
        fixed += size * problem.V * problem.D  # one product beside the accumulated d_weight
        fixed += size * problem.V * problem.D * (problem.weight_dtype != problem.compute_dtype)
    budget = _COPIES * _CHUNK_MIB * MIB if problem.max_workspace_mb is None else problem.max_workspace_mb * MIB - fixed
    if problem.max_workspace_mb is not None and budget < row:
        raise refuse_budget(problem.max_workspace_mb, fixed + row)
    tokens = max(1, min(problem.N, int(budget // row)))
    units = 2.0 + problem.need_hidden + problem.need_weight
    return Plan("reference", tokens, problem.V, ceil_div(problem.N, tokens), 0, False, fixed + tokens * row, units)


def forward(problem, hidden_ND, weight_VD, targets_N, transform: Transform, ignore_index: int, stats: StatsRequest):
    weight = weight_VD.to(problem.compute_dtype)
    load = lambda rows_C: _product(hidden_ND, weight, transform, rows_C)  # noqa: E731
    numbers = _fold(problem, load, targets_N, transform, ignore_index, stats)
    if problem.routed is None:
        return *numbers, hidden_ND.new_empty(0, problem.V, dtype=problem.compute_dtype)
    routed = problem.routed
    block_lse_BN = hidden_ND.new_zeros(routed.blocks(problem.V), len(targets_N), dtype=problem.compute_dtype)
    for rows_C in _chunks(targets_N != ignore_index, problem):
        z_CV, _ = _transform(load(rows_C), transform, rows_C)
        order = slice(None) if transform.order_V is None else transform.order_V
        block_lse_BN[:, rows_C] = block_logsumexp(z_CV[:, order], routed.block).T
    return *numbers, block_lse_BN


def forward_logits(problem, logits_NV, targets_N, transform: Transform, ignore_index: int, stats: StatsRequest):
    load = lambda rows_C: logits_NV[rows_C].to(problem.compute_dtype)  # noqa: E731  (the gather is a copy)
    return _fold(problem, load, targets_N, transform, ignore_index, stats)


def _fold(problem: Problem, load, targets_N, transform, ignore_index, stats) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, stats, lse) over chunks of tokens; `load(rows_C)` gives their logits before the transform, which it may overwrite."""
    dtype = problem.compute_dtype
    scored_N = targets_N != ignore_index
    bad_N = _bad(targets_N, problem, ignore_index)
    logprob_N = targets_N.new_zeros(len(targets_N), dtype=dtype)
    lse_N = targets_N.new_zeros(len(targets_N), dtype=torch.float64)
    stats_SN = targets_N.new_zeros(len(stats.names), len(targets_N), dtype=dtype)
    for rows_C in _chunks(scored_N, problem):
        z_CV, _ = _transform(load(rows_C), transform, rows_C)
        top_C, exp_CV, sum_C = _exponentials(z_CV)
        lse_C = top_C.double() + sum_C.log()
        target_C = targets_N[rows_C].clamp(0, problem.V - 1).long()
        z_C = z_CV.gather(1, target_C[:, None])[:, 0]
        logprob_N[rows_C] = ((z_C.double() - top_C.double()) - sum_C.log()).to(dtype)
        lse_N[rows_C] = lse_C
        for s, name in enumerate(stats.names):
            value_C = _statistic(name, stats.top_k, z_CV, z_C, top_C, exp_CV, sum_C)
            stats_SN[s, rows_C] = value_C.to(dtype)
    nan = float("nan")
    logprob_N = torch.where(scored_N, logprob_N.masked_fill(bad_N, nan), 0)
    for s, name in enumerate(stats.names):
        bad = 0.0 if name == "is_top1" else nan
        stats_SN[s] = torch.where(scored_N, stats_SN[s].masked_fill(bad_N, bad), 0)
    return logprob_N, stats_SN, lse_N.masked_fill(bad_N, nan)


def _statistic(name: str, top_k: int, z_CV, z_C, top_C, exp_CV, sum_C) -> Tensor:
    """One row of the statistics, [C]; z_C the target's logit, exp_CV = exp(z - top), sum_C its fp64 sum."""
    if name == "lse":
        return top_C.double() + sum_C.log()
    if name == "mean_logit":
        return z_CV.sum(-1, dtype=torch.float64) / z_CV.shape[1]
    if name == "log_sum_sq_prob":
        return (exp_CV * exp_CV).sum(-1, dtype=torch.float64).log() - 2 * sum_C.log()
    if name == "is_top1":
        return (z_C >= z_CV.amax(-1)) & ~sum_C.isnan()
    if name == "entropy":
        below_CV = top_C[:, None] - z_CV
        return sum_C.log() + exp_CV.mul(below_CV.masked_fill_(exp_CV == 0, 0)).sum(-1, dtype=torch.float64) / sum_C
    log_p_Ck = (
        z_CV.topk(min(top_k, z_CV.shape[1]), sorted=False).values.double() - top_C.double()[:, None]
    ) - sum_C.log()[:, None]
    p_Ck = log_p_Ck.exp()
    return p_Ck.sum(-1) if name == "top_k_mass" else -(p_Ck * log_p_Ck.masked_fill(p_Ck == 0, 0)).sum(-1)


def backward(
    problem, grad, hidden_ND, weight_VD, targets_N, transform, ignore_index, logprob_N, lse_N, kept_KV, need_bias
):
    dtype = problem.compute_dtype
    d_hidden_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format) if problem.need_hidden else None
    d_weight_VD = hidden_ND.new_zeros(weight_VD.shape, dtype=dtype) if problem.need_weight else None
    d_bias_V = hidden_ND.new_zeros(problem.V, dtype=dtype) if need_bias else None
    weight = weight_VD.to(dtype)
    active_N = (targets_N != ignore_index) & grad.active()
    routed = None
    if problem.routed is not None:
        routed = _routed(problem, grad, hidden_ND, weight, targets_N, transform, active_N, logprob_N, lse_N, kept_KV)
    for rows_C in _chunks(active_N, problem):
        skip_C1 = ~active_N[rows_C, None]
        hidden_CD = hidden_ND[rows_C].to(dtype).masked_fill_(skip_C1, 0)
        x_CV = _product(hidden_ND, weight, transform, rows_C)
        if routed is None:
            g_CV = _logit_gradient(grad.select(rows_C), x_CV, targets_N, transform, lse_N, rows_C)
            for_hidden_CV = for_weight_CV = g_CV.masked_fill_(skip_C1, 0)
        else:
            z_CV, slope_CV = _transform(x_CV, transform, rows_C)
            order = slice(None) if transform.order_V is None else transform.order_V
            for_hidden_CV, for_weight_CV = (
                torch.empty_like(x_CV).index_copy_(1, torch.arange(problem.V, device=x_CV.device)[order], g_CV)
                .mul_(slope_CV).masked_fill_(skip_C1, 0)
                for g_CV in routed.logit_gradients(z_CV[:, order], rows_C)
            )  # fmt: skip
        if d_hidden_ND is not None:
            d_hidden_ND[rows_C] = (for_hidden_CV @ weight).to(d_hidden_ND.dtype)
        if d_weight_VD is not None:
            d_weight_VD += for_weight_CV.T @ hidden_CD
        if d_bias_V is not None:
            d_bias_V += for_weight_CV.sum(0)
    if d_weight_VD is not None:
        d_weight_VD = d_weight_VD.to(weight_VD.dtype)
    if d_bias_V is not None:
        d_bias_V = d_bias_V.to(transform.bias_V.dtype)
    return d_hidden_ND, d_weight_VD, d_bias_V


def _routed(problem, grad, hidden_ND, weight, targets_N, transform, active_N, logprob_N, lse_N, block_lse_BN):
    routed = RoutedGradient(problem, grad, transform.placed(targets_N), active_N, logprob_N, lse_N, block_lse_BN.T)
    order = slice(None) if transform.order_V is None else transform.order_V
    for rows_C in _chunks(active_N, problem):
        z_CV, _ = _transform(_product(hidden_ND, weight, transform, rows_C), transform, rows_C)
        routed.collect(z_CV[:, order], rows_C)
    routed.finish_means()
    return routed


def backward_logits(problem, grad, logits_NV, out_NV, targets_N, transform, ignore_index, logprob_N, lse_N) -> None:
    active_N = (targets_N != ignore_index) & grad.active()
    for rows_C in _chunks(active_N, problem):
        x_CV = logits_NV[rows_C].to(problem.compute_dtype)
        g_CV = _logit_gradient(grad.select(rows_C), x_CV, targets_N, transform, lse_N, rows_C)
        out_NV[rows_C] = g_CV.to(out_NV.dtype)
    out_NV.masked_fill_(~active_N[:, None], 0)


def _logit_gradient(grad: TokenGradient, x_CV, targets_N, transform, lse_N, rows_C) -> Tensor:
    """The formula of TokenGradient, times dz/dx, of the tokens `rows_C` whose coefficients `grad` holds. Overwrites x_CV."""
    z_CV, slope_CV = _transform(x_CV, transform, rows_C)
    target_C1 = targets_N[rows_C].clamp(0, z_CV.shape[1] - 1).long()[:, None]
    grad = grad.map(lambda term_C: term_C.to(z_CV.dtype)[:, None])
    log_p_CV = _minus_lse(z_CV, lse_N[rows_C, None])
    log_p_C1 = log_p_CV.gather(1, target_C1)
    if grad.prob_N is None and grad.flat_N is None:
        g_CV = log_p_CV.exp_().mul_(-grad.logprob_N)
    else:
        g_CV = _statistics_gradient(grad, log_p_CV).sub_(log_p_CV.exp_().mul_(grad.logprob_N))
    entry_C1 = -log_p_C1.expm1() * grad.logprob_N  # 1 - p of the target keeps its digits when p is near 1
    if grad.prob_N is not None or grad.flat_N is not None:
        entry_C1 = entry_C1 + _statistics_gradient(grad, log_p_C1)
    return g_CV.scatter_(1, target_C1, entry_C1).mul_(slope_CV)


def _statistics_gradient(grad: TokenGradient, log_p_CV: Tensor) -> Tensor:
    """p * (prob + log_prob * log p) + flat; where p = 0 the first term is 0."""
    p_CV = log_p_CV.exp()
    factor = 0.0 if grad.prob_N is None else grad.prob_N
    if grad.log_prob_N is not None:
        factor = log_p_CV.masked_fill(p_CV == 0, 0).mul_(grad.log_prob_N).add_(factor)
    p_CV.mul_(factor)
    return p_CV if grad.flat_N is None else p_CV.add_(grad.flat_N)


def compact(scored_N: Tensor, count: int) -> Tensor:
    """Indices [count] of the scored tokens in their order, the ignored ones behind them: a stable compaction without a sync."""
    return torch.sort(~scored_N, stable=True).indices[:count]


def _chunks(scored_N: Tensor, problem: Problem) -> list[Tensor]:
    rows = scored_N.nonzero()[:, 0] if scored_N.device.type == "cpu" else compact(scored_N, problem.N)
    return [chunk for chunk in rows.split(make_plan(problem).token_tile) if len(chunk)]


def _product(hidden_ND, weight_VD, transform: Transform, rows_C) -> Tensor:
    """hidden @ weight.T + bias of the tokens `rows_C`."""
    x_CV = hidden_ND[rows_C].to(weight_VD.dtype) @ weight_VD.T
    return x_CV if transform.bias_V is None else x_CV.add_(transform.bias_V.to(x_CV.dtype))


def _transform(x_CV: Tensor, transform: Transform, rows_C) -> tuple[Tensor, Tensor]:
    """z [C, V], in the memory of x_CV where that goes, and dz/dx, broadcastable to it; the bias is in x already."""
    x_CV *= transform.logit_scale
    slope = x_CV.new_full((1, 1), transform.logit_scale)
    if transform.softcap is not None:
        tanh_CV = (x_CV / transform.softcap).tanh_()
        x_CV, slope = tanh_CV * transform.softcap, slope * (1 - tanh_CV * tanh_CV)
    inverse = transform.inverse_temperature(rows_C, x_CV.dtype)
    inverse = inverse if isinstance(inverse, float) else inverse[:, None]
    return x_CV.mul_(inverse), slope * inverse


def _exponentials(z_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(top_C, exp(z - top) [C, V], its sum in fp64): an fp64 log-sum-exp without an fp64 copy of the logits, as the maximum is exact."""
    top_C = z_CV.amax(-1)
    top_C = torch.where(top_C == float("-inf"), 0.0, top_C)
    exp_CV = (z_CV - top_C[:, None]).exp_()
    return top_C, exp_CV, exp_CV.sum(-1, dtype=torch.float64)


def _minus_lse(z_CV: Tensor, lse_C1: Tensor) -> Tensor:
    """z - lse with both halves of the fp64 lse, in the dtype of z and in its memory."""
    high_C1 = lse_C1.to(z_CV.dtype)
    return z_CV.sub_(high_C1).sub_((lse_C1 - high_C1).to(z_CV.dtype))


def _bad(targets_N: Tensor, problem: Problem, ignore_index: int) -> Tensor:
    """bool [N], all False on the CPU, which raises at once; on a device those tokens become NaN and `check` tells of the targets."""
    report_bad_targets(targets_N, problem.V, ignore_index, problem.N)
    bad_N = bad_targets(targets_N, problem.V, ignore_index)
    if targets_N.device.type == "cpu":
        return bad_N
    scored_N = targets_N != ignore_index
    return bad_N | (scored_N & (scored_N.cumsum(0) > problem.N))
