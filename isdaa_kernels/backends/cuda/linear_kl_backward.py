"""Backward of `linear_kl`: both heads' logits of a slab and a chunk are made again, the policy's become their gradient, and the library
multiplies that into d_hidden and d_weight. Sums are fp32, each gradient is rounded once.

A 16-bit gradient is multiplied in two halves, high and low. N tokens, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V
vocabulary.
"""

from dataclasses import dataclass
from itertools import product as pairs

import torch
from torch import Tensor

from isdaa_kernels.backends.cuda.launch_linear_kl import BIAS_ROWS, Heads, KlKernels
from isdaa_kernels.backends.cuda.linear_kl_logits import LogitsOf
from isdaa_kernels.backends.cuda.linear_kl_plan import halves, make_plan, sides
from isdaa_kernels.backends.gpu.backward_pass import Sweep
from isdaa_kernels.backends.gpu.library import accumulate, product
from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens, padded_rows
from isdaa_kernels.backends.gpu.sums import HiddenSum, WeightSum, finish_hidden_rows, finish_rows
from isdaa_kernels.backends.gpu.upstream import Upstream
from isdaa_kernels.dispatch import Problem, on
from isdaa_kernels.divergence import KlGradient, Model
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.workspace import ceil_div


def backward(
    problem: Problem,
    grad: KlGradient,
    policy: Model,
    reference: Model,
    targets_N: Tensor,
    ignore_index: int,
    numbers_4N: Tensor,
    logprob_2N: Tensor,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with on(policy.hidden_ND.device):
        grad_N = grad.divergence_N
        live = LiveTokens((targets_N != ignore_index) & (grad_N != 0), problem.N)
        return KlSweep(problem, grad_N, policy, reference, live, numbers_4N).gradients(need_bias)


def _bounded(problem: Problem, grad_N: Tensor, numbers_4N: Tensor) -> TokenGradient:
    """The coefficients, in the place of those of log p; and in the place of those of the log-probs what bounds the gradient of z, by
    which a token is scaled. Forward |p - q| <= 1. Reverse p |log(p / q) - KL| <= KL + 1 / e: the terms p log(p / q) add up to KL, and the
    negative ones to no less than -1 / e. jsd likewise, where (1 - w) KL(p || m) <= -(1 - w) log(1 - w) <= 1 / e."""
    grad_N = grad_N.float()
    reverse = problem.divergence.direction == "reverse"
    return TokenGradient(grad_N * (numbers_4N[3].float() + 1) if reverse else grad_N, log_prob_N=grad_N)


class _NoEntries:
    """In the place of `TargetOrder`: nothing is added to d_weight outside the chunks."""

    def __init__(self, live: LiveTokens, V: int):
        self.order_M = self.targets_M = self.entry_M = live.rows_M
        self.starts = torch.zeros(V + 1, dtype=torch.int32, device=live.rows_M.device)


@dataclass(frozen=True)
class _Slab:
    first: int
    hidden_TD: Tensor
    tokens: Tensor
    targets_T: Tensor
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class _Chunk:
    span: tuple[int, int]
    weight_CD: Tensor
    is_first: bool
    is_last: bool


def _add_products(halves_TC: list[Tensor], other: Tensor, out: Tensor, is_first: bool) -> None:
    """out = or += the sum of each half times `other`."""
    for half in halves_TC:
        (product if is_first else accumulate)(half, other, out)
        is_first = False


class _HiddenSum(HiddenSum):
    def add(self, slab: _Slab, chunk: _Chunk, g: list[Tensor], _) -> None:
        sum_TD = self.sum_ND if self.one_slab else self.sum_ND[slab.first : slab.first + len(g[0])]
        _add_products(g, chunk.weight_CD, sum_TD, chunk.is_first)
        if chunk.is_last:
            finish_hidden_rows(self.sweep, slab, sum_TD, self.out_ND)


class _WeightSum(WeightSum):
    def add(self, slab: _Slab, chunk: _Chunk, g: list[Tensor], _) -> None:
        begin, C = chunk.span[0], g[0].shape[1]
        for row in range(0, C, self.rows):
            sum_RD = self.sum_RD[: min(self.rows, C - row)]
            pieces = [half_TC[:, row : row + len(sum_RD)].T for half_TC in g]
            _add_products(pieces, slab.hidden_TD, sum_RD, slab.is_first)
            if slab.is_last:
                finish_rows(self.sweep, self.sweep.hidden_ND, sum_RD, begin + row, self.out_VD)


class KlSweep(Sweep):
    """The walks of a backward, with the logits of two heads in each chunk and the gradient in halves."""

    hidden_sum, weight_sum = _HiddenSum, _WeightSum

    def __init__(self, problem, grad_N, policy, reference, live, numbers_4N):
        self.problem, self.live, self.numbers_4N, self.plan = problem, live, numbers_4N, make_plan(problem)
        self.hidden_ND, self.weight_VD, transform = policy
        self.models, self.sides = (policy, reference), sides(problem)
        self.T, self.C, self.dtype = self.plan.token_tile, self.plan.vocab_tile, self.sides[0].dtype
        self.head = Head(transform)
        self.kernels = KlKernels(Heads(self.head, Head(reference.transform)), problem.divergence)
        zeros_N = torch.zeros(len(grad_N), dtype=torch.float32, device=grad_N.device)
        grad = _bounded(problem, grad_N, numbers_4N)
        self.upstream = Upstream(self.kernels, grad, live, self.head, zeros_N, numbers_4N[0], self.dtype)
        self.order = _NoEntries(live, problem.V)
        self.targets_T = torch.full((self.T,), -1, dtype=torch.int32, device=grad_N.device)

    def _gradient_chunks(self, tokens_outside: bool, need_bias: bool):
        """Yields (slab, chunk, halves of the gradient [T, C], its sums over rows [., C] or None), all in buffers of the walk."""
        V, C = self.problem.V, self.C
        policy, reference = (
            LogitsOf(self.kernels, model, side, self.live, self.T, C)
            for model, side in zip(self.models, self.sides, strict=True)
        )
        rows = ceil_div(self.T, BIAS_ROWS)
        bias_buffer = torch.empty(rows * C, dtype=torch.float32, device=policy.buffer.device) if need_bias else None
        slabs, chunks = self.live.slabs(self.T), [(c, min(c + C, V)) for c in range(0, V, C)]
        slab = None
        for first, span in pairs(slabs, chunks) if tokens_outside else ((s, c) for c, s in pairs(chunks, slabs)):
            if slab is None or slab.first != first:
                slab = self._slab(first, policy)
                reference.load(first)
            width = span[1] - span[0]
            policy_TC, reference_TC = policy.place(span), reference.place(span)
            weight_CD = policy.product(span[0], policy_TC)
            reference.product(span[0], reference_TC)
            bias_sums = None if bias_buffer is None else bias_buffer[: rows * width].view(rows, width)
            self.kernels.gradient(
                policy_TC, reference_TC, span[0], self.live, first, slab.tokens, self.numbers_4N, bias_sums, self.dtype
            )
            both = (policy_TC, reference_TC)[: halves(self.problem)]
            g = [half_TC.view(self.dtype)[:, :width] for half_TC in both]
            yield slab, _Chunk(span, weight_CD, span[0] == 0, span[1] == V), g, bias_sums

    def _slab(self, first: int, policy: LogitsOf) -> _Slab:
        tokens = self.upstream.tokens(first, self.T, padded_rows(self.live, first, self.T))
        hidden_TD = policy.load(first, tokens[7] if self.upstream.scales_hidden else None)
        return _Slab(first, hidden_TD, tokens, self.targets_T, first == 0, first + self.T >= self.live.capacity)
