"""Routed backward of the Triton backend: for each block of vocabulary the tokens that are routed to it, as grouped matrix products over
gathered rows; the rest of the probability enters through two products of the width of the number of blocks. Rules and bound:
`isdaa_kernels.routing`.

The lists live on the device and have room for every token: nothing that is routed can be lost, and the host never waits for a count.
N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, B blocks.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.routed import routed_gradient_kernel
from isdaa_kernels.backends.triton.plan import arch_of, make_plan, product_dtype, routed_tiles
from isdaa_kernels.backends.triton.routed_sums import BlockSums, RestSum, RoutedHiddenSum, RoutedWeightSum
from isdaa_kernels.backends.triton.routed_tiles import choose_routed_tiles
from isdaa_kernels.backends.triton.routing import RouteLists, Routing
from isdaa_kernels.backends.triton.slabs import (
    OPTIONS,
    Head,
    HiddenSlab,
    LiveTokens,
    clean_targets,
    multiprocessors,
    on,
    padded_rows,
)
from isdaa_kernels.backends.triton.sums import Rest, TargetOrder, finish_bias
from isdaa_kernels.backends.triton.upstream import Upstream
from isdaa_kernels.backends.triton.weight_rows import WeightRows
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import TokenGradient

_KERNEL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_PROGRAMS = 2  # a multiprocessor


def backward_routed(
    problem: Problem,
    grad: TokenGradient,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    logprob_N: Tensor,
    lse_N: Tensor,
    log_mass_BN: Tensor,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with on(hidden_ND.device):
        live = LiveTokens((targets_N != ignore_index) & grad.active(), problem.N)
        if live.capacity == 0:
            wanted = (problem.need_hidden, problem.need_weight, need_bias)
            inputs = (hidden_ND, weight_VD, transform.bias_V)
            return tuple(
                torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need else None
                for x, need in zip(inputs, wanted, strict=True)
            )
        walk = _Walk(problem, grad, hidden_ND, weight_VD, targets_N, transform, live, logprob_N, lse_N, log_mass_BN)
        return walk.run(need_bias)


class _Walk:
    """Chunks of vocabulary outside, slabs of tokens inside: every row of d_weight is finished once."""

    def __init__(
        self, problem, grad, hidden_ND, weight_VD, targets_N, transform: Transform, live, logprob_N, lse_N, log_mass_BN
    ):
        self.problem, self.hidden_ND, self.weight_VD = problem, hidden_ND, weight_VD
        self.live, self.plan, self.device = live, make_plan(problem), hidden_ND.device
        self.T, self.block, self.B = self.plan.token_tile, problem.routed.block, log_mass_BN.shape[0]
        self.tiles, self.dtype = routed_tiles(problem), product_dtype(problem)
        self.kernel_dtype = _KERNEL_DTYPES[self.dtype]
        self.order_V = transform.order_V
        bias_V = None if transform.bias_V is None else transform.in_order(transform.bias_V)
        self.head = Head(replace(transform, bias_V=bias_V))
        self.targets_N = clean_targets(targets_N, problem.V)
        self.placed_N = clean_targets(transform.placed(targets_N), problem.V)
        self.upstream = Upstream(grad, live, self.head, logprob_N, lse_N, self.dtype)
        self.routing = Routing(problem.routed, grad, live, self.placed_N, lse_N, log_mass_BN)
        self.hidden = HiddenSlab(hidden_ND, live, self.T, self.dtype)
        self.slab: _Slab | None = None

    def run(self, need_bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        need_hidden, need_weight = self.problem.need_hidden, self.problem.need_weight
        if need_weight or need_bias:
            self.order = TargetOrder(self.live, self.placed_N, self.problem.V, self.upstream)
        self.block_sums = BlockSums(self, need_bias)
        d_hidden = RoutedHiddenSum(self) if need_hidden else None
        d_weight = RoutedWeightSum(self) if need_weight else None
        fp32_tiles = choose_routed_tiles(self.block, torch.float32, arch_of(self.problem))
        rest_one = RestSum(self, 1, fp32_tiles.rest_weight) if need_bias else None
        for slab in self._slabs() if need_weight or need_bias else ():
            if need_weight:
                d_weight.rest.add(slab, slab.hidden_TD)
            if need_bias:  # as for weight, with one hidden feature that is 1 for every token
                rest_one.add(slab, slab.tokens[7][:, None])
        for slab, chunk in self._gradient_chunks(need_bias):
            self.block_sums.add(slab, chunk)
            for total in (d_hidden, d_weight):
                if total is not None:
                    total.add(slab, chunk)
        return (
            None if d_hidden is None else d_hidden.finish(self._slabs()),
            None if d_weight is None else d_weight.finish(),
            self._finish_bias(rest_one) if need_bias else None,
        )

    def _finish_bias(self, rest_one: RestSum) -> Tensor:
        rest = Rest(self.block_sums.mean_V, rest_one.sum_BD, self.order_V, self.block)
        return finish_bias(self, self.block_sums.bias_V, rest)

    def _slabs(self) -> Iterator["_Slab"]:
        for first in self.live.slabs(self.T):
            if self.slab is None or self.slab.first != first:
                self.slab = _Slab(self, first)
            yield self.slab

    def _gradient_chunks(self, need_bias: bool) -> Iterator[tuple["_Slab", "_Chunk"]]:
        """Every chunk with every slab: its lists and the gradient of its products, in buffers of the walk."""
        V, C = self.problem.V, self.plan.vocab_tile
        blocks = triton.cdiv(C, self.block)
        weights = WeightRows(self.weight_VD, self.order_V, C, self.dtype)
        lists = RouteLists(self.routing, self.tiles, self.T, blocks)
        g = torch.empty(blocks * self.T * self.block, dtype=self.dtype, device=self.device)
        sums = [
            torch.empty(self.tiles.gradient_tiles(self.T) * C, dtype=torch.float32, device=self.device)
            if wanted
            else None
            for wanted in (True, need_bias)
        ]
        for begin in range(0, V, C):
            end = min(begin + C, V)
            chunk = _Chunk(self, (begin, end), weights.load(begin, end), lists, g, *sums)
            for slab in self._slabs():
                chunk.make(slab)
                yield slab, chunk

    def rest_arguments(self, slab: "_Slab") -> tuple[Tensor, ...]:
        return self.routing.route_BL, self.routing.log_mass_BN, self.live.rows_M, self.live.count, slab.tokens

    def rest_sizes(self) -> tuple[int, int, int]:
        B, N = self.routing.log_mass_BN.shape
        return self.live.capacity, N, B


class _Slab:
    """T tokens that carry a gradient. One that is lost keeps nothing but NaN as its own entry."""

    def __init__(self, walk: _Walk, first: int):
        self.first = first
        rows_T = padded_rows(walk.live, first, walk.T)
        self.targets_T = walk.targets_N.index_select(0, rows_T)
        self.placed_T = walk.placed_N.index_select(0, rows_T)
        self.tokens = walk.upstream.tokens(first, walk.T, rows_T)
        lost_T = walk.routing.lost_L[first : first + walk.T]
        faint_T = walk.routing.faint_L[first : first + walk.T]
        self.tokens[4, : len(lost_T)].masked_fill_(lost_T | faint_T, 0.0)
        self.tokens[8, : len(lost_T)].masked_fill_(faint_T, 0.0)
        self.tokens[8, : len(lost_T)].masked_fill_(lost_T, float("nan"))
        self.hidden_TD = walk.hidden.load(first, self.tokens[7] if walk.upstream.scales_hidden else None)
        self.is_first, self.is_last = first == 0, first + walk.T >= walk.live.capacity


class _Chunk:
    """Vocabulary places [begin, end), their rows of the head, and for one slab at a time the packed gradient of its products."""

    def __init__(
        self, walk: _Walk, span: tuple[int, int], weight_CD: Tensor, lists: RouteLists, g, mean_sums, bias_sums
    ):
        self.walk, self.span, self.weight_CD, self.lists = walk, span, weight_CD, lists
        self.g, self.mean_sums, self.bias_sums = g, mean_sums, bias_sums

    def make(self, slab: _Slab) -> None:
        walk, lists, tile, (begin, end) = self.walk, self.lists, self.walk.tiles.gradient, self.span
        blocks, D = triton.cdiv(end - begin, walk.block), walk.problem.D
        lists.make(begin // walk.block, blocks, slab.first)
        tiles = blocks * walk.tiles.gradient_tiles(walk.T) * (walk.block // tile.N)
        bias = None if walk.head.bias_V is None else walk.head.bias_V[begin:end]
        routed_gradient_kernel[(min(tiles, _PROGRAMS * multiprocessors(walk.device)),)](
            slab.hidden_TD, self.weight_CD, bias, slab.placed_T, slab.tokens, walk.routing.log_mass_BN, walk.live.rows_M,
            lists.lists, lists.counts, lists.ends, self.g, self.mean_sums, self.bias_sums, slab.first, walk.T, D,
            walk.routing.log_mass_BN.shape[1], begin, end - begin, blocks, slab.hidden_TD.stride(0), *self.weight_CD.stride(),
            walk.head.scalars["logit_scale"], HAS_BIAS=bias is not None, BIAS_SUMS=self.bias_sums is not None,
            EVEN_D=D % tile.K == 0, PRECISION="ieee", BLOCK=walk.block, SEARCH=lists.search, PIECE=walk.tiles.piece, M=tile.M, N=tile.N,
            K=tile.K, num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS,
        )  # fmt: skip
