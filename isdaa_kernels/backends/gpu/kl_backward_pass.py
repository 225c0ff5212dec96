"""Backward of `linear_kl`: both heads' products of a slab and a chunk are recomputed into a chunk of gradients of the policy's, which the
library multiplies into d_hidden and d_weight, as in `backward_pass`.

Of 16-bit factors the chunk is 16-bit too: its rounding comes on top of that of the results, which makes 1.1 to 1.4 times the error of
dense PyTorch with one entry of each token kept in fp32 (up to 1.5 without), and up to 2.4 times where two or three entries make up the
whole gradient, as in tiny vocabularies.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size (E that of the reference), V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu import backward_pass
from isdaa_kernels.backends.gpu.call import Call, reference_dtype
from isdaa_kernels.backends.gpu.kl_forward_pass import two_heads
from isdaa_kernels.backends.gpu.kl_kernels import KlKernels
from isdaa_kernels.backends.gpu.kl_tokens import KlUpstream
from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.plan import make_plan
from isdaa_kernels.backends.gpu.slabs import Head, HiddenSlab, LiveTokens, clean_targets
from isdaa_kernels.dispatch import Problem, on
from isdaa_kernels.divergence import KlGradient, Model


def backward(
    kernels: KlKernels,
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
    call = Call.of_heads(kernels, problem, policy, reference)
    with on(policy.hidden_ND.device):
        grad_N = grad.divergence_N
        live = LiveTokens((targets_N != ignore_index) & (grad_N != 0), problem.N)
        return KlSweep(call, policy, reference, live, grad_N, numbers_4N).gradients(need_bias)


class KlSweep(backward_pass.Sweep):
    """The walks of a backward, with the products of two heads in each chunk."""

    def __init__(
        self, call: Call, policy: Model, reference: Model, live: LiveTokens, grad_N: Tensor, numbers_4N: Tensor
    ):
        self.call, self.kernels, self.problem, self.dtype = call, call.kernels, call.problem, call.dtype
        self.reference, self.live, self.divergence = reference, live, call.problem.divergence
        self.hidden_ND, self.weight_VD, transform = policy
        self.targets_N = clean_targets(numbers_4N[1].nan_to_num(nan=-1.0), self.problem.V)
        self.head, self.heads = Head(transform), two_heads(policy, reference, self.divergence)
        self.plan = make_plan(call.kernels, call.problem, call.aligned)
        self.tile = call.tile("backward", True) if call.fused else None
        self.gradient_rows = call.kernels.kl_gradient_rows if self.tile is None else self.tile.M
        self.T = self.plan.token_tile
        self.upstream = KlUpstream(self.divergence, grad_N, live, self.head, numbers_4N, self.dtype, self.T)
        self.order = None
        dtype = reference_dtype(self.problem)
        self.reference_slab = HiddenSlab(call.kernels, reference.hidden_ND, live, self.T, dtype)
        self.reference_first = self.reference_chunk = self.buffer = None
        if self.tile is None:
            size = self.T * self.plan.vocab_tile
            self.buffer = torch.empty(size, dtype=torch.float32, device=self.hidden_ND.device)

    def gradient(self, slab, chunk, x_TC: Tensor | None, g_TC: Tensor, bias_sums: Tensor | None) -> None:
        if self.reference_first != slab.first:
            self.reference_first = slab.first
            self.reference_slab.load(slab.first)
        begin, end = chunk.span
        entry_T = self.upstream.entry_L[slab.first : slab.first + self.T]
        token = {"targets": slab.targets_T, "tokens": slab.tokens, "weight_entry": entry_T, "bias_sums": bias_sums}
        if x_TC is None:
            if bias_sums is not None:
                bias_sums.zero_()  # nothing is written for tiles without a live token
            self.kernels.linear_kl_backward(
                policy_hidden=slab.hidden_TD, reference_hidden=self.reference_slab.buffer_TD, policy_weight=self.weight_VD,
                reference_weight=self.reference.weight_VD, count=self.live.count, out=g_TC, first=slab.first, begin=begin, end=end,
                tile=self.tile, **token, **self.heads,
            )  # fmt: skip
            return
        product(slab.hidden_TD, chunk.weight_CD.T, out=x_TC)
        y_TC = self.buffer[: self.T * (end - begin)].view(self.T, -1)
        product(self.reference_slab.buffer_TD, self._reference_rows(chunk.span).T, out=y_TC)
        self.kernels.kl_gradient_logits(
            policy=x_TC, reference=y_TC, out=g_TC, live=slab.live_T, begin=begin, end=end, **token, **self.heads
        )

    def _reference_rows(self, span: tuple[int, int]) -> Tensor:
        if self.reference_chunk is None or self.reference_chunk[0] != span:
            rows_CE = self.reference.weight_VD[slice(*span)].to(reference_dtype(self.problem))
            self.reference_chunk = span, rows_CE
        return self.reference_chunk[1]
