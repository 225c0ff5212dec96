"""What a routed backward adds up: the blocks' mean distributions, d_hidden and d_weight, in fp32 and in one order.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, B blocks.
"""

from dataclasses import asdict, replace

import torch
import triton
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.rest import (
    block_mean_kernel,
    block_sums_kernel,
    rest_hidden_kernel,
    rest_weight_kernel,
)
from isdaa_kernels.backends.triton.kernels.routed import routed_hidden_kernel, routed_weight_kernel
from isdaa_kernels.backends.triton.plan import weight_rows
from isdaa_kernels.backends.triton.routed_tiles import (
    DENSE_PERCENT,
    GROUP_ROWS,
    MEAN_COLUMNS,
    MEAN_ROWS,
    SUM_ROWS,
    GroupTile,
)
from isdaa_kernels.backends.triton.slabs import OPTIONS, multiprocessors
from isdaa_kernels.backends.triton.sums import Rest, finish_hidden_rows, finish_rows


class BlockSums:
    """Of each block's listed tokens: the mean of their distributions within it, and the gradient of the bias."""

    def __init__(self, walk, need_bias: bool):
        self.walk = walk
        device, V = walk.device, walk.problem.V
        self.mean_V = torch.empty(V, dtype=torch.float32, device=device)
        self.bias_V = torch.empty(V, dtype=torch.float32, device=device) if need_bias else None

    def add(self, slab, chunk) -> None:
        begin, end = chunk.span
        bias = None if self.bias_V is None else self.bias_V[begin:end]
        block_sums_kernel[(chunk.lists.blocks,)](
            chunk.mean_sums, chunk.bias_sums, chunk.lists.counts, self.mean_V[begin:end], bias, end - begin, FIRST=slab.is_first,
            LAST=slab.is_last, BIAS_SUMS=bias is not None, BLOCK=self.walk.block, TILE=self.walk.tiles.gradient.M, R=SUM_ROWS,
            **OPTIONS,
        )  # fmt: skip


class RestSum:
    """fp32 [B, D]: of each block, the sum over tokens of the coefficient of its mean distribution times a row of `hidden`."""

    def __init__(self, walk, D: int, tile: GroupTile):
        self.walk, self.tile = walk, tile
        self.sum_BD = torch.empty(walk.B, D, dtype=torch.float32, device=walk.device)

    def add(self, slab, hidden_TD: Tensor) -> None:
        walk, (B, D) = self.walk, self.sum_BD.shape
        tile = _narrowed(self.tile, D)
        rest_weight_kernel[(triton.cdiv(D, tile["N"]), triton.cdiv(B, tile["M"]))](
            *walk.rest_arguments(slab), hidden_TD, walk.routing.poison, self.sum_BD, slab.first, walk.T, D, *walk.rest_sizes(),
            hidden_TD.stride(0), walk.head.scalars["logit_scale"], FIRST=slab.is_first, **tile, **OPTIONS,
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
        walk, tile, lists = self.walk, self.walk.tiles.hidden, chunk.lists
        sum_TD, (C, D) = self.sum_ND[slab.first : slab.first + walk.T], chunk.weight_CD.shape
        columns = triton.cdiv(D, tile.N)
        span = triton.cdiv(lists.steps * columns, 2 * multiprocessors(walk.device))  # two programs a multiprocessor
        routed_hidden_kernel[(columns, triton.cdiv(lists.steps, span))](
            chunk.g, chunk.weight_CD, walk.live.count, lists.lists, lists.places, lists.starts, sum_TD, lists.blocks, slab.first,
            walk.T, D, C, lists.steps, *chunk.weight_CD.stride(), sum_TD.stride(0), SPAN=span, STEP=walk.tiles.step,
            GROUP=GROUP_ROWS // walk.block, DENSE=DENSE_PERCENT, PRECISION="ieee", BLOCK=walk.block, M=tile.M, N=tile.N,
            K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS,
        )  # fmt: skip
        if slab.is_last:
            begin, end = chunk.span
            first = begin // walk.block
            block_mean_kernel[(lists.blocks, triton.cdiv(D, MEAN_COLUMNS))](
                chunk.weight_CD, walk.block_sums.mean_V[begin:end], self.mean_BD[first : first + lists.blocks], D, C,
                *chunk.weight_CD.stride(), BLOCK=walk.block, M=MEAN_ROWS, K=MEAN_COLUMNS, **OPTIONS,
            )  # fmt: skip

    def finish(self, slabs) -> Tensor:
        """slabs: all of them, one after the other; their hidden states are not needed."""
        walk, D = self.walk, self.sum_ND.shape[1]
        tile = _narrowed(walk.tiles.rest_hidden, D)
        for slab in slabs:
            sum_TD = self.sum_ND[slab.first : slab.first + walk.T]
            rest_hidden_kernel[(triton.cdiv(D, tile["N"]), triton.cdiv(walk.T, tile["M"]))](
                *walk.rest_arguments(slab), self.mean_BD, sum_TD, slab.first, walk.T, D, *walk.rest_sizes(), sum_TD.stride(0),
                walk.head.scalars["logit_scale"], HALVES=walk.kernel_dtype, **tile, **OPTIONS,
            )  # fmt: skip
            finish_hidden_rows(walk, slab, sum_TD, self.out_ND)
        return self.out_ND


class RoutedWeightSum:
    """d_weight, one chunk after the other, as `sums.WeightSum` makes it: pieces of a chunk where one slab holds all tokens."""

    def __init__(self, walk):
        self.walk = walk
        self.out_VD = torch.empty(walk.weight_VD.shape, dtype=walk.weight_VD.dtype, device=walk.device)
        self.rows = weight_rows(walk.problem, walk.T, walk.plan.vocab_tile)
        self.sum_RD = torch.empty(self.rows, walk.problem.D, dtype=torch.float32, device=walk.device)
        self.rest = RestSum(walk, walk.problem.D, walk.tiles.rest_weight)

    def add(self, slab, chunk) -> None:
        walk, tile, (begin, end) = self.walk, self.walk.tiles.weight, chunk.span
        D, C, lists = walk.problem.D, end - begin, chunk.lists
        for row in range(0, C, self.rows):
            height = min(self.rows, C - row)
            parts = triton.cdiv(height, walk.block) * (walk.block // tile.M)
            routed_weight_kernel[(triton.cdiv(D, tile.N), parts)](
                chunk.g, slab.hidden_TD, lists.lists, lists.counts, self.sum_RD, row // walk.block, walk.T, D, C,
                slab.hidden_TD.stride(0), FIRST=slab.is_first, PRECISION="ieee", BLOCK=walk.block, M=tile.M, N=tile.N, K=tile.K,
                num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS,
            )  # fmt: skip
            if slab.is_last:
                rest = Rest(walk.block_sums.mean_V, self.rest.sum_BD, walk.order_V, walk.block)
                finish_rows(walk, walk.hidden_ND, self.sum_RD[:height], begin + row, self.out_VD, rest)

    def finish(self) -> Tensor:
        return self.out_VD


def _narrowed(tile: GroupTile, D: int) -> dict[str, int]:
    """The tile as arguments of a kernel, no wider than D."""
    return asdict(replace(tile, N=min(tile.N, max(16, triton.next_power_of_2(D)))))
