"""Forward of `linear_kl`: slabs of tokens, both heads' products folded tile by tile into partial sums. jsd, which needs both log-sum-exps
before its first term, passes over each slab twice.

N tokens of the call, T tokens of a slab, C vocabulary rows of a chunk of the library's products, D hidden size (E that of the reference),
V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.call import Call, reference_dtype
from isdaa_kernels.backends.gpu.kl_kernels import KlKernels
from isdaa_kernels.backends.gpu.kl_tokens import kl_token_rows
from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.plan import fold_slots, forward_shape, kl_partial_rows, make_plan
from isdaa_kernels.backends.gpu.slabs import Head, HiddenSlab, LiveTokens, padded_rows
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
    value_N = torch.where(scored_N, float("nan"), 0.0).to(torch.float32)
    numbers_4N = value_N.double().expand(4, -1).contiguous()
    live = LiveTokens(scored_N, problem.N)
    with on(policy.hidden_ND.device):
        sweep = _Sweep(call, policy, reference, live, value_N, numbers_4N)
        for first in live.slabs(sweep.T):
            sweep.run(first)
    value_N.masked_fill_(bad_N, float("nan"))
    numbers_4N[0].masked_fill_(bad_N, float("nan"))
    return value_N, numbers_4N, value_N.new_empty(0, len(value_N))


class _Sweep:
    """The buffers of a call, and what happens to one slab."""

    def __init__(
        self, call: Call, policy: Model, reference: Model, live: LiveTokens, value_N: Tensor, numbers_4N: Tensor
    ):
        self.kernels, self.problem, self.live = call.kernels, call.problem, live
        self.divergence = call.problem.divergence
        self.policy, self.reference, self.dtypes = policy, reference, (call.dtype, reference_dtype(call.problem))
        self.value_N, self.numbers_4N = value_N, numbers_4N
        self.policy_head, self.heads = Head(policy.transform), two_heads(policy, reference, self.divergence)
        self.T, self.C = forward_shape(call)
        self.tile = call.tile("forward", True) if call.fused else None
        self.hidden = [
            HiddenSlab(call.kernels, model.hidden_ND, live, self.T, dtype)
            for model, dtype in zip((policy, reference), self.dtypes, strict=True)
        ]
        shape = kl_partial_rows(call.problem), fold_slots(call, self.tile), self.T
        self.partial = torch.empty(shape, dtype=torch.float32, device=live.rows_M.device)
        self.buffers = None
        if self.tile is None:
            size = self.T * min(self.C, self.problem.V)
            self.buffers = [torch.empty(size, dtype=torch.float32, device=live.rows_M.device) for _ in range(2)]

    def run(self, first: int) -> None:
        rows_T = padded_rows(self.live, first, self.T)
        inverse_T = self.policy_head.inverse_temperature(rows_T)
        hidden = [slab.load(first) for slab in self.hidden]
        of_tokens = {"rows": self.live.rows_M, "count": self.live.count, "first": first}
        out = {"partial": self.partial, "value": self.value_N, "numbers": self.numbers_4N}
        self._fold(hidden, inverse_T, None, first)
        self.kernels.kl_combine(**out, **of_tokens, direction=self.divergence.direction)
        if self.divergence.direction == "jsd":
            tokens = kl_token_rows(self.numbers_4N.index_select(1, rows_T), inverse_T, "jsd")
            self._fold(hidden, inverse_T, tokens, first)
            self.kernels.kl_combine_mixture(**out, **of_tokens, jsd_weight=self.divergence.jsd_weight)

    def _fold(self, hidden: list[Tensor], inverse_T: Tensor, tokens: Tensor | None, first: int) -> None:
        token = {"inverse_temperature": inverse_T, "tokens": tokens, "count": self.live.count, "first": first}
        weights = [model.weight_VD for model in (self.policy, self.reference)]
        if self.tile is not None:
            self.kernels.linear_kl_forward(
                policy_hidden=hidden[0], reference_hidden=hidden[1], policy_weight=weights[0], reference_weight=weights[1],
                partial=self.partial, tile=self.tile, **token, **self.heads,
            )  # fmt: skip
            return
        for begin in range(0, self.problem.V, self.C):
            end = min(begin + self.C, self.problem.V)
            products = [
                product(x, weight[begin:end].to(dtype).T, out=buffer[: self.T * (end - begin)].view(self.T, -1))
                for x, weight, dtype, buffer in zip(hidden, weights, self.dtypes, self.buffers, strict=True)
            ]
            self.kernels.kl_fold_logits(
                policy=products[0], reference=products[1], partial=self.partial, begin=begin, end=end, **token, **self.heads
            )  # fmt: skip


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
