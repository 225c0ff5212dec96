"""Backward of the CPU backend: each tile of logits is recomputed (or read, where it was kept), turned into its gradient, and
multiplied into d_hidden and d_weight.

N tokens that carry a gradient, D hidden size, V vocabulary, T tokens and C vocabulary rows of a tile, K tokens with kept logits.
"""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu import products
from isdaa_kernels.backends.cpu.frozen_head import hidden_gradient
from isdaa_kernels.backends.cpu.plan import make_plan
from isdaa_kernels.backends.cpu.routed import backward_routed
from isdaa_kernels.backends.cpu.sums import BiasSum, HiddenSum, Upstream, WeightSum
from isdaa_kernels.backends.cpu.tiles import HiddenTiles, RowKernels, WeightTiles, kept_block, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.targets import scored_rows


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
        found = backward_routed(
            problem, grad, hidden_ND, weight_VD, targets_N, transform, ignore_index, logprob_N, lse_N, kept_KV, need_bias
        )  # fmt: skip
        if found is not None:
            return found
        kept_KV = kept_KV.new_empty(0, problem.V)  # what was kept are the blocks' log-sum-exps
        problem, transform = replace(problem, routed=None, keep_logits=False), replace(transform, order_V=None)
    if make_plan(problem).hidden_in_forward:
        d_hidden = hidden_gradient(
            problem, grad, hidden_ND, weight_VD, targets_N, transform, ignore_index, logprob_N, kept_KV
        )
        return d_hidden, None, None
    sweep = Sweep(problem, grad, hidden_ND, weight_VD, targets_N, transform, ignore_index, lse_N, kept_KV)
    return sweep.gradients(need_bias)


class Sweep:
    """One or two walks over the tiles of the same backward."""

    def __init__(self, problem, grad, hidden_ND, weight_VD, targets_N, transform, ignore_index, lse_N, kept_KV):
        scored = scored_rows(targets_N, ignore_index, problem.N)
        active = grad.select(scored).active().nonzero()[:, 0]  # coefficients of exactly 0 cost nothing
        self.rows = scored[active]
        self.kept_KV, self.kept_rows = kept_KV, active[active < len(kept_KV)]
        self.hidden_ND, self.weight_VD = hidden_ND, weight_VD
        self.problem, self.plan = problem, make_plan(problem)
        self.dtype, self.V = problem.compute_dtype, problem.V
        self.upstream = Upstream(grad.select(self.rows).map(lambda term_N: term_N.to(self.dtype)))
        self.lse_N = lse_N.index_select(0, self.rows)
        self.kernels = RowKernels(transform, self.rows, targets_N, self.dtype)

    def gradients(self, need_bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.plan.split:
            return self.run(self.problem.need_hidden, self.problem.need_weight, need_bias)
        d_hidden, _, _ = self.run(True, False, False, tokens_outside=True)
        _, d_weight, d_bias = self.run(False, self.problem.need_weight, need_bias)
        return d_hidden, d_weight, d_bias

    def run(self, need_hidden: bool, need_weight: bool, need_bias: bool, tokens_outside: bool = False):
        tile, up = self.plan.token_tile, self.upstream
        d_hidden = HiddenSum(self.hidden_ND, self.rows, up, tile if tokens_outside else None) if need_hidden else None
        d_weight = WeightSum(self.weight_VD, self.plan.vocab_tile, up) if need_weight else None
        d_bias = BiasSum(self.kernels.transform.bias_V, up) if need_bias else None
        if need_hidden or need_weight or need_bias:
            for token, columns, g_TC, hidden, weight in self._gradient_tiles(tokens_outside):
                if d_hidden is not None:
                    d_hidden.add(token, columns, g_TC, weight, last=columns[1] == self.V)
                if d_weight is not None:
                    d_weight.add(token, columns, g_TC, hidden, last=token[1] == len(self.rows))
                if d_bias is not None:
                    d_bias.add(token, columns, g_TC)
        return tuple(None if d is None else d.finish() for d in (d_hidden, d_weight, d_bias))

    def _gradient_tiles(self, tokens_outside: bool):
        """Yields (token span, vocabulary span, gradient of the product [T, C], tiles of hidden, of weight)."""
        tile, C = self.plan.token_tile, self.plan.vocab_tile
        hidden = HiddenTiles(self.hidden_ND, self.rows, tile, self.dtype)
        weight = WeightTiles(self.weight_VD, C, self.dtype)
        buffer = torch.empty(tile * C, dtype=self.dtype)
        tokens, columns = self._token_spans(), spans(self.V, C)
        pairs = product(tokens, columns) if tokens_outside else ((t, c) for c, t in product(columns, tokens))
        for token, column in pairs:
            T, C = token[1] - token[0], column[1] - column[0]
            g_TC = buffer[: T * C].view(T, C)
            source, source_rows = g_TC, None
            if token[0] < len(self.kept_rows):
                source, source_rows = kept_block(self.kept_KV, *column), self.kept_rows[token[0] : token[1]]
            else:
                hidden_ND, rows_T = hidden.left(*token)
                products.multiply(hidden_ND, weight.columns_of(*column), g_TC, left_rows=rows_T)
            self.kernels.backward_tile(
                source, source_rows, g_TC, None, token[0], column[0], self.lse_N, self.upstream.mantissa
            )
            yield token, column, g_TC, hidden, weight

    def _token_spans(self) -> list[tuple[int, int]]:
        """No tile mixes tokens whose logits were kept with others."""
        kept, tile = len(self.kept_rows), self.plan.token_tile
        return spans(kept, tile) + [(kept + a, kept + b) for a, b in spans(len(self.rows) - kept, tile)]
