"""Forward of `linear_kl`: slabs of tokens, both heads' products folded tile by tile into partial sums. jsd, which needs both log-sum-exps
before its first term, passes over each slab twice; where the library makes the products, and memory suffices, a slab keeps the logits of
both heads for all of the vocabulary until then.

N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk of the library's products, D hidden size (E that of the reference),
V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.call import Call, reference_dtype
from isdaa_kernels.backends.gpu.kl_kernels import KlKernels
from isdaa_kernels.backends.gpu.kl_tokens import kl_token_rows
from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.plan import fold_slots, forward_shape, keeps_logits, make_plan
from isdaa_kernels.backends.gpu.slabs import Head, HiddenSlab, LiveTokens, clean_targets, padded_rows
from isdaa_kernels.dispatch import Problem, on
from isdaa_kernels.divergence import Divergence, Model
from isdaa_kernels.targets import bad_targets, report_bad_targets


def forward(
    kernels: KlKernels, problem: Problem, policy: Model, reference: Model, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.of_heads(kernels, problem, policy, reference)
    make_plan(kernels, problem, call.aligned)  # a workspace that is too small raises here, not in the backward
    report_bad_targets(targets_N, problem.V, ignore_index, problem.N)
    scored_N, bad_N = targets_N != ignore_index, bad_targets(targets_N, problem.V, ignore_index)
    # NaN until a scored token has its number, and for ever where more are scored than `max_scored` promised
    value_N = torch.where(scored_N, float("nan"), 0.0).to(torch.float32)
    numbers_4N = value_N.double().expand(4, -1).contiguous()
    logprob_2N = value_N.repeat(2 if problem.divergence.logprobs else 0, 1)
    live = LiveTokens(scored_N, problem.N)
    with on(policy.hidden_ND.device):
        sweep = _Sweep(call, policy, reference, targets_N, live, (value_N, numbers_4N, logprob_2N))
        for first in live.slabs(sweep.T):
            sweep.run(first)
    return tuple(x.masked_fill_(bad_N, float("nan")) for x in (value_N, numbers_4N, logprob_2N))


class _Sweep:
    """The buffers of a call, and what happens to one slab."""

    def __init__(
        self, call: Call, policy: Model, reference: Model, targets_N: Tensor, live: LiveTokens, out: tuple[Tensor, Tensor, Tensor]
    ):  # fmt: skip
        self.kernels, self.problem, self.live = call.kernels, call.problem, live
        self.divergence = call.problem.divergence
        self.policy, self.reference, self.dtypes = policy, reference, (call.dtype, reference_dtype(call.problem))
        self.value_N, self.numbers_4N, self.logprob_2N = out
        self.policy_head, self.heads = Head(policy.transform), two_heads(policy, reference, self.divergence)
        self.T, self.C = forward_shape(call)
        self.tile = call.tile("forward", True) if call.fused else None
        self.hidden = [
            HiddenSlab(call.kernels, model.hidden_ND, live, self.T, dtype)
            for model, dtype in zip((policy, reference), self.dtypes, strict=True)
        ]
        device = live.rows_M.device
        shape = call.kernels.kl_partial_rows(self.divergence.direction), fold_slots(call, self.tile), self.T
        self.partial = torch.empty(shape, dtype=torch.float32, device=device)
        self.targets_N = self.target_logit_2T = None
        if self.divergence.logprobs:
            self.targets_N = clean_targets(targets_N, self.problem.V)
            self.target_logit_2T = torch.empty(2, self.T, dtype=torch.float32, device=device)
        self.keeps = keeps_logits(call)
        if self.tile is None:
            size = self.T * (self.problem.V if self.keeps else min(self.C, self.problem.V))
            self.buffers = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(2)]

    def run(self, first: int) -> None:
        rows_T = padded_rows(self.live, first, self.T)
        inverse_T = self.policy_head.inverse_temperature(rows_T)
        hidden = [slab.load(first) for slab in self.hidden]
        of_tokens = {"rows": self.live.rows_M, "count": self.live.count, "first": first}
        out = {"partial": self.partial, "value": self.value_N, "numbers": self.numbers_4N}
        target = {"targets": None, "target_logit": None}
        if self.targets_N is not None:
            target = {"targets": self.targets_N.index_select(0, rows_T), "target_logit": self.target_logit_2T}
        logprob_2N = None if self.targets_N is None else self.logprob_2N
        self._fold(hidden, inverse_T, None, target, first)
        self.kernels.kl_combine(**out, **target, logprob=logprob_2N, **of_tokens, direction=self.divergence.direction)
        if self.divergence.direction == "jsd":
            tokens = kl_token_rows(self.numbers_4N.index_select(1, rows_T), inverse_T, "jsd")
            self._fold(hidden, inverse_T, tokens, dict.fromkeys(target), first)
            self.kernels.kl_combine_mixture(**out, **of_tokens, jsd_weight=self.divergence.jsd_weight)

    def _fold(self, hidden: list[Tensor], inverse_T: Tensor, tokens: Tensor | None, target: dict, first: int) -> None:
        token = {"inverse_temperature": inverse_T, "tokens": tokens, "count": self.live.count, "first": first, **target}
        if self.tile is not None:
            self.kernels.linear_kl_forward(
                policy_hidden=hidden[0], reference_hidden=hidden[1], policy_weight=self.policy.weight_VD,
                reference_weight=self.reference.weight_VD, partial=self.partial, tile=self.tile, **token, **self.heads,
            )  # fmt: skip
            return
        for begin in range(0, self.problem.V, self.C):
            end = min(begin + self.C, self.problem.V)
            logits = [
                self._logits(side, hidden[side], begin, end, make=tokens is None or not self.keeps) for side in range(2)
            ]
            self.kernels.kl_fold_logits(
                policy=logits[0], reference=logits[1], partial=self.partial, begin=begin, end=end, **token, **self.heads
            )

    def _logits(self, side: int, hidden: Tensor, begin: int, end: int, make: bool) -> Tensor:
        """fp32 [T, end - begin], made or where they were kept."""
        place = self.T * begin if self.keeps else 0
        out_TC = self.buffers[side][place : place + self.T * (end - begin)].view(self.T, end - begin)
        if make:
            weight_VD = (self.policy, self.reference)[side].weight_VD
            product(hidden, weight_VD[begin:end].to(self.dtypes[side]).T, out=out_TC)
        return out_TC


def two_heads(policy: Model, reference: Model, divergence: Divergence) -> dict:
    """The heads' transforms and the divergence as kernel arguments."""
    arguments = {"direction": divergence.direction, "jsd_weight": divergence.jsd_weight}
    for name, model in (("policy", policy), ("reference", reference)):
        head = Head(model.transform)
        arguments |= {
            f"{name}_bias": head.bias_V,
            f"{name}_scale": head.scalars["logit_scale"],
            f"{name}_softcap": head.scalars["softcap"],
        }
    return arguments
