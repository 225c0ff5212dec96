"""Routed backward: for each block of vocabulary the tokens that are routed to it, as grouped matrix products over gathered rows; the rest
of the probability enters through two products of the width of the number of blocks. Rules and bound: `isdaa_kernels.routing`.

The lists live on the device and have room for every token: nothing that is routed can be lost, and the host never waits for a count.
N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, B blocks.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.call import Call
from isdaa_kernels.backends.gpu.plan import make_plan
from isdaa_kernels.backends.gpu.routed_sums import BlockSums, RestSum, RoutedHiddenSum, RoutedWeightSum
from isdaa_kernels.backends.gpu.routing import RouteLists, Routing
from isdaa_kernels.backends.gpu.slabs import Head, HiddenSlab, LiveTokens, clean_targets, padded_rows
from isdaa_kernels.backends.gpu.sums import Rest, TargetOrder, finish_bias
from isdaa_kernels.backends.gpu.upstream import Upstream
from isdaa_kernels.backends.gpu.weight_rows import WeightRows
from isdaa_kernels.dispatch import on
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.workspace import ceil_div


def backward_routed(
    call: Call,
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
    problem = call.problem
    with on(hidden_ND.device):
        live = LiveTokens((targets_N != ignore_index) & grad.active(), problem.N)
        if live.capacity == 0:
            wanted = (problem.need_hidden, problem.need_weight, need_bias)
            inputs = (hidden_ND, weight_VD, transform.bias_V)
            return tuple(
                torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need else None
                for x, need in zip(inputs, wanted, strict=True)
            )
        walk = _Walk(call, grad, hidden_ND, weight_VD, targets_N, transform, live, logprob_N, lse_N, log_mass_BN)
        return walk.run(need_bias)


class _Walk:
    """Chunks of vocabulary outside, slabs of tokens inside: every row of d_weight is finished once."""

    def __init__(
        self, call: Call, grad, hidden_ND, weight_VD, targets_N, transform: Transform, live, logprob_N, lse_N, log_mass_BN
    ):  # fmt: skip
        kernels, problem = call.kernels, call.problem
        self.kernels, self.problem, self.hidden_ND, self.weight_VD = kernels, problem, hidden_ND, weight_VD
        self.live, self.plan, self.device = live, make_plan(kernels, problem, call.aligned), hidden_ND.device
        self.T, self.block, self.B = self.plan.token_tile, problem.routed.block, log_mass_BN.shape[0]
        self.sizes, self.dtype = kernels.routed_sizes(problem), call.dtype
        self.order_V = transform.order_V
        bias_V = None if transform.bias_V is None else transform.in_order(transform.bias_V)
        self.head = Head(replace(transform, bias_V=bias_V))
        self.targets_N = clean_targets(targets_N, problem.V)
        self.placed_N = clean_targets(transform.placed(targets_N), problem.V)
        self.upstream = Upstream(kernels, grad, live, self.head, logprob_N, lse_N, self.dtype)
        self.routing = Routing(kernels, problem.routed, grad, live, self.placed_N, lse_N, log_mass_BN)
        self.hidden = HiddenSlab(kernels, hidden_ND, live, self.T, self.dtype)
        self.slab: _Slab | None = None

    def run(self, need_bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        need_hidden, need_weight = self.problem.need_hidden, self.problem.need_weight
        if need_weight or need_bias:
            self.order = TargetOrder(self.live, self.placed_N, self.problem.V, self.upstream)
        self.block_sums = BlockSums(self, need_bias)
        d_hidden = RoutedHiddenSum(self) if need_hidden else None
        d_weight = RoutedWeightSum(self) if need_weight else None
        rest_one = RestSum(self, 1) if need_bias else None
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
        blocks, tiles = ceil_div(C, self.block), ceil_div(self.T, self.sizes.gradient_rows)
        weights = WeightRows(self.kernels, self.weight_VD, self.order_V, C, self.dtype)
        lists = RouteLists(self.routing, self.sizes, self.T, blocks)
        g = torch.empty(blocks, self.T, self.block, dtype=self.dtype, device=self.device)
        sums = [
            torch.empty(tiles * C, dtype=torch.float32, device=self.device) if wanted else None
            for wanted in (True, need_bias)
        ]
        for begin in range(0, V, C):
            end = min(begin + C, V)
            sums_of_chunk = (None if x is None else x[: tiles * (end - begin)].view(tiles, -1) for x in sums)
            chunk = _Chunk(self, (begin, end), weights.load(begin, end), lists, g, *sums_of_chunk)
            for slab in self._slabs():
                chunk.make(slab)
                yield slab, chunk

    def rest_arguments(self, slab: "_Slab") -> dict:
        return {
            "route": self.routing.route_BL, "log_mass": self.routing.log_mass_BN, "rows": self.live.rows_M, "count": self.live.count,
            "tokens": slab.tokens, "first": slab.first, "logit_scale": self.head.scalars["logit_scale"],
        }  # fmt: skip


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
        walk, lists, (begin, end) = self.walk, self.lists, self.span
        lists.make(begin // walk.block, ceil_div(end - begin, walk.block), slab.first)
        bias = None if walk.head.bias_V is None else walk.head.bias_V[begin:end]
        walk.kernels.routed_gradient(
            hidden=slab.hidden_TD, weight=self.weight_CD, bias=bias, targets=slab.placed_T, tokens=slab.tokens,
            log_mass=walk.routing.log_mass_BN, rows=walk.live.rows_M, lists=lists.lists, counts=lists.counts, ends=lists.ends, out=self.g,
            mean_sums=self.mean_sums, bias_sums=self.bias_sums, first=slab.first, begin=begin,
            logit_scale=walk.head.scalars["logit_scale"],
        )  # fmt: skip
