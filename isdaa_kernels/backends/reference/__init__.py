"""The definition, in plain PyTorch on any device: forward and hand-written backward over chunks of tokens.

N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

import torch
from torch import Tensor

from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.targets import bad_targets, raise_bad_targets, record_bad_targets, scored_rows
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


def forward(problem, hidden_ND, weight_VD, targets_N, transform: Transform, ignore_index: int):
    dtype = problem.compute_dtype
    scored_N = targets_N != ignore_index
    bad_N = _bad(targets_N, problem, ignore_index)
    logprob_N = hidden_ND.new_zeros(len(targets_N), dtype=dtype)
    lse_N = hidden_ND.new_zeros(len(targets_N), dtype=torch.float64)
    weight_VD = weight_VD.to(dtype)
    for rows_C in _chunks(scored_N, problem):
        z_CV, _ = _final_logits(hidden_ND, weight_VD, transform, rows_C)
        lse_C = _logsumexp64(z_CV)
        target_C = targets_N[rows_C].clamp(0, problem.V - 1).long()
        z_C = z_CV.gather(1, target_C[:, None])[:, 0]
        logprob_N[rows_C] = (z_C.double() - lse_C).to(dtype)
        lse_N[rows_C] = lse_C
    nan = float("nan")
    logprob_N = torch.where(scored_N, logprob_N.masked_fill(bad_N, nan), 0)
    return logprob_N, lse_N.masked_fill(bad_N, nan), hidden_ND.new_empty(0, problem.V, dtype=dtype)


def backward(problem, grad_N, hidden_ND, weight_VD, targets_N, transform, ignore_index, lse_N, kept, need_bias):
    dtype = problem.compute_dtype
    d_hidden_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format) if problem.need_hidden else None
    d_weight_VD = hidden_ND.new_zeros(weight_VD.shape, dtype=dtype) if problem.need_weight else None
    d_bias_V = hidden_ND.new_zeros(problem.V, dtype=dtype) if need_bias else None
    weight = weight_VD.to(dtype)
    active_N = (targets_N != ignore_index) & (grad_N != 0)
    for rows_C in _chunks(active_N, problem):
        skip_C1 = ~active_N[rows_C, None]
        hidden_CD = hidden_ND[rows_C].to(dtype).masked_fill_(skip_C1, 0)
        g_CV = _logit_gradient(grad_N, hidden_ND, weight, targets_N, transform, lse_N, rows_C).masked_fill_(skip_C1, 0)
        if d_hidden_ND is not None:
            d_hidden_ND[rows_C] = (g_CV @ weight).to(d_hidden_ND.dtype)
        if d_weight_VD is not None:
            d_weight_VD += g_CV.T @ hidden_CD
        if d_bias_V is not None:
            d_bias_V += g_CV.sum(0)
    if d_weight_VD is not None:
        d_weight_VD = d_weight_VD.to(weight_VD.dtype)
    if d_bias_V is not None:
        d_bias_V = d_bias_V.to(transform.bias_V.dtype)
    return d_hidden_ND, d_weight_VD, d_bias_V


def _logit_gradient(grad_N, hidden_ND, weight_VD, targets_N, transform, lse_N, rows_C) -> Tensor:
    """grad * (onehot - p) * dz/dx of the tokens `rows_C`, x being the product."""
    z_CV, slope_CV = _final_logits(hidden_ND, weight_VD, transform, rows_C)
    target_C1 = targets_N[rows_C].clamp(0, weight_VD.shape[0] - 1).long()[:, None]
    log_p_CV = _minus_lse(z_CV, lse_N[rows_C, None])
    entry_C1 = -log_p_CV.gather(1, target_C1).expm1_()  # 1 - p of the target keeps its digits when p is near 1
    g_CV = log_p_CV.exp_().neg_().scatter_(1, target_C1, entry_C1) * slope_CV
    return g_CV.mul_(grad_N[rows_C, None].to(g_CV.dtype))


def compact(scored_N: Tensor, count: int) -> Tensor:
    """Indices [count] of the scored tokens in their order, the ignored ones behind them: a stable compaction without a sync."""
    return torch.sort(~scored_N, stable=True).indices[:count]


def _chunks(scored_N: Tensor, problem: Problem) -> list[Tensor]:
    rows = scored_N.nonzero()[:, 0] if scored_N.device.type == "cpu" else compact(scored_N, problem.N)
    return [chunk for chunk in rows.split(make_plan(problem).token_tile) if len(chunk)]


def _final_logits(hidden_ND, weight_VD, transform: Transform, rows_C) -> tuple[Tensor, Tensor]:
    """z [C, V] and dz / d(product), broadcastable to it."""
    x_CV = hidden_ND[rows_C].to(weight_VD.dtype) @ weight_VD.T
    if transform.bias_V is not None:
        x_CV += transform.bias_V.to(x_CV.dtype)
    x_CV *= transform.logit_scale
    slope = x_CV.new_full((1, 1), transform.logit_scale)
    if transform.softcap is not None:
        tanh_CV = (x_CV / transform.softcap).tanh_()
        x_CV, slope = tanh_CV * transform.softcap, slope * (1 - tanh_CV * tanh_CV)
    inverse = transform.inverse_temperature(rows_C, x_CV.dtype)
    inverse = inverse if isinstance(inverse, float) else inverse[:, None]
    return x_CV.mul_(inverse), slope * inverse


def _logsumexp64(z_CV: Tensor) -> Tensor:
    """fp64 log-sum-exp without an fp64 copy of the logits: the maximum is exact, the exponentials are summed in fp64."""
    top_C = z_CV.amax(-1)
    top_C = torch.where(top_C == float("-inf"), 0.0, top_C)
    return top_C.double() + (z_CV - top_C[:, None]).exp_().sum(-1, dtype=torch.float64).log()


def _minus_lse(z_CV: Tensor, lse_C1: Tensor) -> Tensor:
    """z - lse with both halves of the fp64 lse, in the dtype of z and in its memory."""
    high_C1 = lse_C1.to(z_CV.dtype)
    return z_CV.sub_(high_C1).sub_((lse_C1 - high_C1).to(z_CV.dtype))


def _bad(targets_N: Tensor, problem: Problem, ignore_index: int) -> Tensor:
    """bool [N], all False on the CPU, which raises at once; on a device those tokens become NaN and `check` tells of the targets."""
    bad_N = bad_targets(targets_N, problem.V, ignore_index)
    if targets_N.device.type == "cpu":
        raise_bad_targets(targets_N, problem.V, ignore_index)
        scored_rows(targets_N, ignore_index, problem.N)
        return bad_N
    record_bad_targets(bad_N, targets_N)
    scored_N = targets_N != ignore_index
    return bad_N | (scored_N & (scored_N.cumsum(0) > problem.N))
