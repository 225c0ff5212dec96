"""Forward of the Triton backend: slabs of tokens, each folded tile by tile into partial log-sum-exps.

N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk of the library's products, D hidden size, V vocabulary.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.logits import fold_logits_kernel
from isdaa_kernels.backends.triton.kernels.products import linear_logprob_forward_kernel
from isdaa_kernels.backends.triton.library import product
from isdaa_kernels.backends.triton.partials import Partials, outputs
from isdaa_kernels.backends.triton.plan import (
    choose_products,
    fold_shape,
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
from isdaa_kernels.backends.triton.tile_config import TileConfig
from isdaa_kernels.backends.triton.top_k import NAMES, TopK, add_products
from isdaa_kernels.backends.triton.weight_rows import WeightRows
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
        targets_N = clean_targets(targets_N if transform.order_V is None else transform.placed(targets_N), problem.V)
        for first in live.slabs(sweep.T):
            sweep.run(first, targets_N, logprob_N, lse_N, stats_SN)
        if sweep.top_k is not None:
            sweep.top_k.write(stats_SN)
    kept = sweep.log_mass_BN
    return logprob_N, stats_SN, lse_N, hidden_ND.new_empty(0, problem.V, dtype=torch.float32) if kept is None else kept


class _Sweep:
    """The buffers of a call, and what happens to one slab."""

    def __init__(self, problem, hidden_ND, weight_VD, transform, live, stats):
        self.problem, self.weight_VD, self.live, self.stats = problem, weight_VD, live, stats
        self.transform = transform
        bias_V = None if transform.bias_V is None else transform.in_order(transform.bias_V)
        self.head = Head(replace(transform, bias_V=bias_V))
        self.T, self.C = forward_shape(problem)
        self.fused = choose_products(problem) == "fused"
        self.weights = WeightRows(weight_VD, transform.order_V, self.C, product_dtype(problem))
        self.tile = self.head.tile(problem, self.weights.like(), "forward")
        self.hidden = HiddenSlab(hidden_ND, live, self.T, product_dtype(problem))
        self.partials = Partials(self.T, fold_slots(problem, self.tile), stats, hidden_ND.device)
        self.top_k = TopK(stats, live, Head(transform)) if stats.wants(*NAMES) else None
        self.log_mass_BN = None
        if problem.routed is not None:
            self.block_slots = _slots_of_a_block(problem, self.tile)
            shape = problem.routed.blocks(problem.V), len(hidden_ND)
            self.log_mass_BN = torch.zeros(shape, dtype=torch.float32, device=hidden_ND.device)

    def run(self, first: int, targets_N: Tensor, logprob_N: Tensor, lse_N: Tensor, stats_SN: Tensor) -> None:
        """targets_N: places in the order of the blocks."""
        rows_T = padded_rows(self.live, first, self.T)
        targets_T = targets_N.index_select(0, rows_T)
        inverse_T = self.head.inverse_temperature(rows_T)
        hidden_TD = self.hidden.load(first)
        token = {
            "inverse_temperature": inverse_T,
            "count": self.live.count,
            "first": first,
            "T": self.T,
        }
        (self._fused if self.fused else self._library)(hidden_TD, targets_T, token)
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
            tiles = triton.cdiv(self.T, self.tile.M) * triton.cdiv(len(weight_CD), self.tile.N)
            linear_logprob_forward_kernel[programs(self.tile, tiles, hidden_TD.device)](
                bias=None if bias_V is None else bias_V[begin:], targets=targets_T - begin if begin else targets_T, **token,
                **self.head.scalars, **self.head.flags, **self.partials.arguments(begin // self.tile.N * self.tile.pieces),
                **fused_arguments(self.tile, hidden_TD, weight_CD),
            )  # fmt: skip

    def _library(self, hidden_TD: Tensor, targets_T: Tensor, token: dict) -> None:
        V, (rows, columns) = self.problem.V, fold_shape(self.problem)
        buffer = torch.empty(self.T * min(self.C, V), dtype=torch.float32, device=hidden_TD.device)
        for begin in range(0, V, self.C):
            weight_CD = self.weights.load(begin, min(begin + self.C, V))
            C = len(weight_CD)
            logits_TC = product(hidden_TD, weight_CD.T, out=buffer[: self.T * C].view(self.T, C))
            fold_logits_kernel[(triton.cdiv(self.T, rows), triton.cdiv(C, columns))](
                logits_TC, None, self.head.bias_V, begin=begin, end=begin + C, stride_n=logits_TC.stride(0), stride_v=1,
                targets=targets_T, GATHER=False, M=rows, N=columns, **token, **self.head.scalars, **self.head.flags,
                **self.partials.arguments(), **OPTIONS,
            )  # fmt: skip


def _slots_of_a_block(problem: Problem, tile: TileConfig) -> int:
    """Partial log-sum-exps that add up to one of a block."""
    columns = tile.N // tile.pieces if choose_products(problem) == "fused" else fold_shape(problem)[1]
    if problem.routed.block % columns:
        raise ValueError(
            f"gradient: expected blocks of a multiple of {columns} rows with the tiles that were loaded, got {problem.routed.block}"
        )
    return problem.routed.block // columns
