"""What a kernel set gives to the passes of `linear_kl`, beside what `kernels` says. The same letters, and E hidden size of the reference.

`heads` are a policy's and a reference's numbers as arguments of each kernel: policy_bias, reference_bias [V] or None, policy_scale,
policy_softcap, reference_scale, reference_softcap (None: none), direction, jsd_weight.

partial fp32 [R, S, T], a slot of each token for as many columns as the set says, all at once or chunk by chunk; R = 9, forward 10:

    0 to 3  maximum and sum of exponentials of the policy, of the reference
    4, 5    column of the policy's largest logit, an int32 in the bits; z of the reference - z of the policy there (0 if not finite)
    6 to 8  of forward and reverse, with d = z of other - z of base, b = exp(z of base - its maximum), center: d where the base is
            largest (of reverse row 5, of forward row 9), x = d - center and excess(x) = exp(x) - 1 - x: the sums of b x, and of
            b excess(x) but for the exponentials of the other where |x| > 1/2, and the sum of those;
            of jsd's second pass the shares of KL(p || m), of KL(q || m), of the mean of log(p / m) under p

tokens fp32 [13, T], as `kl_tokens` makes them: inverse temperature, 2 ** -r, log-sum-exp of the policy in two parts, coefficient, that
of the reference in two parts, 2 ** r, the target's own entry, the exponent of d_hidden, the difference of the log-sum-exps (of reverse
plus the mean of log(p / q)) in two parts, the mean of log(p / m). The target of a token is the column with
the largest entry of the gradient among the policy's likeliest of each slot: its entry stands outside the 16-bit chunk, in fp32, as that
of `linear_logprob`'s targets does.
"""

from typing import Protocol

from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import FusedTile, Kernels


class KlKernels(Kernels, Protocol):
    def linear_kl_forward(
        self, *, policy_hidden: Tensor, reference_hidden: Tensor, policy_weight: Tensor, reference_weight: Tensor,
        inverse_temperature: Tensor, tokens: Tensor | None, count: Tensor, partial: Tensor, first: int, tile: FusedTile, **heads,
    ) -> None:  # fmt: skip
        """partial of the slab [T, D], [T, E] and all rows of both weights. With tokens the shares of jsd's second pass."""

    def linear_kl_backward(
        self, *, policy_hidden: Tensor, reference_hidden: Tensor, policy_weight: Tensor, reference_weight: Tensor, targets: Tensor,
        tokens: Tensor, weight_entry: Tensor, count: Tensor, out: Tensor, bias_sums: Tensor | None, first: int, begin: int, end: int,
        tile: FusedTile, **heads,
    ) -> None:  # fmt: skip
        """out [T, end - begin] in the dtype of policy_hidden: gradient of the policy's product, 0 in the targets' columns and in rows that
        are not live. The targets' entries go to row 8 of tokens and, times row 7, to weight_entry fp32 [T]. bias_sums as in
        `linear_logprob_backward`."""

    def kl_fold_logits(
        self, *, policy: Tensor, reference: Tensor, inverse_temperature: Tensor, tokens: Tensor | None, count: Tensor, partial: Tensor,
        first: int, begin: int, end: int, **heads,
    ) -> None:  # fmt: skip
        """`linear_kl_forward` of both products fp32 [T, end - begin], from the slot begin / fold_columns on."""

    def kl_gradient_logits(
        self, *, policy: Tensor, reference: Tensor, out: Tensor, targets: Tensor, tokens: Tensor, weight_entry: Tensor, live: Tensor,
        bias_sums: Tensor | None, begin: int, end: int, **heads,
    ) -> None:  # fmt: skip
        """`linear_kl_backward` of both products; out may be policy. live uint8 [T]; bias_sums fp32 [ceil(T / kl_gradient_rows), C]."""

    def kl_combine(
        self, *, partial: Tensor, rows: Tensor, count: Tensor, value: Tensor, numbers: Tensor, first: int, direction: str,
    ) -> None:  # fmt: skip
        """numbers fp64 [4, N] of the live tokens: the policy's log-sum-exp, the target, the log-sum-exps' difference, the divergence, which
        goes to value fp32 [N] too; of jsd the first and the third alone."""

    def kl_combine_mixture(
        self, *, partial: Tensor, rows: Tensor, count: Tensor, value: Tensor, numbers: Tensor, first: int, jsd_weight: float,
    ) -> None:  # fmt: skip
        """jsd's value, and in numbers the target and the mean of log(p / m)."""
