"""Divergence of the distributions of two LM heads, token by token, without the logits of either.

N tokens, D hidden size (E that of the reference), V vocabulary.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from isdaa_kernels import ops
from isdaa_kernels.arguments import autocast, check_floats, check_targets, split_temperature
from isdaa_kernels.divergence import check_direction
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.targets import raise_bad_targets
from isdaa_kernels.workspace import check_workspace


class KlLogprobs(NamedTuple):
    """Of each token, [...] as the targets: `linear_kl`'s divergence, and log-probs of the target as `linear_logprob` has them. Divergence
    and logprob have a gradient to the policy, reference_logprob has none."""

    divergence: Tensor
    logprob: Tensor
    reference_logprob: Tensor


def linear_kl(
    policy_hidden: Tensor,
    policy_head: LMHead | Tensor,
    reference_hidden: Tensor,
    reference_head: LMHead | Tensor,
    *,
    direction: Literal["forward", "reverse", "jsd"],
    targets: Tensor | None = None,
    jsd_weight: float | None = None,
    logprobs: bool = False,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    max_scored: int | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor | KlLogprobs:
    """Divergence between the policy's and the reference's distribution over the vocabulary at each token. Equal to

        log_p, log_q = ((z / temperature).log_softmax(-1) for z in (policy_logits, reference_logits))
        forward = (log_q.exp() * (log_q - log_p)).sum(-1)                   # KL(reference || policy)
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1)                   # KL(policy || reference)
        log_m = logaddexp(log_p + log(1 - w), log_q + log(w))               # w = jsd_weight
        jsd = ((1 - w) * log_p.exp() * (log_p - log_m) + w * log_q.exp() * (log_q - log_m)).sum(-1)

    with logits as in `linear_logprob`, in fp32. Neither head's logits [..., V] are ever allocated: they exist one tile at a time, in
    fp32 (fp64 for fp64 inputs). One pass over both heads forward, one backward; jsd, which needs both log-sum-exps before its first
    term, has a tile span the vocabulary where the workspace allows that (by default 128 tokens or more; on CUDA 256 or more in up to
    256 MiB), else, and with Triton always, it passes twice.

    Only the policy's hidden states, weight and bias have a gradient; which of them need one is respected, and the reference's never
    do. With p, q, m the probabilities and z the policy's final logits,

        d forward / dz[j] = p[j] - q[j]
        d reverse / dz[j] = p[j] (log(p[j] / q[j]) - reverse)
        d jsd / dz[j] = (1 - w) p[j] (log(p[j] / m[j]) - KL(p || m))

    The last since, with m[j] = (1 - w) p[j] + w q[j],

        d jsd / dp[j] = (1 - w) (log(p[j] / m[j]) + 1) - (1 - w) ((1 - w) p[j] + w q[j]) / m[j] = (1 - w) log(p[j] / m[j])

    and the softmax turns a gradient u with regard to p into p[j] (u[j] - sum of p u).

    Sums are of terms b (exp(x) - 1 - x) with x = log(o / b), none of which is negative: they add up to KL(b || o), and divergences near
    0 keep their digits. Identical heads give exactly 0 and gradients of exactly 0. A vocabulary row without probability in both heads
    (bias -inf) adds 0. Where one lacks a row that the other has, jsd is finite; forward is inf where the policy lacks it, with the
    finite gradient above; reverse is inf where the reference lacks it, and its gradient is no number. "Has" means a probability above
    e^-87 of the token's largest.

    With `logprobs` the log-probs of the targets under both models come from the same pass, and the policy's joins the same backward: not
    one product more. Apart, `linear_logprob` would take one of each head forward and three backward.

    policy_hidden [..., D], reference_hidden [..., E]: fp16, bf16, fp32 or fp64, dtypes may differ, any strides. Heads: `LMHead`s, or
    weights [V, D] and [V, E]. targets [...]: int64 or int32, of which without `logprobs` only counts whether they are `ignore_index`;
    None, not with `logprobs`, scores every token. jsd_weight: of the reference in the mixture, 0.5 by default, beta in GKD and TRL; only
    with "jsd". temperature: a positive number, or one a token [...], for both heads; not differentiable. max_scored, max_workspace_mb,
    backend, validate, autocast (which casts the reference too): as in `linear_logprob`. A second derivative raises RuntimeError.

    Returns fp32 [...] (fp64 for fp64 inputs), 0 where the target is ignored; with `logprobs` a KlLogprobs of three such. Raises ValueError
    for shapes, dtypes, devices and values that do not fit, NoBackend where no backend takes the problem.
    """
    policy, reference = (head if isinstance(head, LMHead) else LMHead(head) for head in (policy_head, reference_head))
    weight_of_reference = check_direction(direction, jsd_weight)
    if logprobs and targets is None:
        raise ValueError("targets: expected one for each token with logprobs=True, got None")
    _check_tensors(policy_hidden, policy, reference_hidden, reference, targets, ignore_index)
    shape, (V, D) = policy_hidden.shape[:-1], policy.weight.shape
    N = shape.numel()
    if max_scored is not None and not (isinstance(max_scored, int) and 0 <= max_scored <= N):
        raise ValueError(f"max_scored: expected 0 to {N} (the number of tokens), got {max_scored}")
    check_workspace(max_workspace_mb)
    constant, per_token = split_temperature(temperature, policy_hidden[..., 0])
    hidden, policy_weight, other_hidden, other_weight = autocast(
        policy_hidden, policy.weight, reference_hidden, reference.weight
    )
    targets_N = None if targets is None else targets.reshape(N)
    if validate and targets_N is not None:
        raise_bad_targets(targets_N, V, ignore_index)
    grad = torch.is_grad_enabled()
    divergence_N, logprob_2N, _ = ops.linear_kl_forward(
        hidden.reshape(N, D),
        policy_weight,
        policy.bias,
        other_hidden.detach().reshape(N, other_hidden.shape[-1]),
        other_weight.detach(),
        None if reference.bias is None else reference.bias.detach(),
        targets_N,
        per_token,
        constant,
        [float(policy.logit_scale), float(reference.logit_scale)],
        [0.0 if head.softcap is None else float(head.softcap) for head in (policy, reference)],
        ignore_index,
        N if max_scored is None else max_scored,
        direction,
        weight_of_reference,
        bool(logprobs),
        None if max_workspace_mb is None else float(max_workspace_mb),
        [grad and tensor.requires_grad for tensor in (hidden, policy_weight)],
        backend,
    )
    divergence = divergence_N.reshape(shape)
    if not logprobs:
        return divergence
    return KlLogprobs(divergence, logprob_2N[0].reshape(shape), logprob_2N[1].detach().reshape(shape))


def _check_tensors(
    policy_hidden: Tensor,
    policy: LMHead,
    reference_hidden: Tensor,
    reference: LMHead,
    targets: Tensor | None,
    ignore_index: int,
) -> None:
    for name, hidden, head in (("policy", policy_hidden, policy), ("reference", reference_hidden, reference)):
        V, D = head.weight.shape
        if hidden.dim() == 0 or hidden.shape[-1] != D:
            raise ValueError(f"{name}_hidden: expected [..., {D}] to fit its head [{V}, {D}], got {list(hidden.shape)}")
        if D == 0 or V == 0:
            raise ValueError(f"{name}_head: expected at least one row and one column, got [{V}, {D}]")
        for part, tensor in (("hidden", hidden), ("head", head.weight), ("head's bias", head.bias)):
            check_floats(f"{name}_{part}", tensor, policy_hidden, "policy_hidden is")
    if len(reference.weight) != len(policy.weight):
        raise ValueError(
            f"reference_head: expected the policy's {len(policy.weight)} vocabulary rows, got {len(reference.weight)}"
        )
    leading = policy_hidden.shape[:-1]
    if reference_hidden.shape[:-1] != leading:
        raise ValueError(
            f"reference_hidden: expected {list(leading)} tokens as policy_hidden, got {list(reference_hidden.shape[:-1])}"
        )
    if targets is not None:
        check_targets(targets, leading, "policy_hidden", ignore_index)
        if targets.device != policy_hidden.device:
            raise ValueError(
                f"targets: expected to be on {policy_hidden.device} as policy_hidden is, got {targets.device}"
            )
