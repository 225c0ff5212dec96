"""Hidden states and an LM head -> the loss of a preference objective, without the logits.

Letters: N tokens of a packed batch, D hidden size, V vocabulary, S sequences, P preference pairs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isdaa_kernels.linear_logprob import linear_logprob
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.objectives import ImportanceWeight, Objective
from isdaa_kernels.preference_loss import (
    PreferenceLoss,
    PreferenceTerms,
    check_preference,
    dense_preference_loss,
    fused_preference_loss,
)
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

    The [N, V] logits are never allocated; one coefficient a token enters the backward of `linear_logprob`. From the log-probs of the
    tokens to the loss it is one kernel, and one back, for what `isdaa_kernels.pair_loss` covers.

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
    terms = check_preference(
        S,
        hidden.device,
        objective=objective,
        importance=importance,
        pairs=pairs,
        sample_weight=sample_weight,
        denominator=denominator,
        has_lengths=True,
        has_behaviour=behaviour_logprob is not None,
        **options,
    )
    _check_reference(reference_logprob, reference, token_shape)
    for name, logprob in (("reference_logprob", reference_logprob), ("behaviour_logprob", behaviour_logprob)):
        _check_logprob(name, logprob, token_shape, S, hidden.device)

    kernel = {"temperature": temperature, "ignore_index": ignore_index, "max_scored": max_scored}
    kernel |= {"gradient": gradient, "vocab_order": vocab_order}
    kernel |= {"max_workspace_mb": max_workspace_mb, "backend": backend, "validate": validate}
    if reference is not None:
        with torch.no_grad():
            reference_logprob = _evaluate(*reference, targets, kernel)
    policy_N = _evaluate(hidden, head, targets, kernel)
    logprobs = _Logprobs(policy_N, reference_logprob, behaviour_logprob, targets.reshape(-1), cu_seqlens, ignore_index)
    fused = terms.fused(hidden.device, backend)
    return logprobs.dense_loss(terms) if fused is None else logprobs.fused_loss(terms, fused)


@dataclass(frozen=True)
class _Logprobs:
    """Log-probs of a packed batch: the policy's by token, the others by token [N] or [1, N], or by sequence [S]."""

    policy_N: Tensor
    reference: Tensor
    behaviour: Tensor | None
    targets_N: Tensor
    cu_seqlens: Tensor
    ignore_index: int

    def fused_loss(self, terms: PreferenceTerms, backend: str) -> PreferenceLoss:
        reference, behaviour = (
            None if logprob is None else logprob.reshape(-1) if self._by_token(logprob) else logprob[None]
            for logprob in (self.reference, self.behaviour)
        )
        return fused_preference_loss(
            terms,
            backend,
            self.policy_N,
            reference,
            behaviour,
            cu_seqlens=self.cu_seqlens,
            scored=self.targets_N,
            ignore_index=self.ignore_index,
        )

    def dense_loss(self, terms: PreferenceTerms) -> PreferenceLoss:
        scored_N = self.targets_N != self.ignore_index
        policy_S = sequence_logprob(self.policy_N, self.cu_seqlens)
        reference_S = self._sums(self.reference, scored_N)
        behaviour_S = None if self.behaviour is None else self._sums(self.behaviour, scored_N)
        return dense_preference_loss(
            terms, policy_S, reference_S, behaviour_S, sequence_length(scored_N, self.cu_seqlens)
        )

    def _by_token(self, logprob: Tensor) -> bool:
        return logprob.numel() == self.targets_N.numel()

    def _sums(self, logprob: Tensor, scored_N: Tensor) -> Tensor:
        if self._by_token(logprob):
            return sequence_logprob(logprob.detach().reshape(-1), self.cu_seqlens, mask=scored_N)
        return logprob.detach()


def _evaluate(hidden: Tensor, head: LMHead | Tensor, targets: Tensor, kernel: dict) -> Tensor:
    """Token log-probs [N]."""
    head = head if isinstance(head, LMHead) else LMHead(head)
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    return linear_logprob(hidden, head.weight, targets, **transforms, **kernel).reshape(-1)


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
