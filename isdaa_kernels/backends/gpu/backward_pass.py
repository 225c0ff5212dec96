"""Backward: the logits of a slab and a chunk are recomputed into a chunk of gradients, which the library multiplies into d_hidden and
d_weight. Sums are fp32, each gradient is rounded once.

N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary.
"""

from itertools import product as pairs

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.call import Call
from isdaa_kernels.backends.gpu.kernels import Kernels
from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.plan import make_plan
from isdaa_kernels.backends.gpu.routed_pass import backward_routed
from isdaa_kernels.backends.gpu.slabs import Head, HiddenSlab, LiveTokens, clean_targets, padded_rows
from isdaa_kernels.backends.gpu.sums import BiasSum, HiddenSum, NoTargets, TargetOrder, WeightSum
from isdaa_kernels.backends.gpu.upstream import Upstream
from isdaa_kernels.dispatch import Problem, on
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.workspace import ceil_div


def backward(
    kernels: Kernels,
    problem: Problem,
    grad: TokenGradient,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    logprob_N: Tensor,
    lse_N: Tensor,
    kept_KV: Tensor,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    call = Call.of(kernels, problem, weight_VD, transform)
    if problem.routed is not None:
        inputs = (hidden_ND, weight_VD, targets_N, transform, ignore_index, logprob_N, lse_N)
        return backward_routed(call, grad, *inputs, log_mass_BN=kept_KV, need_bias=need_bias)
    with on(hidden_ND.device):
        live = LiveTokens((targets_N != ignore_index) & grad.active(), problem.N)
        targets_N = clean_targets(targets_N, problem.V)
        sweep = Sweep(call, hidden_ND, weight_VD, targets_N, Head(transform), live, grad, logprob_N, lse_N)
        return sweep.gradients(need_bias)


class Sweep:
    """One or two walks over the slabs and chunks of the same backward."""

    def __init__(self, call: Call, hidden_ND, weight_VD, targets_N, head, live, grad, logprob_N, lse_N):
        self.call, self.kernels, self.problem, self.dtype = call, call.kernels, call.problem, call.dtype
        self.hidden_ND, self.weight_VD, self.targets_N = hidden_ND, weight_VD, targets_N
        self.head, self.live = head, live
        self.plan = make_plan(call.kernels, call.problem, call.aligned)
        self.tile = call.tile("backward", head.rich) if call.fused else None
        self.gradient_rows = call.kernels.gradient_rows if self.tile is None else self.tile.M
        self.T = self.plan.token_tile
        self.upstream = Upstream(call.kernels, grad, live, head, logprob_N, lse_N, self.dtype)
        self.order = self.logits_TC = None
        self.parts_TC: list[Tensor] = []

    def gradients(self, need_bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        need_hidden, need_weight = self.problem.need_hidden, self.problem.need_weight
        if need_hidden and (self.plan.split or not need_weight):
            d_hidden, _, d_bias = self.run(True, False, need_bias and not need_weight, tokens_outside=True)
            if not need_weight:
                return d_hidden, None, d_bias
            return d_hidden, *self.run(False, True, need_bias)[1:]
        return self.run(need_hidden, need_weight, need_bias)

    def run(self, need_hidden: bool, need_weight: bool, need_bias: bool, tokens_outside: bool = False):
        if (need_weight or need_bias) and self.order is None:
            self.order = self.target_order()
        d_hidden = HiddenSum(self, one_slab=tokens_outside) if need_hidden else None
        d_weight = WeightSum(self) if need_weight else None
        d_bias = BiasSum(self) if need_bias else None
        sums = [d for d in (d_hidden, d_weight, d_bias) if d is not None]
        if sums:
            for slab, chunk, g, bias_sums in self._gradient_chunks(tokens_outside, need_bias):
                for d in sums:
                    d.add(slab, chunk, g, bias_sums)
        return tuple(None if d is None else d.finish() for d in (d_hidden, d_weight, d_bias))

    def target_order(self) -> TargetOrder | NoTargets:
        return TargetOrder(self.live, self.targets_N, self.problem.V, self.upstream)

    def make_buffers(self, C: int) -> None:
        """The library's logits [T, C], if it makes them, and the parts of their gradient."""
        self.logits_TC, g_TC = _buffers(self.call, self.T, C, self.hidden_ND.device)
        self.parts_TC = [g_TC]

    def _gradient_chunks(self, tokens_outside: bool, need_bias: bool):
        """Yields (slab, chunk, parts of the gradient of the product [T, C], its sums over rows [., C] or None), all in buffers."""
        V, C, device = self.problem.V, self.plan.vocab_tile, self.hidden_ND.device
        if not self.parts_TC:
            self.make_buffers(C)
        rows = ceil_div(self.T, self.gradient_rows)
        bias_buffer = torch.empty(rows * C, dtype=torch.float32, device=device) if need_bias else None
        slabs, chunks = self.live.slabs(self.T), [(c, min(c + C, V)) for c in range(0, V, C)]
        hidden = HiddenSlab(self.kernels, self.hidden_ND, self.live, self.T, self.dtype)
        order = pairs(slabs, chunks) if tokens_outside else ((s, c) for c, s in pairs(chunks, slabs))
        slab = chunk = None
        for first, span in order:
            if slab is None or slab.first != first:
                slab = self.slab(first, hidden)
            if chunk is None or chunk.span != span:
                chunk = self.chunk(span)
            width = span[1] - span[0]
            bias_sums = None if bias_buffer is None else bias_buffer[: rows * width].view(rows, width)
            g = [part_TC[:, :width] for part_TC in self.parts_TC]
            self.gradient(slab, chunk, g, bias_sums)
            yield slab, chunk, g, bias_sums

    def slab(self, first: int, hidden: HiddenSlab) -> "Slab":
        return Slab(self, first, hidden)

    def chunk(self, span: tuple[int, int]) -> "Chunk":
        return Chunk(self, span)

    def gradient(self, slab: "Slab", chunk: "Chunk", g: list[Tensor], bias_sums: Tensor | None) -> None:
        if self.logits_TC is None:
            self._fused(slab, chunk, g[0], bias_sums)
        else:
            self._library(slab, chunk, self.logits_TC[:, : g[0].shape[1]], g[0], bias_sums)

    def _fused(self, slab: "Slab", chunk: "Chunk", g_TC: Tensor, bias_sums: Tensor | None) -> None:
        begin, end = chunk.span
        if bias_sums is not None:
            bias_sums.zero_()  # nothing is written for tiles without a live token
        self.kernels.linear_logprob_backward(
            hidden=slab.hidden_TD, weight=self.weight_VD, bias=self.head.bias_V, targets=slab.targets_T, tokens=slab.tokens,
            count=self.live.count, out=g_TC, bias_sums=bias_sums, first=slab.first, begin=begin, end=end, tile=self.tile,
            **self.head.scalars, **self.upstream.flags(),
        )  # fmt: skip

    def _library(self, slab: "Slab", chunk: "Chunk", x_TC: Tensor, g_TC: Tensor, bias_sums: Tensor | None) -> None:
        begin, end = chunk.span
        product(slab.hidden_TD, chunk.weight_CD.T, out=x_TC)
        self.kernels.gradient_logits(
            logits=x_TC, out=g_TC, bias=self.head.bias_V, targets=slab.targets_T, tokens=slab.tokens, bias_sums=bias_sums,
            live=slab.live_T, begin=begin, end=end, target_entry=False, **self.head.scalars, **self.upstream.flags(),
        )  # fmt: skip


def _buffers(call: Call, T: int, C: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The library's logits [T, C], if it makes them, and their gradient [T, >= C]: in place, row i begins where the logits of row i do."""
    x_TC = None if call.fused else torch.empty(T, C, dtype=torch.float32, device=device)
    dtype = call.gradient_dtype
    return x_TC, x_TC.view(dtype) if call.in_place else torch.empty(T, C, dtype=dtype, device=device)


class Slab:
    """T tokens that carry a gradient: their hidden states, targets and coefficients."""

    def __init__(self, sweep: Sweep, first: int, hidden: HiddenSlab):
        self.first, live = first, sweep.live
        rows_T = padded_rows(live, first, sweep.T)
        self.targets_T = sweep.targets_N.index_select(0, rows_T)
        self.tokens = sweep.upstream.tokens(first, sweep.T, rows_T)
        self.hidden_TD = hidden.load(first, self.tokens[7] if sweep.upstream.scales_hidden else None)
        self.live_T = None  # the fused kernel counts for itself
        if sweep.tile is None:
            self.live_T = (torch.arange(first, first + sweep.T, device=rows_T.device) < live.count).to(torch.uint8)
        self.factors_TD = [self.hidden_TD]  # of d_weight, for each part of the gradient
        self.is_first, self.is_last = first == 0, first + sweep.T >= live.capacity


class Chunk:
    """Vocabulary rows [begin, end), in the dtype of the products."""

    def __init__(self, sweep: Sweep, span: tuple[int, int]):
        self.span = span
        self.weight_CD = sweep.weight_VD[slice(*span)].to(sweep.dtype)
        self.factor_CD = self.weight_CD  # of d_hidden
        self.is_first, self.is_last = span[0] == 0, span[1] == sweep.problem.V
