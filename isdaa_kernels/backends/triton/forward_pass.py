"""Forward of the Triton backend: slabs of tokens, each folded tile by tile into partial log-sum-exps.

N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk of the library's products, D hidden size, V vocabulary.
"""

import torch
import triton
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.logits import fold_logits_kernel
from isdaa_kernels.backends.triton.kernels.products import linear_logprob_forward_kernel
from isdaa_kernels.backends.triton.partials import Partials, outputs
from isdaa_kernels.backends.triton.plan import (
    FOLD_ROWS,
    LOGITS_TILE,
    choose_products,
    fold_slots,
    forward_shape,
    make_plan,
    product_dtype,
)
from isdaa_kernels.backends.triton.slabs import (
    OPTIONS,
    Head,
    HiddenSlab,
    LiveTokens,
    clean_targets,
    fused_arguments,
    on,
    padded_rows,
    programs,
)
from isdaa_kernels.backends.triton.top_k import NAMES, TopK, add_products, library_logits
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest
from isdaa_kernels.targets import report_bad_targets


def forward(
    problem: Problem,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    stats: StatsRequest,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make_plan(problem)  # a workspace that is too small raises here, not in the backward
    report_bad_targets(targets_N, problem.V, ignore_index, problem.N)
    scored_N = targets_N != ignore_index
    live = LiveTokens(scored_N, problem.N)
    logprob_N, stats_SN, lse_N = outputs(scored_N, stats)
    with on(hidden_ND.device):
        sweep = _Sweep(problem, hidden_ND, weight_VD, transform, live, stats)
        targets_N = clean_targets(targets_N, problem.V)
        for first in live.slabs(sweep.T):
            sweep.run(first, targets_N, logprob_N, lse_N, stats_SN)
        if sweep.top_k is not None:
            sweep.top_k.write(stats_SN)
    return logprob_N, stats_SN, lse_N, hidden_ND.new_empty(0, problem.V, dtype=torch.float32)


class _Sweep:
    """The buffers of a call, and what happens to one slab."""

    def __init__(self, problem, hidden_ND, weight_VD, transform, live, stats):
        self.problem, self.weight_VD, self.live, self.stats = problem, weight_VD, live, stats
        self.head = Head(transform)
        self.T, self.C = forward_shape(problem)
        self.fused = choose_products(problem) == "fused"
        self.tile = self.head.tile(problem, weight_VD, "forward")
        self.hidden = HiddenSlab(hidden_ND, live, self.T, product_dtype(problem))
        slots = fold_slots(problem, self.tile)
        self.partials = Partials(self.T, slots, stats, hidden_ND.device)
        self.top_k = TopK(stats, live, self.head) if stats.wants(*NAMES) else None

    def run(self, first: int, targets_N: Tensor, logprob_N: Tensor, lse_N: Tensor, stats_SN: Tensor) -> None:
        rows_T = padded_rows(self.live, first, self.T)
        targets_T = targets_N.index_select(0, rows_T)
        inverse_T = self.head.inverse_temperature(rows_T)
        hidden_TD = self.hidden.load(first)
        token = {
            "targets": targets_T,
            "inverse_temperature": inverse_T,
            "count": self.live.count,
            "first": first,
            "T": self.T,
        }
        (self._fused if self.fused else self._library)(hidden_TD, token)
        self.partials.combine(targets_T, self.live, first, self.problem.V, logprob_N, lse_N, stats_SN)
        if self.top_k is not None:
            add_products(self.top_k, hidden_TD, self.weight_VD, inverse_T, first, lse_N)

    def _fused(self, hidden_TD: Tensor, token: dict) -> None:
        tiles = triton.cdiv(self.T, self.tile.M) * triton.cdiv(self.problem.V, self.tile.N)
        linear_logprob_forward_kernel[programs(self.tile, tiles, hidden_TD.device)](
            bias=self.head.bias_V, **token, **self.head.scalars, **self.head.flags, **self.partials.arguments(),
            **fused_arguments(self.tile, hidden_TD, self.weight_VD),
        )  # fmt: skip

    def _library(self, hidden_TD: Tensor, token: dict) -> None:
        for begin, logits_TC in library_logits(hidden_TD, self.weight_VD, self.C):
            C = logits_TC.shape[1]
            fold_logits_kernel[(triton.cdiv(self.T, FOLD_ROWS), triton.cdiv(C, LOGITS_TILE))](
                logits_TC, None, self.head.bias_V, begin=begin, end=begin + C, stride_n=logits_TC.stride(0), stride_v=1,
                GATHER=False, M=FOLD_ROWS, N=LOGITS_TILE, **token, **self.head.scalars, **self.head.flags,
                **self.partials.arguments(), **OPTIONS,
            )  # fmt: skip
