"""Routed backward of the CPU backend: for each block of vocabulary, the tokens routed to it, as three small products; the rest of the
probability enters through two products of the width of the number of blocks. Rules and bound: `isdaa_kernels.routing`.

N tokens that carry a finite gradient, D hidden size, V vocabulary, B blocks, C vocabulary rows of a block, T tokens of a piece of those
that are routed to it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu import products
from isdaa_kernels.backends.cpu.plan import FORWARD_TOKENS, make_plan
from isdaa_kernels.backends.cpu.products import PanelBuffer
from isdaa_kernels.backends.cpu.routed_kernels import RoutedKernels, Scratch
from isdaa_kernels.backends.cpu.sums import Upstream
from isdaa_kernels.backends.cpu.tiles import GATHERED_ROWS, WeightTiles, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.routing import faint_tokens
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.targets import scored_rows

# Of all (token, block) pairs: with more of them routed, the exact gradient takes no longer.
FLAT_SHARE = 0.7


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
    block_lse_BN: Tensor,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
    """None where the probability is so flat that the exact gradient is cheaper."""
    scored = scored_rows(targets_N, ignore_index, problem.N)
    tokens = _tokens(problem, grad, targets_N, transform, scored, logprob_N, lse_N)
    # Rows that C++ can read and add to as they are, or copies of the tokens that count.
    direct = hidden_ND.dtype == problem.compute_dtype and hidden_ND.stride(1) == 1
    row_N = tokens.rows_N if direct else torch.arange(len(tokens.rows_N))
    kernels = RoutedKernels(tokens, transform, targets_N, block_lse_BN, problem.routed, problem.compute_dtype)
    routes = kernels.choose_routes(problem.routed)
    if sum(routes.weight_counts) > FLAT_SHARE * routes.route_BN.numel():
        return None
    walk = _Walk(problem, hidden_ND, row_N, weight_VD, transform, tokens, kernels, routes, need_bias)
    d_hidden, d_weight, d_bias = walk.run()
    if len(tokens.lost):  # a non-finite number stays in its row, and in d_weight
        nan = float("nan")
        if d_hidden is not None:
            d_hidden[tokens.lost] = nan
        for total in (d_weight, d_bias):
            if total is not None:
                total.fill_(nan)
    return d_hidden, d_weight, d_bias


@dataclass(frozen=True)
class _Tokens:
    """Numbers of the tokens that carry a gradient, in units of 2 ** top."""

    rows_N: Tensor  # token
    position_N: Tensor  # place among the scored tokens
    target_N: Tensor  # place of the target in the order of the blocks
    lse_N: Tensor
    coefficient_N: Tensor  # of p in the gradient of z
    entry_N: Tensor  # gradient of z in the target's column
    slope_N: Tensor  # dz / d(product)
    upstream: Upstream
    lost: Tensor  # tokens with a coefficient or a log-sum-exp that is not finite


def _tokens(
    problem: Problem, grad: TokenGradient, targets_N, transform: Transform, scored, logprob_N, lse_N
) -> _Tokens:
    dtype = problem.compute_dtype
    grad = grad.select(scored).map(lambda term_N: term_N.to(dtype))
    logprob, lse = logprob_N.index_select(0, scored), lse_N.index_select(0, scored)
    finite = torch.stack([term.isfinite() for term in (*grad.terms(), lse)]).all(0)
    active = grad.active()
    lost = scored[active & ~finite]
    size = torch.stack([term.abs() for term in grad.terms()]).amax(0).where(active & finite, 0)
    position = (active & finite & ~faint_tokens(size)).nonzero()[:, 0]
    rows, grad = scored.index_select(0, position), grad.select(position)
    upstream = Upstream(grad)
    g, prob = (
        None if t is None else torch.ldexp(t, torch.tensor(-upstream.top)) for t in (grad.logprob_N, grad.prob_N)
    )
    logprob = logprob.index_select(0, position).to(dtype)
    entry = -g * torch.expm1(logprob)
    if prob is not None:
        entry = entry + prob * logprob.exp()
    inverse = transform.inverse_temperature(rows, dtype)
    slope = transform.logit_scale * (torch.full_like(g, inverse) if isinstance(inverse, float) else inverse)
    target = transform.placed(targets_N.index_select(0, rows))
    return _Tokens(
        rows, position, target, lse.index_select(0, position), -g if prob is None else prob - g, entry, slope, upstream, lost
    )  # fmt: skip


class _Walk:
    """The blocks one after the other, the tokens of a block in pieces of at most T, in buffers that are made once."""

    def __init__(
        self, problem, hidden_ND, row_N, weight_VD, transform, tokens: _Tokens, kernels: RoutedKernels, routes, need_bias: bool
    ):  # fmt: skip
        dtype, block = problem.compute_dtype, problem.routed.block
        self.problem, self.tokens, self.kernels, self.routes = problem, tokens, kernels, routes
        self.order_V, self.block = transform.order_V, block
        self.out_shape, self.out_dtype, self.row_N = hidden_ND.shape, hidden_ND.dtype, row_N
        self.direct = row_N is tokens.rows_N
        self.plain_ND = hidden_ND if self.direct else self._copy(hidden_ND, dtype)
        self.weight = WeightTiles(weight_VD, block, dtype, transform.order_V)
        self.T = max(
            min(make_plan(problem).token_tile, FORWARD_TOKENS * torch.get_num_threads(), len(tokens.rows_N)), 1
        )
        self.scratch = Scratch(len(tokens.rows_N), self.T, problem.D, block, dtype)
        self.rest_hidden_BD = self._rest_hidden()
        self.rest_sum_B = routes.rest_BN.sum(1)
        self.d_hidden_ND = self.d_weight_VD = self.d_bias_V = None
        if problem.need_hidden:
            self.d_hidden_ND = torch.zeros(self.plain_ND.shape, dtype=dtype)
            self.mean_BD = torch.empty_like(self.rest_hidden_BD)
        if problem.need_weight:
            self.d_weight_VD = torch.empty(weight_VD.shape, dtype=weight_VD.dtype)
            self.d_block_CD = torch.empty(block, problem.D, dtype=dtype)
        if need_bias:
            self.d_bias_V, self.bias_dtype = torch.empty(problem.V, dtype=dtype), transform.bias_V.dtype

    def run(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not len(self.tokens.rows_N):
            return self._zeros()
        for b in range(len(self.rest_hidden_BD)):
            self._block(b)
        unscale_, d_hidden, d_bias = self.tokens.upstream.unscale_, self.d_hidden_ND, self.d_bias_V
        if d_hidden is not None:
            mean_BD = PanelBuffer(*self.mean_BD.shape, d_hidden.dtype).of_rows(self.mean_BD)
            products.multiply(
                self.routes.rest_BN, mean_BD, d_hidden, add=True, out_rows=self.row_N, left_transposed=True
            )
            d_hidden = self._placed(unscale_(d_hidden))
        if d_bias is not None:
            d_bias = unscale_(d_bias).to(self.bias_dtype)
        return d_hidden, self.d_weight_VD, d_bias

    def _zeros(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        d_hidden = None if self.d_hidden_ND is None else self._placed(self.d_hidden_ND)
        d_weight = None if self.d_weight_VD is None else self.d_weight_VD.zero_()
        return d_hidden, d_weight, None if self.d_bias_V is None else self.d_bias_V.zero_().to(self.bias_dtype)

    def _copy(self, hidden_ND: Tensor, dtype: torch.dtype) -> Tensor:
        rows_N = self.tokens.rows_N
        out_ND = torch.empty(len(rows_N), hidden_ND.shape[1], dtype=dtype)
        for start, stop in spans(len(rows_N), GATHERED_ROWS):
            out_ND[start:stop] = hidden_ND.index_select(0, rows_N[start:stop])
        return out_ND

    def _placed(self, d_hidden_ND: Tensor) -> Tensor:
        """d_hidden of all tokens of the call, in their dtype."""
        if self.direct:
            return d_hidden_ND
        out_ND, rows_N = torch.zeros(self.out_shape, dtype=self.out_dtype), self.tokens.rows_N
        for start, stop in spans(len(rows_N), GATHERED_ROWS):
            out_ND.index_copy_(0, rows_N[start:stop], d_hidden_ND[start:stop].to(self.out_dtype))
        return out_ND

    def _rest_hidden(self) -> Tensor:
        """[B, D]: hidden states times the mass that is not recomputed."""
        rest_BN = self.routes.rest_BN
        total_BD = torch.zeros(len(rest_BN), self.problem.D, dtype=rest_BN.dtype)
        for start, stop in spans(rest_BN.shape[1], self.T):
            hidden_TD = self.scratch.hidden.of_rows(self.plain_ND, self.row_N[start:stop])
            products.multiply(rest_BN[:, start:stop], hidden_TD, total_BD, add=True)
        return total_BD

    def _block(self, b: int) -> None:
        begin, end = b * self.block, min((b + 1) * self.block, self.problem.V)
        d_CD = self.d_block_CD[: end - begin] if self.problem.need_weight else None
        self.kernels.block_gradient(
            self.routes, b, end - begin, self.plain_ND, self.row_N, self.weight, self.scratch, self.d_hidden_ND, d_CD,
            self.d_bias_V is not None,
        )  # fmt: skip
        self._finish_block(b, begin, end, d_CD)

    def _finish_block(self, b: int, begin: int, end: int, d_CD: Tensor | None) -> None:
        """What the block's rows get from the tokens that are not routed to it, and theirs from it."""
        where_C = torch.arange(begin, end) if self.order_V is None else self.order_V[begin:end]
        in_place = d_CD is not None and self.d_weight_VD.dtype == d_CD.dtype
        out_VD = self.d_weight_VD if in_place else None
        mean_C = self.kernels.finish_block(
            end - begin, d_CD, self.rest_hidden_BD[b], where_C if in_place else None, out_VD
        )
        if d_CD is not None and not in_place:
            self.d_weight_VD.index_copy_(0, where_C, d_CD.to(self.d_weight_VD.dtype))
        if self.problem.need_hidden:
            products.multiply(mean_C[None], self.weight.rows_of(begin, end), self.mean_BD[b : b + 1])
        if self.d_bias_V is not None:
            bias_C = self.kernels.bias_TC.view(-1)[: end - begin]
            self.d_bias_V[where_C] = bias_C + mean_C * self.rest_sum_B[b]
