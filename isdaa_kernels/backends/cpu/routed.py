"""Routed backward of the CPU backend: for each block of vocabulary, the tokens routed to it, as three small products; the rest of the
probability enters through two products of the width of the number of blocks. Rules and bound: `isdaa_kernels.routing`.

N tokens that carry a finite gradient, D hidden size, V vocabulary, B blocks, R tokens routed to a block, C vocabulary rows of it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu.sums import Upstream
from isdaa_kernels.backends.cpu.tiles import RowKernels, WeightTiles
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.routing import choose_routes
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.targets import scored_rows

# Libraries take another path for fewer rows, and a product of a few rows costs as much.
LEAST_ROWS = 32


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
    block_lse: Tensor,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    scored = scored_rows(targets_N, ignore_index, problem.N)
    tokens = _tokens(problem, grad, targets_N, transform, scored, logprob_N, lse_N)
    block_lse_NB = block_lse[: len(scored)].index_select(0, tokens.position_N)
    walk = _Walk(problem, hidden_ND, weight_VD, targets_N, transform, tokens, block_lse_NB, need_bias)
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
    position = (active & finite).nonzero()[:, 0]
    rows, grad = scored.index_select(0, position), grad.select(position)
    upstream = Upstream(grad)
    g, prob = (
        None if t is None else torch.ldexp(t, torch.tensor(-upstream.top)) for t in (grad.logprob_N, grad.prob_N)
    )
    g, prob = g * (upstream.relative_N > 0), None if prob is None else prob * (upstream.relative_N > 0)
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
    """The blocks one after the other, in buffers that are made once."""

    def __init__(
        self, problem, hidden_ND, weight_VD, targets_N, transform, tokens: _Tokens, block_lse_NB, need_bias: bool
    ):
        dtype, routed = problem.compute_dtype, problem.routed
        self.problem, self.tokens, self.transform, self.block = problem, tokens, transform, routed.block
        self.out_shape, self.out_dtype = hidden_ND.shape, hidden_ND.dtype
        self.hidden_ND = hidden_ND.index_select(0, tokens.rows_N).to(dtype)
        self.weight = WeightTiles(weight_VD, routed.block, dtype, transform.order_V)
        self.kernels = RowKernels(transform, tokens.rows_N, targets_N, dtype)
        scale = None if routed.scale is None else routed.scale * 2.0**-tokens.upstream.top
        routes = choose_routes(
            block_lse_NB,
            tokens.lse_N,
            tokens.coefficient_N,
            tokens.target_N // routed.block,
            replace(routed, scale=scale),
        )
        self.rest_BN = routes.rest_BN.mul_(tokens.coefficient_N * tokens.slope_N)
        self.rest_hidden_BD = self.rest_BN @ self.hidden_ND
        self.rest_sum_B = self.rest_BN.sum(1)
        block_of, self.routed_to = routes.active_BN.nonzero(as_tuple=True)
        self.counts = torch.bincount(block_of, minlength=len(self.rest_BN)).tolist()
        tallest = max([LEAST_ROWS, *self.counts])
        self.rows_RD = torch.zeros(tallest, hidden_ND.shape[1], dtype=dtype)
        self.p_RC = torch.empty(tallest, routed.block, dtype=dtype)
        self.minus_inverse_slope_N = -1 / tokens.slope_N
        self.d_hidden_ND = torch.zeros_like(self.hidden_ND) if problem.need_hidden else None
        self.mean_BD = torch.empty(len(self.rest_BN), hidden_ND.shape[1], dtype=dtype) if problem.need_hidden else None
        self.d_weight_VD = torch.empty(weight_VD.shape, dtype=weight_VD.dtype) if problem.need_weight else None
        self.d_bias_V = torch.empty(len(weight_VD), dtype=dtype) if need_bias else None

    def run(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        begin = 0
        for b, count in enumerate(self.counts):
            self._block(b, self.routed_to[begin : begin + count])
            begin += count
        upstream, d_hidden, d_bias = self.tokens.upstream, None, None
        if self.d_hidden_ND is not None:
            self.d_hidden_ND.addmm_(self.rest_BN.T, self.mean_BD)
            d_hidden = torch.zeros(self.out_shape, dtype=self.out_dtype)
            d_hidden.index_copy_(0, self.tokens.rows_N, upstream.unscale_(self.d_hidden_ND).to(self.out_dtype))
        if self.d_bias_V is not None:
            d_bias = upstream.unscale_(self.d_bias_V).to(self.transform.bias_V.dtype)
        return d_hidden, self.d_weight_VD, d_bias

    def _block(self, b: int, rows_R: Tensor) -> None:
        begin = b * self.block
        weight_CD = self.weight.load(begin, min(begin + self.block, self.problem.V))
        hidden_RD, p_RC = self._probabilities(begin, rows_R, weight_CD)
        q_C = p_RC.sum(0)
        total = float(q_C.sum())
        q_C = q_C / total if total > 0 else torch.full_like(q_C, 1 / len(q_C))
        g_RC = self._gradient(begin, rows_R, p_RC)
        if self.d_hidden_ND is not None:
            self.d_hidden_ND.index_add_(0, rows_R, g_RC @ weight_CD)
            torch.mv(weight_CD.T, q_C, out=self.mean_BD[b])
        where = (
            slice(begin, begin + len(q_C))
            if self.transform.order_V is None
            else self.transform.order_V[begin : begin + len(q_C)]
        )
        if self.d_weight_VD is not None:
            d_CD = torch.mm(g_RC.T, hidden_RD).addr_(q_C, self.rest_hidden_BD[b])
            self.d_weight_VD[where] = self.tokens.upstream.unscale_(d_CD).to(self.d_weight_VD.dtype)
        if self.d_bias_V is not None:
            self.d_bias_V[where] = g_RC.sum(0) + q_C * self.rest_sum_B[b]

    def _probabilities(self, begin: int, rows_R: Tensor, weight_CD: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden [R, D], p [R, C]) of the tokens routed to a block."""
        R, C = len(rows_R), len(weight_CD)
        height = max(R, LEAST_ROWS)
        hidden_RD, p_RC = self.rows_RD[:height], self.p_RC.view(-1)[: height * C].view(height, C)
        torch.index_select(self.hidden_ND, 0, rows_R, out=hidden_RD[:R])
        hidden_RD[R:].zero_()
        torch.mm(hidden_RD, weight_CD.T, out=p_RC)
        self._exponentiate(begin, rows_R, p_RC[:R])
        return hidden_RD[:R], p_RC[:R]

    def _exponentiate(self, begin: int, rows_R: Tensor, x_RC: Tensor) -> None:
        """exp(z - lse) in place of the product x: the gradient without a target, with a coefficient that cancels its slope."""
        lse_R = self.tokens.lse_N.index_select(0, rows_R)
        coefficient = TokenGradient(self.minus_inverse_slope_N.index_select(0, rows_R))
        self.kernels.without_targets(rows_R).backward_tile(x_RC, None, x_RC, None, 0, begin, lse_R, coefficient)

    def _gradient(self, begin: int, rows_R: Tensor, p_RC: Tensor) -> Tensor:
        """Of the product, in place of p; the target's column from the log-prob, whose digits p near 1 does not have."""
        tokens = self.tokens
        slope_R = tokens.slope_N.index_select(0, rows_R)
        p_RC.mul_((tokens.coefficient_N.index_select(0, rows_R) * slope_R)[:, None])
        column_R = tokens.target_N.index_select(0, rows_R) - begin
        here = ((column_R >= 0) & (column_R < p_RC.shape[1])).nonzero()[:, 0]
        p_RC[here, column_R[here]] = tokens.entry_N[rows_R[here]] * slope_R[here]
        return p_RC
