"""Hidden states and an LM head -> the loss of an objective of tokens, without the logits.

Letters: N tokens of a packed batch, D hidden size, V vocabulary, S completions.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from isdaa_kernels.divergence import check_direction
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.objectives import Objective, SamplerCorrection
from isdaa_kernels.packed_batch import check_batch, check_exact, check_reference, evaluate, evaluate_both
from isdaa_kernels.policy_loss import PolicyLoss, TokenInputs, check_policy
from isdaa_kernels.routing import Routed
from isdaa_kernels.vocab_order import VocabOrder


def linear_policy_loss(
    hidden: Tensor,
    head: LMHead | Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    advantages: Tensor | None = None,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    reference: tuple[Tensor, LMHead | Tensor] | None = None,
    sampler_logprob: Tensor | None = None,
    objective: str | Objective = "grpo",
    reduction: str | None = None,
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    correction: SamplerCorrection | None = None,
    off_policy_threshold: float | None = None,
    kl_weight: float = 0.0,
    kl_corrected: bool = False,
    kl_direction: Literal["forward", "reverse", "jsd"] | None = None,
    token_kl: Tensor | None = None,
    entropy_weight: float = 0.0,
    monitors: Sequence[str] = (),
    top_k: int = 20,
    values: Tensor | None = None,
    rewards: Tensor | None = None,
    step_cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    max_scored: int | None = None,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    validate: bool = False,
    **options: object,
) -> PolicyLoss:
    """The loss of an objective of tokens over packed completions, from their hidden states.

    Equal to::

        logprob, stats = linear_logprob_stats(hidden, head.weight, targets, stats=monitors, ...)      # [N]
        loss, metrics = policy_loss(logprob, cu_seqlens, mask=targets != ignore_index, stats=stats, objective=objective, ...)

    The [N, V] logits are never allocated; one coefficient a token, and one for its entropy where entropy_weight is above 0, enters the
    backward of `linear_logprob`.

    hidden         [N, D] or [1, N, D]; differentiable, as are the head's weight and bias.
    head           an `LMHead`, or its weight [V, D].
    targets        [N] or [1, N], shifted already (`shift_targets`); `ignore_index` marks tokens that are not scored.
    cu_seqlens     [S + 1] int32 or int64, where completions start (with their prompts, which are not scored), and N.
    reference_logprob
                   [N] or [1, N]. Or `reference`: (hidden, head) of the reference model, of the same vocabulary, evaluated here without
                   gradient, with the options of the policy.
    kl_direction   the divergence of kl_weight is the exact one over the vocabulary, from `reference`, in the place of its k3 estimate: the
                   `token_kl` of `linear_kl` in that direction ("reverse" is KL(policy || reference)), from the same pass as both log-probs
                   and the same backward. It needs gradient="exact".
    monitors       statistics of the vocabulary for the metrics, of `linear_logprob_stats`, made in the same pass: "entropy", "top_k_mass",
                   "top_k_entropy" (beside kl_direction in a pass of their own). Those that are not in the loss come without gradient, and
                   may stand beside `Routed`. top_k as there.
    temperature    that of the sampler, as in `linear_logprob`; max_scored, gradient, vocab_order, max_workspace_mb, backend, validate, too.
    the others     as in `policy_loss`.

    A completion without scored tokens is empty and gives no gradient. Raises ValueError for arguments other than these, before any work.
    """
    token_shape = check_batch(hidden, targets, cu_seqlens, validate)
    N, S = token_shape.numel(), cu_seqlens.numel() - 1
    if isinstance(monitors, str):
        raise ValueError(f"monitors: expected a sequence of names, got {monitors!r}")
    wanted = tuple(monitors) if entropy_weight == 0 or "entropy" in monitors else (*monitors, "entropy")
    inputs = {
        "advantages": advantages, "old_logprob": old_logprob, "reference_logprob": reference_logprob, "values": values,
        "sampler_logprob": sampler_logprob, "rewards": rewards, "token_kl": token_kl, "token_weight": token_weight,
        "step_cu_seqlens": step_cu_seqlens,
    }  # fmt: skip
    made = {"entropy"} if "entropy" in wanted else set()
    made |= set() if reference is None else {"reference"}
    terms = check_policy(
        N, S, hidden.device, TokenInputs(None, cu_seqlens, **inputs), objective=objective, reduction=reduction,
        max_length=max_length, denominator=denominator, correction=correction, off_policy_threshold=off_policy_threshold,
        kl_weight=kl_weight, kl_corrected=kl_corrected, entropy_weight=entropy_weight, made=made, **options,
    )  # fmt: skip
    check_reference(reference_logprob, reference, token_shape, head)
    if kl_direction is not None:
        _check_direction(kl_direction, kl_weight, reference, token_kl)
        check_exact("with kl_direction", gradient, vocab_order)

    kernel = {"temperature": temperature, "ignore_index": ignore_index, "max_scored": max_scored}
    kernel |= {"gradient": gradient, "vocab_order": vocab_order}
    kernel |= {"max_workspace_mb": max_workspace_mb, "backend": backend, "validate": validate}
    detached = [name for name in wanted if name != "entropy" or entropy_weight == 0]
    # the policy's statistics first: what they refuse is refused before any work
    if kl_direction is not None:
        stats = None
        if wanted:
            with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_weight > 0):
                _, stats = evaluate(hidden, head, targets, kernel, wanted, detached, top_k)
        found = evaluate_both(hidden, head, reference, targets, kernel, kl_direction)
        inputs["token_kl"], policy_N, inputs["reference_logprob"] = found
    else:
        policy_N, stats = evaluate(hidden, head, targets, kernel, wanted, detached, top_k)
        if reference is not None:
            with torch.no_grad():
                inputs["reference_logprob"], _ = evaluate(*reference, targets, kernel)
    return terms.loss(TokenInputs(policy_N, cu_seqlens, targets != ignore_index, stats=stats, **inputs))


def _check_direction(direction: str, kl_weight: float, reference: tuple | None, token_kl: Tensor | None) -> None:
    check_direction(direction, None)
    if kl_weight == 0:
        raise ValueError("kl_direction: would be ignored without a kl_weight above 0; expected None")
    if reference is None:
        raise ValueError("reference: expected (hidden, head) of the reference model for kl_direction, got None")
    if token_kl is not None:
        raise ValueError("kl_direction, token_kl: expected one of the two, got both")
