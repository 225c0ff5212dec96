"""Log-probs, statistics and gradients of logits that the caller holds: one read each, no copy.

N tokens, T tokens of a slab, V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import Kernels
from isdaa_kernels.backends.gpu.partials import Partials, outputs
from isdaa_kernels.backends.gpu.plan import SLAB_TOKENS
from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens, clean_targets, padded_rows
from isdaa_kernels.backends.gpu.top_k import COLUMNS, NAMES, ROWS, TopK
from isdaa_kernels.backends.gpu.upstream import Upstream
from isdaa_kernels.dispatch import Problem, on
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest, TokenGradient
from isdaa_kernels.targets import report_bad_targets
from isdaa_kernels.workspace import ceil_div


def forward_logits(
    kernels: Kernels,
    problem: Problem,
    logits_NV: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    stats: StatsRequest,
) -> tuple[Tensor, Tensor, Tensor]:
    report_bad_targets(targets_N, problem.V, ignore_index, problem.N)
    scored_N = targets_N != ignore_index
    live = LiveTokens(scored_N, problem.N)
    logprob_N, stats_SN, lse_N = outputs(scored_N, stats)
    head, targets_N = Head(transform), clean_targets(targets_N, problem.V)
    with on(logits_NV.device):
        T, columns = min(SLAB_TOKENS[0], max(problem.N, 1)), kernels.fold_columns(problem)
        partials = Partials(kernels, T, ceil_div(problem.V, columns), stats, logits_NV.device)
        top_k = TopK(stats, live, head) if stats.wants(*NAMES) else None
        for first in live.slabs(T):
            rows_T = padded_rows(live, first, T)
            targets_T, inverse_T = targets_N.index_select(0, rows_T), head.inverse_temperature(rows_T)
            kernels.fold_logits(
                logits=logits_NV, rows=live.rows_M, bias=None, targets=targets_T, inverse_temperature=inverse_T, count=live.count,
                first=first, begin=0, end=problem.V, columns=columns, **partials.tensors, **head.scalars,
            )  # fmt: skip
            partials.combine(targets_T, live, first, problem.V, logprob_N, lse_N, stats_SN)
            if top_k is not None:
                _add_logits(top_k, logits_NV, inverse_T, first, min(T, live.capacity - first), lse_N)
        if top_k is not None:
            top_k.write(stats_SN)
    return logprob_N, stats_SN, lse_N


def _add_logits(top_k: TopK, logits_NV: Tensor, inverse_T: Tensor, first: int, count: int, lse_N: Tensor) -> None:
    for a in range(0, count, ROWS):
        b = min(a + ROWS, count)
        rows_R = top_k.live.rows_M[first + a : first + b]
        chunks = (
            (begin, logits_NV[:, begin : begin + COLUMNS].index_select(0, rows_R).float())
            for begin in range(0, logits_NV.shape[1], COLUMNS)
        )
        top_k.add(first + a, chunks, inverse_T[a:b], lse_N)


def backward_logits(
    kernels: Kernels,
    problem: Problem,
    grad: TokenGradient,
    logits_NV: Tensor,
    out_NV: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    logprob_N: Tensor,
    lse_N: Tensor,
) -> None:
    N, V = logits_NV.shape
    if N == 0:
        return
    live_N = (targets_N != ignore_index) & grad.active()
    everyone, head = LiveTokens(torch.ones_like(live_N), N), Head(transform)  # rows without gradient are written too
    with on(logits_NV.device):
        upstream = Upstream(kernels, grad, everyone, head, logprob_N, lse_N, None)
        tokens = upstream.tokens(0, N, everyone.rows_M)
        kernels.gradient_logits(
            logits=logits_NV, out=out_NV, bias=None, targets=clean_targets(targets_N, V), tokens=tokens, bias_sums=None,
            live=live_N.to(torch.uint8), begin=0, end=V, target_entry=True, **upstream.flags(), **head.scalars,
        )  # fmt: skip
