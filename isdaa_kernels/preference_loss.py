"""Sequence log-probs of policy and reference -> the loss of a preference objective, with its metrics.

Letters: S sequences, P preference pairs, G groups of at most K completions, H earlier policies, N tokens of a packed batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels.objectives import BatchState, Objective, SequenceInputs, Weighting
from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.importance import PairWeight
from isdaa_kernels.objectives.metrics import PAIR_METRICS, completion_metrics, group_metrics, pair_metrics
from isdaa_kernels.ops import pair_loss_forward
from isdaa_kernels.preference_terms import PreferenceTerms, check_preference, check_sequences, columns_of


class PreferenceLoss(NamedTuple):
    """The loss (differentiable fp32 scalar) and its metrics (`objectives.metrics`: detached fp32 scalars on the device)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def preference_loss(
    policy: Tensor,
    reference: Tensor | None = None,
    *,
    objective: str | Objective = "is_dpo",
    beta: float | Tensor | None = None,
    lengths: Tensor | None = None,
    behaviour: Tensor | None = None,
    importance: Weighting | None = None,
    pairs: Tensor | None = None,
    groups: int | Tensor | None = None,
    rewards: Tensor | None = None,
    opponents: Tensor | None = None,
    desirable: Tensor | None = None,
    mismatched: Tensor | None = None,
    log_sum_sq_prob: Tensor | None = None,
    kl_score: Tensor | None = None,
    reference_kl: Tensor | None = None,
    state: BatchState | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **options: object,
) -> PreferenceLoss:
    """The mean loss of an objective over preference pairs, single completions or groups, from the log-probs of completions.

    Equal, for objective="is_dpo" with its defaults, to::

        a, b = (policy - reference).double().chunk(2)            # [P] each
        weight = ((a + b).clamp(max=2)).exp().detach()
        loss = -(weight * logsigmoid(0.1 * (a - b))).sum() / denominator

    policy         [S] sums of token log-probs, any floating dtype; all arithmetic is fp64, the gradient comes in the
                   dtype given.
    reference      [S], the same under the reference policy; never receives a gradient. An objective without a reference
                   takes it for its metrics alone, or None.
    objective      a name of `OBJECTIVES`, or an `Objective`. Its `kind` says what it is a loss of, its `needs` which of
                   the arguments below it must have.
    beta, options  the objective's own: numbers, or tensors with one value a pair [P] (a completion, a group). None: its
                   default.
    lengths        [S] counts of scored tokens. A completion of length 0 is empty: its pair has weight 0 and gives no
                   gradient, whatever its log-probs are; of a group it is left out. Without lengths no completion counts
                   as empty.
    behaviour      [S], the same under the policy that wrote the completions; default: the reference. It enters the
                   importance weight only, the margin always uses the reference; never receives a gradient.
    importance     how an is_ objective weighs pairs; default: `ImportanceWeight()`.
    pairs          [P, 2] int32 or int64, the rows of chosen and rejected, which may repeat; default: chosen are rows
                   0..P-1, rejected P..2P-1. An objective that needs gold takes [P, 3].
    groups         [G, K] int32 or int64, the rows of each group's completions, -1 where it has fewer than K; or K, for
                   equal groups one after the other.
    rewards, opponents, desirable, mismatched, log_sum_sq_prob, kl_score, reference_kl
                   what `objectives.objective.NEEDS` says, [S] or [H, S]; no gradient but those of kl_score and
                   reference_kl.
    state          numbers that last longer than the batch, of the class that the objective names (`BatchState`).
    sample_weight  a constant factor for the loss of each pair [P] (completion, group).
    denominator    what the sum of the losses is divided by; default: the number of pairs (completions, groups). For
                   gradient accumulation pass that of all micro-batches.

    No pairs: the loss is 0, with zero gradients. A NaN reaches the loss and no gradient but that of its own pair, where the
    objective looks at one pair at a time. No host sync. Raises ValueError for shapes, dtypes, devices, names and options
    other than these, for what is missing and for what would be ignored, before any work.

    The objectives in `isdaa_kernels.pair_loss.BASES` run as one kernel forward and one backward, and have no second
    derivative then; the others are computed by PyTorch from the objective's own formula. The two are equal to within
    fp64 rounding.
    """
    inputs = SequenceInputs(
        policy,
        reference,
        lengths,
        behaviour,
        rewards,
        opponents,
        desirable,
        mismatched,
        log_sum_sq_prob,
        kl_score,
        reference_kl,
    )
    if policy.ndim != 1 or not policy.is_floating_point():
        raise ValueError(f"policy: expected a floating tensor [S], got {policy.dtype} {list(policy.shape)}")
    check_sequences(policy.numel(), policy.device, **{name: getattr(inputs, name) for name in sorted(inputs.given())})
    terms = check_preference(
        policy.numel(),
        policy.device,
        given=inputs.given(),
        objective=objective,
        beta=beta,
        importance=importance,
        pairs=pairs,
        groups=groups,
        sample_weight=sample_weight,
        denominator=denominator,
        state=state,
        **options,
    )
    if terms.objective.token_weight is not None:
        raise ValueError(f"objective: {terms.objective.name!r} weighs tokens; expected linear_preference_loss for it")

    fused = terms.fused(policy.device)
    if fused is not None:
        return fused_preference_loss(terms, fused, policy, reference, behaviour, scored=lengths)
    return dense_preference_loss(terms, inputs)


def fused_preference_loss(
    terms: PreferenceTerms,
    backend: str,
    policy: Tensor,
    reference: Tensor,
    behaviour: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    scored: Tensor | None = None,
    ignore_index: int = -100,
) -> PreferenceLoss:
    """The loss from sums [S], where `scored` are lengths, or, with `cu_seqlens`, from the token log-probs [N] of a packed batch, where
    `scored` are targets, and reference and behaviour [1, S] are sums. Tokens without a target are not read and get the gradient 0."""
    loss, metrics, _ = pair_loss_forward(
        policy,
        reference.detach(),
        None if behaviour is None else behaviour.detach(),
        cu_seqlens,
        None if scored is None else scored.detach(),
        terms.rows,
        terms.by_pair(policy.device),
        terms.numbers(ignore_index).pack(),
        backend,
    )
    return PreferenceLoss(loss, dict(zip(PAIR_METRICS, metrics.unbind(0), strict=True)))


def dense_preference_loss(terms: PreferenceTerms, inputs: SequenceInputs) -> PreferenceLoss:
    """The loss from sums [S] by the objective's own formula and autograd."""
    if terms.objective.kind == "completion":
        batch = inputs.completions()
        loss, loss_S = _mean_loss(terms, batch, batch.present)
        return PreferenceLoss(loss, completion_metrics(batch, loss_S, batch.present))
    if terms.objective.kind == "group":
        batch, counts_G = inputs.groups(terms.rows)
        loss, loss_G = _mean_loss(terms, batch, counts_G)
        return PreferenceLoss(loss, group_metrics(batch, loss_G, counts_G))
    batch = inputs.pairs(terms.rows, columns_of(terms.objective))
    weight = _weigh(terms.importance, batch, batch.present)
    loss, loss_P = _mean_loss(terms, batch, batch.present, weight.weight)
    return PreferenceLoss(loss, pair_metrics(batch, weight, loss_P, batch.present))


def _mean_loss(
    terms: PreferenceTerms, batch: object, counts: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the loss, that of each item with its weight), over the items that are True in `counts`."""
    options = terms.options if terms.state is None else {**terms.options, **terms.state(batch)}

    def keep(value: Tensor, fill: float = 1) -> Tensor:
        # What an item that does not count has is taken out before it meets a 0 in the backward: others may depend on that item's loss.
        return torch.where(counts, value, fill)

    defaults = terms.objective.defaults
    options = {
        name: keep(value, defaults.get(name) or 0) if isinstance(value, Tensor) and value.ndim > 0 else value
        for name, value in options.items()
    }
    loss = terms.objective.loss(batch, options)
    loss = loss if weight is None else keep(weight) * loss
    if terms.sample_weight is not None:
        loss = loss * keep(terms.sample_weight.detach())
    loss = torch.where(counts, loss, 0)
    denominator = max(terms.size, 1) if terms.denominator is None else terms.denominator
    return (loss.sum() / denominator).reshape(()).float(), loss


def _weigh(importance: Weighting | None, pair: PairLogprob, nonempty_P: Tensor) -> PairWeight:
    if importance is not None:
        return importance.weigh(pair, nonempty_P)
    log_weight_P = torch.zeros_like(nonempty_P, dtype=torch.float64)
    return PairWeight(log_weight_P + 1, log_weight_P, torch.zeros_like(nonempty_P))
