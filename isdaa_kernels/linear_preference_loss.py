"""Hidden states and an LM head -> the loss of a preference objective, without the logits.

Letters: N tokens of a packed batch, D hidden size, V vocabulary, S sequences, P preference pairs, G groups, H earlier policies.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.objectives import BatchState, Objective, SequenceInputs, Weighting
from isdaa_kernels.objectives.objective import keyword_defaults
from isdaa_kernels.packed_batch import check_batch, check_exact, check_reference, evaluate, evaluate_both
from isdaa_kernels.preference_loss import PreferenceLoss, dense_preference_loss, fused_preference_loss
from isdaa_kernels.preference_terms import PreferenceTerms, check_preference, check_sequences
from isdaa_kernels.routing import Routed
from isdaa_kernels.sequence_logprob import sequence_length, sequence_logprob, token_place
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
    importance: Weighting | None = None,
    pairs: Tensor | None = None,
    groups: int | Tensor | None = None,
    rewards: Tensor | None = None,
    opponents: Tensor | None = None,
    desirable: Tensor | None = None,
    mismatched: Tensor | None = None,
    token_weight: Tensor | None = None,
    reference_kl: Tensor | None = None,
    state: BatchState | None = None,
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
    **options: object,
) -> PreferenceLoss:
    """The loss of an objective over preference pairs, completions or groups, from the hidden states of a packed batch.

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
                       without gradient, with the options of the policy. One of the two, unless the objective does without.
    behaviour_logprob  like reference_logprob, under the policy that wrote the completions; default: the reference.
    token_weight       [N] or [1, N], a constant factor for the log-prob of each token in the sums of policy, reference and
                       behaviour (which then must be per token): segment labels of +1 and -1, masks, decays. Counts of
                       tokens do not change. An importance weight is that of the weighted sums.
    reference_kl       KL(reference || policy) of each token's distribution, per token [N] or [1, N] (what lies at ignored tokens
                       is not read), or summed per sequence [S]; differentiable: `linear_kl(..., direction="forward")`. None, where
                       the objective needs it: made from `reference` in the pass of both log-probs; not with `Routed`.
    temperature, max_scored, gradient, vocab_order, max_workspace_mb, backend, validate    as in `linear_logprob`.
    the others         as in `preference_loss`.

    Sums of squared probabilities are made in the same pass where the objective or its weight needs them, the weights of an
    objective that weighs tokens before the sums.

    A sequence without scored tokens is empty: its pair has weight 0 and gives no gradient. Raises ValueError for
    arguments other than these, before any work.
    """
    token_shape = check_batch(hidden, targets, cu_seqlens, validate)
    S = cu_seqlens.numel() - 1
    by_sequence = {"rewards": rewards, "opponents": opponents, "desirable": desirable, "mismatched": mismatched}
    check_sequences(S, hidden.device, **by_sequence)
    given = {**by_sequence, "token_weight": token_weight, "behaviour": behaviour_logprob}
    given |= {"reference_kl": reference_kl}
    given |= {"reference": reference_logprob if reference is None else reference}
    terms = check_preference(
        S,
        hidden.device,
        given={name for name, value in given.items() if value is not None},
        made={"lengths", "log_sum_sq_prob", "kl_score"} | (set() if reference is None else {"reference_kl"}),
        objective=objective,
        importance=importance,
        pairs=pairs,
        groups=groups,
        sample_weight=sample_weight,
        denominator=denominator,
        state=state,
        **options,
    )
    check_reference(reference_logprob, reference, token_shape, head)
    by_token_or_sequence = {"reference_logprob": reference_logprob, "behaviour_logprob": behaviour_logprob}
    for name, logprob in (by_token_or_sequence | {"reference_kl": reference_kl}).items():
        _check_logprob(name, logprob, token_shape, S, hidden.device)
    _check_token_weight(token_weight, token_shape, hidden.device)
    with_kl = "reference_kl" in terms.needs and reference_kl is None
    if with_kl:
        check_exact(f"for {terms.objective.name!r}", gradient, vocab_order)
    _check_by_token(terms, token_weight is not None, token_shape, reference_logprob, behaviour_logprob, by_sequence)

    kernel = {"temperature": temperature, "ignore_index": ignore_index, "max_scored": max_scored}
    kernel |= {"gradient": gradient, "vocab_order": vocab_order}
    kernel |= {"max_workspace_mb": max_workspace_mb, "backend": backend, "validate": validate}
    squares = ("log_sum_sq_prob",) if "log_sum_sq_prob" in terms.needs else ()
    if with_kl:
        reference_kl, policy_N, reference_logprob = evaluate_both(hidden, head, reference, targets, kernel, "forward")
        with torch.no_grad():
            _, stats = evaluate(hidden, head, targets, kernel, squares) if squares else (None, None)
    else:
        if reference is not None:
            with torch.no_grad():
                reference_logprob, _ = evaluate(*reference, targets, kernel)
        policy_N, stats = evaluate(hidden, head, targets, kernel, squares)
    log_sum_sq_prob_N = stats.log_sum_sq_prob.reshape(-1) if squares else None
    logprobs = _Logprobs(
        policy_N, reference_logprob, behaviour_logprob, log_sum_sq_prob_N, targets.reshape(-1), cu_seqlens, ignore_index
    )
    logprobs = logprobs.with_kl_score() if "kl_score" in terms.needs else logprobs
    logprobs = logprobs.weigh_tokens(terms, token_weight)
    fused = terms.fused(hidden.device, backend)
    if fused is not None:
        return logprobs.fused_loss(terms, fused)
    return logprobs.dense_loss(terms, reference_kl, **by_sequence)


@dataclass(frozen=True)
class _Logprobs:
    """Log-probs of a packed batch: the policy's by token, the others by token [N] or [1, N], or by sequence [S]."""

    policy_N: Tensor
    reference: Tensor | None
    behaviour: Tensor | None
    log_sum_sq_prob_N: Tensor | None
    targets_N: Tensor
    cu_seqlens: Tensor
    ignore_index: int
    kl_score_N: Tensor | None = None

    def with_kl_score(self) -> "_Logprobs":
        """The same with stopgrad(log policy - log reference) * log policy of each token."""
        scored_N = self.targets_N != self.ignore_index
        log_ratio_N = torch.where(scored_N, self.policy_N.detach() - self.reference.detach().reshape(-1), 0)
        return replace(self, kl_score_N=log_ratio_N.double() * self.policy_N)

    def weigh_tokens(self, terms: PreferenceTerms, token_weight: Tensor | None) -> "_Logprobs":
        """The same with the caller's weights, then the objective's, in fp64."""
        found = self
        if token_weight is not None:
            found = found._times(token_weight.detach().reshape(-1), weigh_reference=True)
        objective = terms.objective
        if objective.token_weight is not None:
            options = {name: terms.options[name] for name in keyword_defaults(objective.token_weight)}
            place = token_place(self.targets_N != self.ignore_index, self.cu_seqlens, terms.rows)
            found = found._times(objective.token_weight(place, **options), objective.weigh_reference)
        return found

    def _times(self, weight_N: Tensor, weigh_reference: bool) -> "_Logprobs":
        # 0 where nothing is scored: what a caller has there is not read
        weight_N = torch.where(self.targets_N != self.ignore_index, weight_N.double(), 0)
        own = ("policy_N", "log_sum_sq_prob_N", "kl_score_N")
        others = {name: getattr(self, name) * weight_N for name in own if getattr(self, name) is not None}
        if weigh_reference:
            for name in ("reference", "behaviour"):
                logprob = getattr(self, name)
                if logprob is not None:
                    logprob_N = torch.where(weight_N == 0, 0, logprob.detach().reshape(-1).double())
                    others[name] = logprob_N * weight_N
        return replace(self, **others)

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

    def dense_loss(
        self, terms: PreferenceTerms, reference_kl: Tensor | None, **inputs: Tensor | None
    ) -> PreferenceLoss:
        scored_N = self.targets_N != self.ignore_index
        reference_S, behaviour_S = (
            None if logprob is None else self._sums(logprob.detach(), scored_N)
            for logprob in (self.reference, self.behaviour)
        )
        log_sum_sq_prob_S, kl_score_S = (
            None if value_N is None else sequence_logprob(value_N, self.cu_seqlens)
            for value_N in (self.log_sum_sq_prob_N, self.kl_score_N)
        )
        return dense_preference_loss(
            terms,
            SequenceInputs(
                sequence_logprob(self.policy_N, self.cu_seqlens),
                reference_S,
                sequence_length(scored_N, self.cu_seqlens),
                behaviour_S,
                log_sum_sq_prob=log_sum_sq_prob_S,
                kl_score=kl_score_S,
                reference_kl=None if reference_kl is None else self._sums(reference_kl, scored_N),
                **inputs,
            ),
        )

    def _by_token(self, logprob: Tensor) -> bool:
        return logprob.numel() == self.targets_N.numel()

    def _sums(self, logprob: Tensor, scored_N: Tensor) -> Tensor:
        if self._by_token(logprob):
            return sequence_logprob(logprob.reshape(-1), self.cu_seqlens, mask=scored_N)
        return logprob


def _check_token_weight(token_weight: Tensor | None, token_shape: torch.Size, device: torch.device) -> None:
    if token_weight is None:
        return
    if tuple(token_weight.shape) not in ((token_shape.numel(),), (1, token_shape.numel())):
        raise ValueError(f"token_weight: expected [{token_shape.numel()}], got {list(token_weight.shape)}")
    if not token_weight.is_floating_point() or token_weight.device != device:
        got = f"{token_weight.dtype} on {token_weight.device}"
        raise ValueError(f"token_weight: expected a floating dtype on {device}, got {got}")


def _check_by_token(
    terms: PreferenceTerms,
    has_weight: bool,
    token_shape: torch.Size,
    reference_logprob: Tensor | None,
    behaviour_logprob: Tensor | None,
    by_sequence: dict[str, Tensor | None],
) -> None:
    """ValueError for sums where what is computed of tokens would need more."""
    reference = ("reference_logprob", reference_logprob)
    wanted = {}
    if has_weight or (terms.objective.token_weight is not None and terms.objective.weigh_reference):
        wanted = {"where tokens are weighted": [reference, ("behaviour_logprob", behaviour_logprob)]}
        for name in ("opponents", "mismatched"):
            if by_sequence[name] is not None:
                raise ValueError(f"{name}: sums cannot be weighted by token, as the policy's are; expected None")
    if "kl_score" in terms.needs:
        wanted[f"for {terms.objective.name!r}"] = [reference]
    for why, logprobs in wanted.items():
        for name, logprob in logprobs:
            if logprob is not None and logprob.numel() != token_shape.numel():
                raise ValueError(f"{name}: expected one a token {why}, got {list(logprob.shape)}")


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
