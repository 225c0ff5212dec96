"""`linear_kl` on NVIDIA GPUs: products of both heads by the library, chunk by chunk, folded together by one read of each.

forward and reverse take one pass over both heads. jsd needs both log-sum-exps before its first term: a slab keeps the logits of both
heads for all of the vocabulary until it has them, or, where memory is short, a second pass makes them again. The backward makes both
again; the gradient takes the place of the policy's logits (of 16 bits its low half that of the reference's), and the library multiplies
it into d_hidden and d_weight. Products run on all of `max_scored` tokens.
N tokens, D hidden size (E that of the reference), V vocabulary, T tokens of a slab, C vocabulary rows of a chunk.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.cuda.launch_linear_kl import Heads, KlKernels, fold_buffers, mixture_buffers
from isdaa_kernels.backends.cuda.linear_kl_backward import backward
from isdaa_kernels.backends.cuda.linear_kl_logits import LogitsOf
from isdaa_kernels.backends.cuda.linear_kl_plan import forward_shape, keeps_stripe, make_plan, sides
from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens, padded_rows
from isdaa_kernels.dispatch import Problem, on
from isdaa_kernels.divergence import Model
from isdaa_kernels.targets import bad_targets, report_bad_targets

__all__ = ["backward", "forward", "make_plan"]


def forward(
    problem: Problem, policy: Model, reference: Model, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    make_plan(problem)  # a workspace that is too small raises here, not in the backward
    report_bad_targets(targets_N, problem.V, ignore_index, problem.N)
    scored_N = targets_N != ignore_index
    # NaN until a scored token has its number, and for ever where more are scored than `max_scored` promised
    divergence_N = torch.where(scored_N, float("nan"), 0.0).to(torch.float32)
    numbers_4N = divergence_N.double().expand(4, -1).contiguous()
    with on(policy.hidden_ND.device):
        live = LiveTokens(scored_N, problem.N)
        sweep = _Sweep(problem, policy, reference, live)
        for first in live.slabs(sweep.T):
            sweep.run(first, divergence_N, numbers_4N)
        bad_N = bad_targets(targets_N, problem.V, ignore_index)
        value_N, numbers_4N = (x.masked_fill_(bad_N, float("nan")) for x in (divergence_N, numbers_4N))
        return value_N, numbers_4N, value_N.new_empty(0, len(value_N))


class _Sweep:
    """The buffers of a call, and what happens to one slab."""

    def __init__(self, problem: Problem, policy: Model, reference: Model, live: LiveTokens):
        device = policy.hidden_ND.device
        self.problem, self.live = problem, live
        self.heads = Heads(Head(policy.transform), Head(reference.transform))
        self.kernels = KlKernels(self.heads, problem.divergence)
        (self.T, self.C), self.jsd = forward_shape(problem), problem.divergence.direction == "jsd"
        self.stripe = keeps_stripe(problem)
        columns = problem.V if self.stripe else min(self.C, problem.V)
        self.policy, self.reference = (
            LogitsOf(self.kernels, model, side, live, self.T, columns)
            for model, side in zip((policy, reference), sides(problem), strict=True)
        )
        self.partials = fold_buffers(self.T, problem.V, self.jsd, device)
        self.parts = mixture_buffers(self.T, problem.V, device) if self.jsd else None

    def run(self, first: int, divergence_N: Tensor, numbers_4N: Tensor) -> None:
        live, kernels = self.live, self.kernels
        inverse_T = self.heads.policy.inverse_temperature(padded_rows(live, first, self.T))
        token = {"inverse_temperature": inverse_T, "count": live.count, "first": first}
        for side in (self.policy, self.reference):
            side.load(first)
        for begin in range(0, self.problem.V, self.C):
            kernels.fold(*self._products(begin), begin, token, self.partials)
        kernels.combine_slots(live, first, self.partials, divergence_N, numbers_4N)
        if self.jsd:
            for begin in range(0, self.problem.V, self.C):
                logits = self._places(begin) if self.stripe else self._products(begin)
                kernels.mixture(*logits, begin, live, token, numbers_4N, self.parts)
            kernels.mixture_sum(live, first, self.parts, divergence_N, numbers_4N)

    def _places(self, begin: int) -> tuple[Tensor, Tensor]:
        span, at = (begin, min(begin + self.C, self.problem.V)), begin if self.stripe else 0
        return self.policy.place(span, at), self.reference.place(span, at)

    def _products(self, begin: int) -> tuple[Tensor, Tensor]:
        places = self._places(begin)
        for side, out_TC in zip((self.policy, self.reference), places, strict=True):
            side.product(begin, out_TC)
        return places
