"""Log-probs, statistics and gradients of logits that the caller holds: one read each, no copy.

N tokens, T tokens of a slab, V vocabulary.
"""

import torch
import triton
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.logits import fold_logits_kernel, gradient_logits_kernel
from isdaa_kernels.backends.triton.partials import Partials, outputs
from isdaa_kernels.backends.triton.plan import FOLD_ROWS, GRADIENT_COLUMNS, GRADIENT_ROWS, LOGITS_TILE, SLAB_TOKENS
from isdaa_kernels.backends.triton.slabs import (
    OPTIONS,
    Head,
    LiveTokens,
    clean_targets,
    on,
    padded_rows,
)
from isdaa_kernels.backends.triton.top_k import COLUMNS, NAMES, ROWS, TopK
from isdaa_kernels.backends.triton.upstream import Upstream
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest, TokenGradient
from isdaa_kernels.targets import report_bad_targets


def forward_logits(
    problem: Problem, logits_NV: Tensor, targets_N: Tensor, transform: Transform, ignore_index: int, stats: StatsRequest
) -> tuple[Tensor, Tensor, Tensor]:
    report_bad_targets(targets_N, problem.V, ignore_index, problem.N)
    scored_N = targets_N != ignore_index
    live = LiveTokens(scored_N, problem.N)
    logprob_N, stats_SN, lse_N = outputs(scored_N, stats)
    head, targets_N = Head(transform), clean_targets(targets_N, problem.V)
    with on(logits_NV.device):
        T = min(SLAB_TOKENS[0], max(problem.N, 1))
        partials = Partials(T, triton.cdiv(problem.V, LOGITS_TILE), stats, logits_NV.device)
        top_k = TopK(stats, live, head) if stats.wants(*NAMES) else None
        for first in live.slabs(T):
            rows_T = padded_rows(live, first, T)
            targets_T, inverse_T = targets_N.index_select(0, rows_T), head.inverse_temperature(rows_T)
            fold_logits_kernel[(triton.cdiv(T, FOLD_ROWS), triton.cdiv(problem.V, LOGITS_TILE))](
                logits_NV, live.rows_M, None, targets_T, inverse_T, live.count, first=first, T=T, begin=0, end=problem.V,
                stride_n=logits_NV.stride(0), stride_v=logits_NV.stride(1), GATHER=True, M=FOLD_ROWS, N=LOGITS_TILE,
                **partials.arguments(), **head.scalars, **head.flags, **OPTIONS,
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
        upstream = Upstream(grad, everyone, head, logprob_N, lse_N, None)
        tokens = upstream.tokens(0, N, everyone.rows_M)
        gradient_logits_kernel[(triton.cdiv(N, GRADIENT_ROWS), triton.cdiv(V, GRADIENT_COLUMNS))](
            logits_NV, out_NV, None, clean_targets(targets_N, V), tokens, None, live_N.to(torch.uint8), T=N, begin=0, end=V,
            stride_n=logits_NV.stride(0), stride_v=logits_NV.stride(1), stride_out_n=out_NV.stride(0),
            stride_out_v=out_NV.stride(1), BIAS_SUMS=False, TARGET=True, M=GRADIENT_ROWS, N=GRADIENT_COLUMNS,
            **upstream.flags(), **head.scalars, **head.flags, **OPTIONS,
        )  # fmt: skip
