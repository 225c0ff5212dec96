"""Backward of `linear_kl`: both heads' products of a slab and a chunk are recomputed into a chunk of gradients of the policy's, which the
library multiplies into d_hidden and d_weight, as in `backward_pass`.

Of 16-bit factors the chunk is fp16, each token times its power of two (`kl_tokens`), and so are its factors: bf16 ones are made fp16,
times powers of two, a slab of hidden states and a chunk of the weight at a time. Where it has a second part (`call.gradient_parts`), what
rounding to fp16 left, that is in the factors' own dtype.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size (E that of the reference), V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu import backward_pass
from isdaa_kernels.backends.gpu.call import Call, reference_dtype
from isdaa_kernels.backends.gpu.kl_forward_pass import two_heads
from isdaa_kernels.backends.gpu.kl_kernels import KlKernels
from isdaa_kernels.backends.gpu.kl_tokens import KlUpstream, NarrowRows, weight_exponent
from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.plan import make_plan
from isdaa_kernels.backends.gpu.slabs import Head, HiddenSlab, LiveTokens, clean_targets
from isdaa_kernels.backends.gpu.sums import NoTargets
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
        live = LiveTokens((targets_N != ignore_index) & grad.active(), problem.N)
        sweep = KlSweep(call, policy, reference, targets_N, live, grad, numbers_4N, logprob_2N)
        return sweep.gradients(need_bias)


class KlSweep(backward_pass.Sweep):
    """The walks of a backward, with the products of two heads in each chunk."""

    def __init__(self, call: Call, policy: Model, reference: Model, targets_N, live, grad, numbers_4N, logprob_2N):
        self.call, self.kernels, self.problem, self.dtype = call, call.kernels, call.problem, call.dtype
        self.live, self.reference = live, reference
        self.hidden_ND, self.weight_VD, transform = policy
        self.plan = make_plan(call.kernels, call.problem, call.aligned)
        self.T, C = self.plan.token_tile, self.plan.vocab_tile
        self.head, self.heads = Head(transform), two_heads(policy, reference, call.problem.divergence)
        self.with_logprobs = grad.logprob_N is not None
        outside_N = torch.full_like(targets_N, -1, dtype=torch.int32)
        self.targets_N = clean_targets(targets_N, self.problem.V) if self.with_logprobs else outside_N
        self.tile = call.tile("backward", True) if call.fused else None
        self.gradient_rows = call.kernels.kl_gradient_rows if self.tile is None else self.tile.M
        narrow = call.gradient_dtype == torch.float16
        exponent = torch.zeros((), dtype=torch.int64, device=self.hidden_ND.device)
        if call.converts_weight:
            exponent = weight_exponent(self.weight_VD)
        self.upstream = KlUpstream(
            call.problem.divergence, grad, live, self.head, numbers_4N, logprob_2N, self.hidden_ND, narrow, exponent
        )
        self.order = self.logits_TC = self.reference_TC = self.factor_rows = None
        self.factor_slabs: list[HiddenSlab] = []
        self.parts_TC = []
        slab = lambda hidden_ND, dtype: HiddenSlab(call.kernels, hidden_ND, live, self.T, dtype)  # noqa: E731
        self.reference_slab = slab(reference.hidden_ND, reference_dtype(self.problem))
        if narrow and self.problem.need_weight:
            dtypes = dict.fromkeys((torch.float16, self.dtype))  # of the first part, of the second
            self.factor_slabs = [slab(self.hidden_ND, dtype) for dtype in dtypes]
        if call.converts_weight:
            self.factor_rows = NarrowRows(call.kernels, self.weight_VD, C, exponent)

    def target_order(self) -> NoTargets:
        return NoTargets(self.problem.V, self.hidden_ND.device)

    def make_buffers(self, C: int) -> None:
        super().make_buffers(C)
        empty = lambda dtype: torch.empty(self.T, C, dtype=dtype, device=self.hidden_ND.device)  # noqa: E731
        if self.logits_TC is not None:
            self.reference_TC = empty(torch.float32)
        if self.call.parts == 2:
            self.parts_TC.append(self.reference_TC.view(self.dtype) if self.call.in_place else empty(self.dtype))

    def slab(self, first: int, hidden: HiddenSlab) -> backward_pass.Slab:
        slab = super().slab(first, hidden)
        self.reference_slab.load(first)
        if self.factor_slabs:
            factors_TD = [factor.load(first, slab.tokens[16]) for factor in self.factor_slabs]
            slab.factors_TD = [factors_TD[0], factors_TD[-1]]
        return slab

    def chunk(self, span: tuple[int, int]) -> backward_pass.Chunk:
        chunk = super().chunk(span)
        if self.tile is None:
            self.reference_CE = self.reference.weight_VD[slice(*span)].to(reference_dtype(self.problem))
        if self.factor_rows is not None:
            chunk.factor_CD = self.factor_rows.load(*span)
        return chunk

    def gradient(self, slab, chunk, g: list[Tensor], bias_sums: Tensor | None) -> None:
        begin, end = chunk.span
        out = {"out": g[0], "low": g[1] if len(g) == 2 else None, "bias_sums": bias_sums, "begin": begin, "end": end}
        token = {"targets": slab.targets_T if self.with_logprobs else None, "tokens": slab.tokens}
        if self.tile is not None:
            if bias_sums is not None:
                bias_sums.zero_()  # nothing is written for tiles without a live token
            self.kernels.linear_kl_backward(
                policy_hidden=slab.hidden_TD, reference_hidden=self.reference_slab.buffer_TD, policy_weight=self.weight_VD,
                reference_weight=self.reference.weight_VD, count=self.live.count, first=slab.first, tile=self.tile, **out, **token,
                **self.heads,
            )  # fmt: skip
            return
        x_TC, y_TC = (logits_TC[:, : end - begin] for logits_TC in (self.logits_TC, self.reference_TC))
        product(slab.hidden_TD, chunk.weight_CD.T, out=x_TC)
        product(self.reference_slab.buffer_TD, self.reference_CE.T, out=y_TC)
        self.kernels.kl_gradient_logits(policy=x_TC, reference=y_TC, live=slab.live_T, **out, **token, **self.heads)
