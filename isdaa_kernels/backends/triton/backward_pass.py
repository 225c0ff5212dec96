"""Backward of the Triton backend: the logits of a slab and a chunk are recomputed into a chunk of gradients, which the library
multiplies into d_hidden and d_weight. Sums are fp32, each gradient is rounded once.

N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary.
"""

from itertools import product as pairs

import torch
import triton
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.logits import gradient_logits_kernel
from isdaa_kernels.backends.triton.kernels.products import linear_logprob_backward_kernel
from isdaa_kernels.backends.triton.library import product
from isdaa_kernels.backends.triton.plan import (
    GRADIENT_COLUMNS,
    GRADIENT_ROWS,
    choose_products,
    make_plan,
    product_dtype,
)
from isdaa_kernels.backends.triton.routed_pass import backward_routed
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
from isdaa_kernels.backends.triton.sums import BiasSum, HiddenSum, TargetOrder, WeightSum
from isdaa_kernels.backends.triton.upstream import Upstream
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import TokenGradient


def backward(
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
    if problem.routed is not None:
        inputs = (hidden_ND, weight_VD, targets_N, transform, ignore_index, logprob_N, lse_N)
        return backward_routed(problem, grad, *inputs, log_mass_BN=kept_KV, need_bias=need_bias)
    with on(hidden_ND.device):
        live = LiveTokens((targets_N != ignore_index) & grad.active(), problem.N)
        targets_N = clean_targets(targets_N, problem.V)
        sweep = _Sweep(problem, hidden_ND, weight_VD, targets_N, Head(transform), live, grad, logprob_N, lse_N)
        need_hidden, need_weight = problem.need_hidden, problem.need_weight
        if need_hidden and (sweep.plan.split or not need_weight):
            d_hidden, _, d_bias = sweep.run(True, False, need_bias and not need_weight, tokens_outside=True)
            if not need_weight:
                return d_hidden, None, d_bias
            return d_hidden, *sweep.run(False, True, need_bias)[1:]
        return sweep.run(need_hidden, need_weight, need_bias)


class _Sweep:
    """One or two walks over the slabs and chunks of the same backward."""

    def __init__(self, problem, hidden_ND, weight_VD, targets_N, head, live, grad, logprob_N, lse_N):
        self.problem, self.hidden_ND, self.weight_VD, self.targets_N = problem, hidden_ND, weight_VD, targets_N
        self.head, self.live, self.plan = head, live, make_plan(problem)
        self.dtype = product_dtype(problem)
        self.fused = choose_products(problem) == "fused"
        self.tile = head.tile(problem, weight_VD, "backward")
        self.T = self.plan.token_tile
        self.upstream = Upstream(grad, live, head, logprob_N, lse_N, self.dtype)
        self.order = None

    def run(self, need_hidden: bool, need_weight: bool, need_bias: bool, tokens_outside: bool = False):
        if (need_weight or need_bias) and self.order is None:
            self.order = TargetOrder(self.live, self.targets_N, self.problem.V, self.upstream)
        d_hidden = HiddenSum(self, one_slab=tokens_outside) if need_hidden else None
        d_weight = WeightSum(self) if need_weight else None
        d_bias = BiasSum(self) if need_bias else None
        sums = [d for d in (d_hidden, d_weight, d_bias) if d is not None]
        if sums:
            for slab, chunk, g_TC, bias_sums in self._gradient_chunks(tokens_outside, need_bias):
                for d in sums:
                    d.add(slab, chunk, g_TC, bias_sums)
        return tuple(None if d is None else d.finish() for d in (d_hidden, d_weight, d_bias))

    def _gradient_chunks(self, tokens_outside: bool, need_bias: bool):
        """Yields (slab, chunk, gradient of the product [T, C], its sums over rows [., C] or None), all in buffers of the walk."""
        V, C, device = self.problem.V, self.plan.vocab_tile, self.hidden_ND.device
        buffer_TC = torch.empty(self.T, C, dtype=self.dtype, device=device)
        rows = self.tile.M if self.fused else GRADIENT_ROWS
        bias_buffer = (
            torch.empty(triton.cdiv(self.T, rows) * C, dtype=torch.float32, device=device) if need_bias else None
        )
        slabs, chunks = self.live.slabs(self.T), [(c, min(c + C, V)) for c in range(0, V, C)]
        hidden = HiddenSlab(self.hidden_ND, self.live, self.T, self.dtype)
        order = pairs(slabs, chunks) if tokens_outside else ((s, c) for c, s in pairs(chunks, slabs))
        slab = chunk = None
        for first, span in order:
            if slab is None or slab.first != first:
                slab = Slab(self, first, hidden)
            if chunk is None or chunk.span != span:
                chunk = Chunk(self, span)
            width = span[1] - span[0]
            g_TC = buffer_TC[:, :width]
            bias_sums = (
                None if bias_buffer is None else bias_buffer[: triton.cdiv(self.T, rows) * width].view(-1, width)
            )
            (self._fused if self.fused else self._library)(slab, chunk, g_TC, bias_sums)
            yield slab, chunk, g_TC, bias_sums

    def _flags(self) -> dict:
        return {**self.head.scalars, **self.head.flags, **self.upstream.flags()}

    def _fused(self, slab: "Slab", chunk: "Chunk", g_TC: Tensor, bias_sums: Tensor | None) -> None:
        begin, end = chunk.span
        tiles = (self.T // self.tile.M) * triton.cdiv(end - begin, self.tile.N)
        if bias_sums is not None:
            bias_sums.zero_()  # no program writes for rows of tiles without a live token
        linear_logprob_backward_kernel[programs(self.tile, tiles, g_TC.device)](
            bias=self.head.bias_V, targets=slab.targets_T, tokens=slab.tokens, count=self.live.count, out=g_TC,
            bias_sums=bias_sums, first=slab.first, T=self.T, begin=begin, end=end, stride_out=g_TC.stride(0),
            BIAS_SUMS=bias_sums is not None, **self._flags(), **fused_arguments(self.tile, slab.hidden_TD, self.weight_VD),
        )  # fmt: skip

    def _library(self, slab: "Slab", chunk: "Chunk", g_TC: Tensor, bias_sums: Tensor | None) -> None:
        begin, end = chunk.span
        product(slab.hidden_TD, chunk.weight_CD.T, out=g_TC)
        gradient_logits_kernel[(triton.cdiv(self.T, GRADIENT_ROWS), triton.cdiv(end - begin, GRADIENT_COLUMNS))](
            g_TC, g_TC, self.head.bias_V, slab.targets_T, slab.tokens, bias_sums, slab.live_T, T=self.T, begin=begin, end=end,
            stride_n=g_TC.stride(0), stride_v=1, stride_out_n=g_TC.stride(0), stride_out_v=1,
            BIAS_SUMS=bias_sums is not None, TARGET=False, M=GRADIENT_ROWS, N=GRADIENT_COLUMNS, **self._flags(), **OPTIONS,
        )  # fmt: skip


class Slab:
    """T tokens that carry a gradient: their hidden states, targets and coefficients."""

    def __init__(self, sweep: _Sweep, first: int, hidden: HiddenSlab):
        self.first, live = first, sweep.live
        rows_T = padded_rows(live, first, sweep.T)
        self.targets_T = sweep.targets_N.index_select(0, rows_T)
        self.tokens = sweep.upstream.tokens(first, sweep.T, rows_T)
        self.hidden_TD = hidden.load(first, self.tokens[7] if sweep.upstream.scales_hidden else None)
        self.live_T = None  # the fused kernel counts for itself
        if not sweep.fused:
            self.live_T = (torch.arange(first, first + sweep.T, device=rows_T.device) < live.count).to(torch.uint8)
        self.is_first, self.is_last = first == 0, first + sweep.T >= live.capacity


class Chunk:
    """Vocabulary rows [begin, end), in the dtype of the products."""

    def __init__(self, sweep: _Sweep, span: tuple[int, int]):
        self.span = span
        self.weight_CD = sweep.weight_VD[slice(*span)].to(sweep.dtype)
        self.is_first, self.is_last = span[0] == 0, span[1] == sweep.problem.V
