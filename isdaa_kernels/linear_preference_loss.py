"""Hidden states and an LM head -> the loss of a preference objective, without the logits.

Letters: N tokens of a packed batch, D hidden size, V vocabulary, S sequences, P preference pairs.
"""

from typing import Literal

import torch
from torch import Tensor

from isdaa_kernels.linear_logprob import linear_logprob
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.objectives import ImportanceWeight, Objective
from isdaa_kernels.preference_loss import PreferenceLoss, check_preference, preference_loss
from isdaa_kernels.routing import Routed
from isdaa_kernels.sequence_logprob import check_cu_seqlens, sequence_length, sequence_logprob
from isdaa_kernels.vocab_order import VocabOrder


def linear_preference_loss(
    hidden: Tensor,
    head: LMHead | Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    reference_logprob: Tensor | None = None,
    reference: tuple[Tensor, LMHead | Tensor] | None = None,
    objective: str | Objective = "is_dpo",
    behaviour_logprob: Tensor | None = None,
    importance: ImportanceWeight | None = None,
    pairs: Tensor | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    max_scored: int | None = None,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    validate: bool = False,
    **options: float | Tensor,
) -> PreferenceLoss:
    """The loss of preference pairs from the hidden states of a packed batch.

    Equal to::

        logprob = linear_logprob(hidden, head.weight, targets, ...)              # [N]
        policy = sequence_logprob(logprob, cu_seqlens)                           # [S], fp64
        loss, metrics = preference_loss(policy, reference, objective=objective, lengths=..., ...)

    The [N, V] logits are never allocated; one coefficient a token enters the backward of `linear_logprob`.

    hidden             [N, D] or [1, N, D]; differentiable, as are the head's weight and bias.
    head               an `LMHead`, or its weight [V, D].
    targets            [N] or [1, N], shifted already (`shift_targets`); `ignore_index` marks tokens that are not
                       scored.
    cu_seqlens         [S + 1] int32 or int64, all tokens counted. Chosen sequences come first, then the rejected ones
                       in the same order, unless `pairs` says otherwise.
    reference_logprob  log-probs under the reference, per token [N] or [1, N] (what lies at ignored tokens is not read)
                       or per sequence [S]. Or `reference`: (hidden, head) of the reference model, evaluated here
                       without gradient, with the options of the policy. Exactly one of the two.
    behaviour_logprob  like reference_logprob, under the policy that wrote the completions; default: the reference.
    temperature, max_scored, gradient, vocab_order, max_workspace_mb, backend, validate    as in `linear_logprob`.
    the others         as in `preference_loss`.

    A sequence without scored tokens is empty: its pair has weight 0 and gives no gradient. Raises ValueError for
    arguments other than these, before any work.
    """
    token_shape = _check_batch(hidden, targets, cu_seqlens, validate)
    S = cu_seqlens.numel() - 1
    settings = {"objective": objective, "importance": importance, "pairs": pairs, "sample_weight": sample_weight}
    settings |= {"denominator": denominator, **options}
    check_preference(S, hidden.device, has_lengths=True, has_behaviour=behaviour_logprob is not None, **settings)
    _check_reference(reference_logprob, reference, token_shape)
    for name, logprob in (("reference_logprob", reference_logprob), ("behaviour_logprob", behaviour_logprob)):
        _check_logprob(name, logprob, token_shape, S, hidden.device)

    kernel = {"temperature": temperature, "ignore_index": ignore_index, "max_scored": max_scored}
    kernel |= {"gradient": gradient, "vocab_order": vocab_order}
    kernel |= {"max_workspace_mb": max_workspace_mb, "backend": backend, "validate": validate}
    scored_N = (targets != ignore_index).reshape(-1)
    if reference is None:
        reference_S = _as_sums(reference_logprob, scored_N, cu_seqlens)
    else:
        with torch.no_grad():
            reference_S = _evaluate(*reference, targets, cu_seqlens, kernel)
    policy_S = _evaluate(hidden, head, targets, cu_seqlens, kernel)
    behaviour_S = None if behaviour_logprob is None else _as_sums(behaviour_logprob, scored_N, cu_seqlens)
    lengths_S = sequence_length(scored_N, cu_seqlens)
    return preference_loss(policy_S, reference_S, lengths=lengths_S, behaviour=behaviour_S, **settings)


def _evaluate(hidden: Tensor, head: LMHead | Tensor, targets: Tensor, cu_seqlens: Tensor, kernel: dict) -> Tensor:
    """Sums of the token log-probs, fp64 [S]."""
    head = head if isinstance(head, LMHead) else LMHead(head)
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    logprob = linear_logprob(hidden, head.weight, targets, **transforms, **kernel)
    return sequence_logprob(logprob.reshape(-1), cu_seqlens)


def _as_sums(logprob: Tensor, scored_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Log-probs that were given, per token or per sequence, as sums [S]."""
    if logprob.numel() == scored_N.numel():
        return sequence_logprob(logprob.detach().reshape(-1), cu_seqlens, mask=scored_N)
    return logprob.detach()


def _check_batch(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, validate: bool) -> torch.Size:
    """The shape of the tokens, [N] or [1, N], after checking that the batch is packed."""
    if hidden.ndim not in (2, 3) or (hidden.ndim == 3 and hidden.shape[0] != 1):
        raise ValueError(f"hidden: expected [N, D] or [1, N, D], got {list(hidden.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: expected {list(hidden.shape[:-1])}, got {list(targets.shape)}")
    check_cu_seqlens(cu_seqlens, targets.numel(), hidden.device, validate=validate)
    return targets.shape


def _check_reference(reference_logprob: Tensor | None, reference: tuple | None, token_shape: torch.Size) -> None:
    if (reference_logprob is None) == (reference is None):
        got = "neither" if reference is None else "both"
        raise ValueError(f"reference_logprob, reference: expected exactly one of the two, got {got}")
    if reference is None:
        return
    if not isinstance(reference, tuple) or len(reference) != 2:
        raise ValueError(f"reference: expected a tuple (hidden, head), got {type(reference).__name__}")
    if reference[0].shape[:-1] != token_shape:
        raise ValueError(f"reference: expected hidden {[*token_shape, 'D']}, got {list(reference[0].shape)}")


def _check_logprob(name: str, logprob: Tensor | None, token_shape: torch.Size, S: int, device: torch.device) -> None:
    if logprob is None:
        return
    N = token_shape.numel()
    if tuple(logprob.shape) not in ((N,), (1, N), (S,)):
        raise ValueError(
            f"{name}: expected [{N}] or [1, {N}] per token, or [{S}] per sequence, got {list(logprob.shape)}"
        )
    if N == S and logprob.ndim == 1:
        raise ValueError(f"{name}: [{N}] could be per token or per sequence here; expected [1, {N}] per token")
    if not logprob.is_floating_point() or logprob.device != device:
        raise ValueError(f"{name}: expected a floating dtype on {device}, got {logprob.dtype} on {logprob.device}")
