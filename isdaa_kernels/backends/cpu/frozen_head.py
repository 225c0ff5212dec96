"""d_hidden alone, of which the forward does all the matrix work: 2 units instead of 3. The gradient of a token's log-prob and lse with
regard to its hidden state needs nothing but its mean weight row, the sum over j other than the target of p[n, j] weight[j], as long as
the slope dz / d(product) is the same in all columns.

N tokens of the call, K scored ones, D hidden size, V vocabulary, T tokens and C vocabulary rows of a tile.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu import products
from isdaa_kernels.backends.cpu.plan import make_plan
from isdaa_kernels.backends.cpu.products import Panels
from isdaa_kernels.backends.cpu.tiles import RowKernels, State, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.targets import scored_rows


class MeanWeight:
    """The mean weight rows as the forward adds tile after tile to them, in units of exp(-running maximum)."""

    def __init__(self, problem: Problem, kernels: RowKernels):
        self.kernels = kernels
        self.sum_KD = torch.zeros(problem.N, problem.D, dtype=problem.compute_dtype)
        self.shift_K = torch.empty(problem.N, dtype=torch.float64)
        self.minus_inverse_slope_K = -1.0 / kernels.slope()

    def add(
        self,
        token: int,
        column: int,
        product_TC: Tensor,
        p_TC: Tensor,
        weight_CD: Panels,
        old_max_T: Tensor,
        state: State,
    ) -> None:
        """The product must be as it was made, p_TC may be overwritten; `state` has taken the tile in, old_max is its maximum
        before that."""
        T, C = product_TC.shape
        new_max_T = state.max_N[token : token + T]
        self.shift_K[token : token + T] = new_max_T.masked_fill(new_max_T == float("-inf"), 0.0)
        coefficient = TokenGradient(self.minus_inverse_slope_K)
        self.kernels.backward_tile(product_TC, None, p_TC, None, token, column, self.shift_K, coefficient)
        target_T = self.kernels.targets_N[token : token + T] - column
        here_T = ((target_T >= 0) & (target_T < C)).nonzero()[:, 0]
        p_TC[here_T, target_T[here_T]] = 0
        sum_TD = self.sum_KD[token : token + T]
        sum_TD.mul_((old_max_T - new_max_T).exp_().nan_to_num_(nan=0.0)[:, None])  # both -inf: nothing is summed yet
        products.multiply(p_TC, weight_CD, sum_TD, add=True)

    def finish(self, state: State) -> Tensor:
        """[max_scored, D], in units of probability, 0 behind the last scored token."""
        self.sum_KD[: len(state.sum_N)].mul_(state.sum_N.reciprocal().to(self.sum_KD.dtype)[:, None])
        return self.sum_KD


def hidden_gradient(
    problem: Problem,
    grad: TokenGradient,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    logprob_N: Tensor,
    mean_KD: Tensor,
) -> Tensor:
    """d_hidden [N, D]: slope * (g (1 - p) + r p) weight[target] + slope * (r - g) mean, g and r the gradients of log-prob and lse."""
    dtype = problem.compute_dtype
    out_ND = torch.zeros(hidden_ND.shape, dtype=hidden_ND.dtype)
    scored = scored_rows(targets_N, ignore_index, problem.N)
    active = grad.select(scored).active().nonzero()[:, 0]
    for start, stop in spans(len(active), min(make_plan(problem).token_tile, 512)):
        place_T = active[start:stop]
        rows_T = scored.index_select(0, place_T)
        part = grad.select(rows_T).map(lambda term: term.to(dtype))
        g_T, logprob_T = part.logprob_N, logprob_N.index_select(0, rows_T).to(dtype)
        entry_T, coefficient_T = -g_T * logprob_T.expm1(), -g_T
        if part.prob_N is not None:
            entry_T, coefficient_T = entry_T + part.prob_N * logprob_T.exp(), part.prob_N - g_T
        slope = transform.logit_scale * transform.inverse_temperature(rows_T, dtype)
        target_TD = weight_VD.index_select(0, targets_N.index_select(0, rows_T).long()).to(dtype)
        d_TD = mean_KD.index_select(0, place_T).mul_((coefficient_T * slope)[:, None])
        d_TD.addcmul_(target_TD, (entry_T * slope)[:, None])
        out_ND.index_copy_(0, rows_T, d_TD.to(out_ND.dtype))
        del d_TD, target_TD  # before the next are made
    return out_ND
