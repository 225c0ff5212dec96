"""What a kernel set gives to the passes of `linear_kl`, beside what `kernels` says. The same letters, and E hidden size of the reference.

`heads` are a policy's and a reference's numbers as arguments of each kernel: policy_bias, reference_bias [V] or None, policy_scale,
policy_softcap, reference_scale, reference_softcap (None: none), direction, jsd_weight.

partial fp32 [kl_partial_rows, S, T]: a slot of each token for as many columns as the set says, all at once or chunk by chunk. What its
rows are is the set's affair. In both sets, with d = z of other - z of base, b = exp(z of base - its maximum), center: d where the base is
largest (the policy is the base of reverse, the reference of forward), x = d - center and excess(x) = exp(x) - 1 - x: maximum and sum of
exponentials of both heads, terms equal to 1 apart, beside which the small ones would lose their digits; center; the sums of b x, of
b excess(x) but for the exponentials of the other where |x| > 1/2, and of those. Of jsd's second pass, in the place of the first one's:
the shares of KL(p || m), of KL(q || m), of the mean of log(p / m) under p.

target_logit fp32 [2, T]: final logits of the targets int32 [T] of policy and reference, where log-probs are wanted; else both are None.

tokens fp32 [KL_TOKEN_ROWS, T], as `kl_tokens` makes them.
"""

from typing import Protocol

from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import FusedTile, Kernels, Shapes


class KlShapes(Shapes, Protocol):
    kl_gradient_rows: int  # tokens of a tile of `kl_gradient_logits`: a row of bias_sums each

    def kl_partial_rows(self, direction: str) -> int: ...


class KlKernels(KlShapes, Kernels, Protocol):
    def linear_kl_forward(
        self, *, policy_hidden: Tensor, reference_hidden: Tensor, policy_weight: Tensor, reference_weight: Tensor,
        inverse_temperature: Tensor, tokens: Tensor | None, targets: Tensor | None, target_logit: Tensor | None, count: Tensor,
        partial: Tensor, first: int, tile: FusedTile, **heads,
    ) -> None:  # fmt: skip
        """partial of the slab [T, D], [T, E] and all rows of both weights. With tokens the shares of jsd's second pass."""

    def linear_kl_backward(
        self, *, policy_hidden: Tensor, reference_hidden: Tensor, policy_weight: Tensor, reference_weight: Tensor,
        targets: Tensor | None, tokens: Tensor, count: Tensor, out: Tensor, low: Tensor | None, bias_sums: Tensor | None, first: int,
        begin: int, end: int, tile: FusedTile, **heads,
    ) -> None:  # fmt: skip
        """out [T, end - begin]: gradient of the policy's product, 0 in rows that are not live; low: what rounding it left, divided by
        LOW_SCALE. With targets the log-prob's part too. bias_sums as in `linear_logprob_backward`, times row 7 of tokens."""

    def kl_fold_logits(
        self, *, policy: Tensor, reference: Tensor, inverse_temperature: Tensor, tokens: Tensor | None, targets: Tensor | None,
        target_logit: Tensor | None, count: Tensor, partial: Tensor, first: int, begin: int, end: int, **heads,
    ) -> None:  # fmt: skip
        """`linear_kl_forward` of both products fp32 [T, end - begin], from the slot begin / fold_columns on."""

    def kl_gradient_logits(
        self, *, policy: Tensor, reference: Tensor, out: Tensor, low: Tensor | None, targets: Tensor | None, tokens: Tensor, live: Tensor,
        bias_sums: Tensor | None, begin: int, end: int, **heads,
    ) -> None:  # fmt: skip
        """`linear_kl_backward` of both products. fp32 out may be policy; where `narrows_in_place`, out and low may be at the addresses of
        the rows of policy and of reference. live uint8 [T]; bias_sums fp32 [ceil(T / kl_gradient_rows), C]."""

    def kl_combine(
        self, *, partial: Tensor, rows: Tensor, count: Tensor, targets: Tensor | None, target_logit: Tensor | None, value: Tensor,
        numbers: Tensor, logprob: Tensor | None, first: int, direction: str,
    ) -> None:  # fmt: skip
        """numbers fp64 [4, N] of the live tokens: both log-sum-exps, the policy's minus the reference's, the divergence, which goes to
        value fp32 [N] too; of jsd the first three alone. logprob fp32 [2, N] of those whose target is a vocabulary row."""

    def kl_combine_mixture(
        self, *, partial: Tensor, rows: Tensor, count: Tensor, value: Tensor, numbers: Tensor, first: int, jsd_weight: float,
    ) -> None:  # fmt: skip
        """jsd's value, and the last row of numbers: the mean of log(p / m) under p."""
