"""What a routed backward adds up: the blocks' mean distributions, d_hidden and d_weight, in fp32 and in one order.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, B blocks.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.plan import weight_rows
from isdaa_kernels.backends.gpu.sums import Rest, finish_hidden_rows, finish_rows


class BlockSums:
    """Of each block's listed tokens: the mean of their distributions within it, and the gradient of the bias."""

    def __init__(self, walk, need_bias: bool):
        self.walk = walk
        device, V = walk.device, walk.problem.V
        self.mean_V = torch.empty(V, dtype=torch.float32, device=device)
        self.bias_V = torch.empty(V, dtype=torch.float32, device=device) if need_bias else None

    def add(self, slab, chunk) -> None:
        walk, here = self.walk, slice(*chunk.span)
        walk.kernels.block_sums(
            mean_sums=chunk.mean_sums, bias_sums=chunk.bias_sums, counts=chunk.lists.counts, mean=self.mean_V[here],
            bias=None if self.bias_V is None else self.bias_V[here], block=walk.block, rows=walk.sizes.gradient_rows,
            is_first=slab.is_first, is_last=slab.is_last,
        )  # fmt: skip


class RestSum:
    """fp32 [B, D]: of each block, the sum over tokens of the coefficient of its mean distribution times a row of `hidden`."""

    def __init__(self, walk, D: int):
        self.walk = walk
        self.sum_BD = torch.empty(walk.B, D, dtype=torch.float32, device=walk.device)

    def add(self, slab, hidden_TD: Tensor) -> None:
        self.walk.kernels.rest_weight(
            hidden=hidden_TD, poison=self.walk.routing.poison, sums=self.sum_BD, is_first=slab.is_first, **self.walk.rest_arguments(slab)
        )  # fmt: skip


class RoutedHiddenSum:
    """d_hidden: fp32 sums of all slabs, to which each chunk's blocks add the rows of their tokens."""

    def __init__(self, walk):
        self.walk = walk
        rows = len(walk.live.slabs(walk.T)) * walk.T
        self.sum_ND = torch.zeros(rows, walk.problem.D, dtype=torch.float32, device=walk.device)
        self.mean_BD = torch.empty(walk.B, walk.problem.D, dtype=torch.float32, device=walk.device)
        self.out_ND = torch.zeros(walk.hidden_ND.shape, dtype=walk.hidden_ND.dtype, device=walk.device)

    def add(self, slab, chunk) -> None:
        walk, lists = self.walk, chunk.lists
        walk.kernels.routed_hidden(
            g=chunk.g, weight=chunk.weight_CD, count=walk.live.count, lists=lists.lists, places=lists.places, starts=lists.starts,
            sums=self.sum_ND[slab.first : slab.first + walk.T], first=slab.first, step=walk.sizes.step,
        )  # fmt: skip
        if slab.is_last:
            begin, end = chunk.span
            first = begin // walk.block
            walk.kernels.block_mean(
                weight=chunk.weight_CD, mean=walk.block_sums.mean_V[begin:end], out=self.mean_BD[first : first + lists.blocks],
                block=walk.block,
            )  # fmt: skip

    def finish(self, slabs) -> Tensor:
        """slabs: all of them, one after the other; their hidden states are not needed."""
        walk = self.walk
        for slab in slabs:
            sum_TD = self.sum_ND[slab.first : slab.first + walk.T]
            walk.kernels.rest_hidden(mean=self.mean_BD, sums=sum_TD, dtype=walk.dtype, **walk.rest_arguments(slab))
            finish_hidden_rows(walk, slab, sum_TD, self.out_ND)
        return self.out_ND


class RoutedWeightSum:
    """d_weight, one chunk after the other, as `sums.WeightSum` makes it: pieces of a chunk where one slab holds all tokens."""

    def __init__(self, walk):
        self.walk = walk
        self.out_VD = torch.empty(walk.weight_VD.shape, dtype=walk.weight_VD.dtype, device=walk.device)
        self.rows = weight_rows(walk.problem, walk.T, walk.plan.vocab_tile)
        self.sum_RD = torch.empty(self.rows, walk.problem.D, dtype=torch.float32, device=walk.device)
        self.rest = RestSum(walk, walk.problem.D)

    def add(self, slab, chunk) -> None:
        walk, lists, (begin, end) = self.walk, chunk.lists, chunk.span
        for row in range(0, end - begin, self.rows):
            sum_RD = self.sum_RD[: min(self.rows, end - begin - row)]
            walk.kernels.routed_weight(
                g=chunk.g, hidden=slab.hidden_TD, lists=lists.lists, counts=lists.counts, sums=sum_RD, skip=row // walk.block,
                C=end - begin, is_first=slab.is_first,
            )  # fmt: skip
            if slab.is_last:
                rest = Rest(walk.block_sums.mean_V, self.rest.sum_BD, walk.order_V, walk.block)
                finish_rows(walk, walk.hidden_ND, sum_RD, begin + row, self.out_VD, rest)

    def finish(self) -> Tensor:
        return self.out_VD
