"""Forward: slabs of tokens, each folded tile by tile into partial log-sum-exps.

N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk of the library's products, D hidden size, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.call import Call
from isdaa_kernels.backends.gpu.kernels import Kernels
from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.partials import Partials, outputs
from isdaa_kernels.backends.gpu.plan import fold_slots, forward_shape, make_plan, slot_columns
from isdaa_kernels.backends.gpu.slabs import Head, HiddenSlab, LiveTokens, clean_targets, padded_rows
from isdaa_kernels.backends.gpu.top_k import NAMES, TopK, add_products
from isdaa_kernels.backends.gpu.weight_rows import WeightRows
from isdaa_kernels.dispatch import Problem, on
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest
from isdaa_kernels.targets import report_bad_targets


def forward(
    kernels: Kernels,
    problem: Problem,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    stats: StatsRequest,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call.of(kernels, problem, weight_VD, transform)
    make_plan(kernels, problem, call.aligned)  # a workspace that is too small raises here, not in the backward
    report_bad_targets(targets_N, problem.V, ignore_index, problem.N)
    scored_N = targets_N != ignore_index
    live = LiveTokens(scored_N, problem.N)
    logprob_N, stats_SN, lse_N = outputs(scored_N, stats)
    with on(hidden_ND.device):
        sweep = _Sweep(call, hidden_ND, weight_VD, transform, live, stats)
        targets_N = clean_targets(targets_N if transform.order_V is None else transform.placed(targets_N), problem.V)
        for first in live.slabs(sweep.T):
            sweep.run(first, targets_N, logprob_N, lse_N, stats_SN)
        if sweep.top_k is not None:
            sweep.top_k.write(stats_SN)
    kept = sweep.log_mass_BN
    return logprob_N, stats_SN, lse_N, hidden_ND.new_empty(0, problem.V, dtype=torch.float32) if kept is None else kept


class _Sweep:
    """The buffers of a call, and what happens to one slab."""

    def __init__(self, call: Call, hidden_ND, weight_VD, transform, live, stats):
        self.kernels, self.problem, self.weight_VD, self.live = call.kernels, call.problem, weight_VD, live
        self.transform = transform
        bias_V = None if transform.bias_V is None else transform.in_order(transform.bias_V)
        self.head = Head(replace(transform, bias_V=bias_V))
        self.T, self.C = forward_shape(call)
        self.tile = call.tile("forward", self.head.rich) if call.fused else None
        self.columns = slot_columns(call, self.tile)
        self.weights = WeightRows(self.kernels, weight_VD, transform.order_V, self.C, call.dtype)
        self.hidden = HiddenSlab(self.kernels, hidden_ND, live, self.T, call.dtype)
        self.partials = Partials(self.kernels, self.T, fold_slots(call, self.tile), stats, hidden_ND.device)
        self.top_k = TopK(stats, live, Head(transform)) if stats.wants(*NAMES) else None
        self.log_mass_BN = None
        if self.problem.routed is not None:
            self.block_slots = _slots_of_a_block(self.problem.routed.block, self.columns)
            shape = self.problem.routed.blocks(self.problem.V), len(hidden_ND)
            self.log_mass_BN = torch.zeros(shape, dtype=torch.float32, device=hidden_ND.device)

    def run(self, first: int, targets_N: Tensor, logprob_N: Tensor, lse_N: Tensor, stats_SN: Tensor) -> None:
        """targets_N: places in the order of the blocks."""
        rows_T = padded_rows(self.live, first, self.T)
        targets_T = targets_N.index_select(0, rows_T)
        inverse_T = self.head.inverse_temperature(rows_T)
        hidden_TD = self.hidden.load(first)
        token = {"inverse_temperature": inverse_T, "count": self.live.count, "first": first}
        (self._library if self.tile is None else self._fused)(hidden_TD, targets_T, token)
        self.partials.combine(targets_T, self.live, first, self.problem.V, logprob_N, lse_N, stats_SN)
        if self.log_mass_BN is not None:
            self.partials.write_masses(self.live, first, lse_N, self.block_slots, self.log_mass_BN)
        if self.top_k is not None:
            add_products(self.top_k, hidden_TD, self.weight_VD, inverse_T, first, lse_N)

    def _fused(self, hidden_TD: Tensor, targets_T: Tensor, token: dict) -> None:
        """In one launch, or one for each chunk of rows that is gathered into the order of the blocks."""
        V, bias_V = self.problem.V, self.head.bias_V
        C = V if self.transform.order_V is None else self.C
        for begin in range(0, V, C):
            weight_CD = self.weights.load(begin, min(begin + C, V))
            self.kernels.linear_logprob_forward(
                hidden=hidden_TD, weight=weight_CD, bias=None if bias_V is None else bias_V[begin:],
                targets=targets_T - begin if begin else targets_T, tile=self.tile, **token, **self.head.scalars,
                **self.partials.arguments(begin // self.columns),
            )  # fmt: skip

    def _library(self, hidden_TD: Tensor, targets_T: Tensor, token: dict) -> None:
        V = self.problem.V
        buffer = torch.empty(self.T * min(self.C, V), dtype=torch.float32, device=hidden_TD.device)
        for begin in range(0, V, self.C):
            weight_CD = self.weights.load(begin, min(begin + self.C, V))
            C = len(weight_CD)
            logits_TC = product(hidden_TD, weight_CD.T, out=buffer[: self.T * C].view(self.T, C))
            self.kernels.fold_logits(
                logits=logits_TC, rows=None, bias=self.head.bias_V, targets=targets_T, begin=begin, end=begin + C, columns=self.columns,
                **token, **self.head.scalars, **self.partials.tensors,
            )  # fmt: skip


def _slots_of_a_block(block: int, columns: int) -> int:
    """Partial log-sum-exps that add up to one of a block."""
    if block % columns:
        raise ValueError(
            f"gradient: expected blocks of a multiple of {columns} rows with the tiles that were loaded, got {block}"
        )
    return block // columns
