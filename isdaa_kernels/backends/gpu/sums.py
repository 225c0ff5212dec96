"""The gradients as they are summed: fp32, in one order, rounded once when they are finished.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, M tokens that may be live.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.call import gradient_parts
from isdaa_kernels.backends.gpu.library import add_parts
from isdaa_kernels.backends.gpu.plan import weight_rows
from isdaa_kernels.backends.gpu.slabs import LiveTokens
from isdaa_kernels.backends.gpu.upstream import Units, Upstream


class TargetOrder:
    """Live tokens by target: the entries of targets are added to d_weight row by row, in one order, without atomics."""

    def __init__(self, live: LiveTokens, targets_N: Tensor, V: int, upstream: Upstream):
        position_M = torch.arange(live.capacity, device=targets_N.device)
        targets_M = torch.where(position_M < live.count, targets_N.index_select(0, live.rows_M), V)
        self.targets_M, self.order_M = torch.sort(targets_M, stable=True)
        self.starts = torch.searchsorted(
            self.targets_M, torch.arange(V + 1, device=targets_N.device, dtype=torch.int32), out_int32=True
        )
        self.entry_M = upstream.weight_entries()


class NoTargets:
    """In the place of `TargetOrder`: nothing is added to d_weight outside the chunks."""

    def __init__(self, V: int, device: torch.device):
        self.order_M = torch.zeros(1, dtype=torch.int64, device=device)
        self.targets_M = torch.zeros(1, dtype=torch.int32, device=device)
        self.entry_M = torch.zeros(1, dtype=torch.float32, device=device)
        self.starts = torch.zeros(V + 1, dtype=torch.int32, device=device)


class HiddenSum:
    """d_hidden: fp32 sums of all slabs beside each other, or of one slab where the walk finishes a slab before it goes on."""

    def __init__(self, sweep, one_slab: bool):
        N, D = sweep.hidden_ND.shape
        device = sweep.hidden_ND.device
        self.sweep, self.one_slab, self.parts = sweep, one_slab, gradient_parts(sweep.problem)[0]
        self.out_ND = torch.zeros(N, D, dtype=sweep.hidden_ND.dtype, device=device)
        rows = sweep.T if one_slab else len(sweep.live.slabs(sweep.T)) * sweep.T
        self.sum_ND = torch.empty(rows, D, dtype=torch.float32, device=device)

    def add(self, slab, chunk, g: list[Tensor], _) -> None:
        """g: the gradient [T, C] in its parts."""
        sum_TD = self.sum_ND if self.one_slab else self.sum_ND[slab.first : slab.first + len(g[0])]
        add_parts(g[: self.parts], [chunk.factor_CD] * self.parts, sum_TD, chunk.is_first)
        if chunk.is_last:
            finish_hidden_rows(self.sweep, slab, sum_TD, self.out_ND)

    def finish(self) -> Tensor:
        return self.out_ND


class WeightSum:
    """d_weight, one chunk of vocabulary rows after the other, each summed over all slabs and finished; where there is but one slab, in
    pieces whose fp32 sums do not leave the cache."""

    def __init__(self, sweep):
        self.sweep, self.parts = sweep, gradient_parts(sweep.problem)[1]
        self.out_VD = torch.empty(sweep.weight_VD.shape, dtype=sweep.weight_VD.dtype, device=sweep.weight_VD.device)
        if sweep.live.capacity == 0:
            self.out_VD.zero_()
        self.rows = weight_rows(sweep.problem, sweep.T, sweep.plan.vocab_tile)
        self.sum_RD = torch.empty(self.rows, sweep.problem.D, dtype=torch.float32, device=self.out_VD.device)

    def add(self, slab, chunk, g: list[Tensor], _) -> None:
        begin, C = chunk.span[0], g[0].shape[1]
        for row in range(0, C, self.rows):
            sum_RD = self.sum_RD[: min(self.rows, C - row)]
            pieces = [part_TC[:, row : row + len(sum_RD)].T for part_TC in g[: self.parts]]
            add_parts(pieces, slab.factors_TD, sum_RD, slab.is_first)
            if slab.is_last:
                finish_rows(self.sweep, self.sweep.hidden_ND, sum_RD, begin + row, self.out_VD)

    def finish(self) -> Tensor:
        return self.out_VD


class BiasSum:
    """d_bias."""

    def __init__(self, sweep):
        self.sweep = sweep
        device = sweep.hidden_ND.device
        self.sum_V = torch.zeros(sweep.problem.V, dtype=torch.float32, device=device)

    def add(self, slab, chunk, _, bias_sums: Tensor) -> None:
        self.sum_V[slice(*chunk.span)] += bias_sums.sum(0)

    def finish(self) -> Tensor:
        return finish_bias(self.sweep, self.sum_V)


@dataclass(frozen=True)
class Rest:
    """What a routed backward adds as rows of d_weight are finished: each block's mean distribution times the sum of what it stands for.
    The sums are in the order of the blocks, the rows that they become are `order_V` of it."""

    mean_V: Tensor | None
    sum_BD: Tensor | None
    order_V: Tensor | None
    block: int


def finish_hidden_rows(sweep, slab, sum_TD: Tensor, out_ND: Tensor) -> None:
    sweep.kernels.finish_hidden(
        sums=sum_TD, tokens=slab.tokens, targets=slab.targets_T, weight=sweep.weight_VD, rows=sweep.live.rows_M, count=sweep.live.count,
        d_hidden=out_ND, first=slab.first,
    )  # fmt: skip


def finish_bias(sweep, sum_V: Tensor, rest: Rest | None = None) -> Tensor:
    """As d_weight with one hidden feature, which is 1 for every token."""
    bias_V = sweep.head.bias_V
    out_V1 = torch.zeros(len(bias_V), 1, dtype=bias_V.dtype, device=bias_V.device)
    if sweep.live.capacity:
        one_ND = torch.ones(1, dtype=torch.float32, device=bias_V.device).expand(len(sweep.hidden_ND), 1)
        finish_rows(sweep, one_ND, sum_V[:, None], 0, out_V1, rest, sweep.upstream.bias_units)
    return out_V1[:, 0].to(sweep.head.transform.bias_V.dtype)


def finish_rows(
    sweep, hidden_ND: Tensor, sum_CD: Tensor, begin: int, out_VD: Tensor, rest: Rest | None = None, units: Units | None = None
) -> None:  # fmt: skip
    order, rest = sweep.order, rest or Rest(None, None, None, 1)
    top, shift = units or sweep.upstream.weight_units
    sweep.kernels.finish_weight(
        sums=sum_CD, order=order.order_M, starts=order.starts, targets=order.targets_M, rows=sweep.live.rows_M,
        weight_entry=order.entry_M, hidden=hidden_ND, top=top, d_weight=out_VD, mean=rest.mean_V, rest=rest.sum_BD,
        vocab_order=rest.order_V, begin=begin, shift=shift, block=rest.block,
    )  # fmt: skip
