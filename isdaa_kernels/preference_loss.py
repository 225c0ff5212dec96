"""Sequence log-probs of policy and reference -> the loss of a preference objective, with its metrics.

Letters: S sequences, P preference pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels.objectives import ImportanceWeight, Objective, Pair, PairLogprob, get_objective
from isdaa_kernels.objectives.importance import PairWeight
from isdaa_kernels.objectives.metrics import pair_metrics


class PreferenceLoss(NamedTuple):
    """The loss (differentiable fp32 scalar) and its metrics (`pair_metrics`: detached fp32 scalars on the device)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    *,
    objective: str | Objective = "is_dpo",
    beta: float | Tensor | None = None,
    lengths: Tensor | None = None,
    behaviour: Tensor | None = None,
    importance: ImportanceWeight | None = None,
    pairs: Tensor | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **options: float | Tensor,
) -> PreferenceLoss:
    """The mean loss of preference pairs from the log-probs of their completions.

    Equal, for objective="is_dpo" with its defaults, to::

        a, b = (policy - reference).double().chunk(2)            # [P] each
        weight = ((a + b).clamp(max=2)).exp().detach()
        loss = -(weight * logsigmoid(0.1 * (a - b))).sum() / denominator

    policy         [S] sums of token log-probs, any floating dtype; all arithmetic is fp64, the gradient comes in the
                   dtype given.
    reference      [S], the same under the reference policy; never receives a gradient.
    objective      a name of `OBJECTIVES`, or an `Objective`.
    beta, options  the objective's own: numbers, or tensors with one value a pair [P]. None: its default (0.1 for beta).
    lengths        [S] counts of scored tokens. A completion of length 0 is empty: its pair has weight 0 and gives no
                   gradient, whatever its log-probs are. Required where the objective or the importance weight divides
                   by length; without lengths no completion counts as empty.
    behaviour      [S], the same under the policy that wrote the completions; default: the reference. It enters the
                   importance weight only, the margin always uses the reference; never receives a gradient.
    importance     how an is_ objective weighs pairs; default: `ImportanceWeight()`.
    pairs          [P, 2] int32 or int64, the rows of chosen and rejected, which may repeat; default: chosen are rows
                   0..P-1, rejected P..2P-1.
    sample_weight  [P], a constant factor for each pair's loss.
    denominator    what the sum of the pair losses is divided by; default P. For gradient accumulation pass the number
                   of pairs of all micro-batches.

    No pairs: the loss is 0, with zero gradients. A NaN reaches the loss and no gradient but that of its own pair. No
    host sync. Raises ValueError for shapes, dtypes, devices, names and options other than these, before any work.
    """
    _check_sums(policy, reference=reference, lengths=lengths, behaviour=behaviour)
    objective, importance, options = check_preference(
        policy.numel(),
        policy.device,
        objective=objective,
        beta=beta,
        importance=importance,
        pairs=pairs,
        sample_weight=sample_weight,
        denominator=denominator,
        has_lengths=lengths is not None,
        has_behaviour=behaviour is not None,
        **options,
    )

    pair, nonempty_P = _make_pairs(policy, reference, behaviour, lengths, pairs)
    weight = _weigh(importance, pair, nonempty_P)
    loss_P = weight.weight * objective.function(pair, **options)
    if sample_weight is not None:
        loss_P = loss_P * sample_weight.detach()
    loss_P = torch.where(nonempty_P, loss_P, 0)
    loss = loss_P.sum() / (max(loss_P.numel(), 1) if denominator is None else denominator)
    return PreferenceLoss(loss.float(), pair_metrics(pair, weight, loss_P, nonempty_P))


def _make_pairs(
    policy_S: Tensor, reference_S: Tensor, behaviour_S: Tensor | None, lengths_S: Tensor | None, pairs: Tensor | None
) -> tuple[PairLogprob, Tensor]:
    """The rows of each pair in fp64, and which pairs have two non-empty completions (bool [P]).

    An empty pair gets log-probs 0 and lengths 1 before any formula sees it, so that masking its loss afterwards cannot
    meet inf * 0 in the backward.
    """

    def take(value_S: Tensor) -> Pair:
        value_S = value_S.double()
        if pairs is None:
            P = value_S.numel() // 2
            return Pair(value_S[:P], value_S[P:])
        return Pair(value_S[pairs[:, 0]], value_S[pairs[:, 1]])

    policy = take(policy_S)
    lengths = Pair(*map(torch.ones_like, policy)) if lengths_S is None else take(lengths_S.detach())
    nonempty_P = (lengths.chosen > 0) & (lengths.rejected > 0)

    def keep(value: Pair, fill: float = 0) -> Pair:
        return Pair(*(torch.where(nonempty_P, value_P, fill) for value_P in value))

    reference = keep(take(reference_S.detach()))
    behaviour = reference if behaviour_S is None else keep(take(behaviour_S.detach()))
    return PairLogprob(keep(policy), reference, behaviour, keep(lengths, 1)), nonempty_P


def _weigh(importance: ImportanceWeight | None, pair: PairLogprob, nonempty_P: Tensor) -> PairWeight:
    if importance is not None:
        return importance.weigh(pair, nonempty_P)
    log_weight_P = torch.zeros_like(nonempty_P, dtype=torch.float64)
    return PairWeight(log_weight_P + 1, log_weight_P, torch.zeros_like(nonempty_P))


def check_preference(
    S: int,
    device: torch.device,
    *,
    objective: str | Objective,
    beta: float | Tensor | None = None,
    importance: ImportanceWeight | None = None,
    pairs: Tensor | None = None,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    has_lengths: bool = False,
    has_behaviour: bool = False,
    **options: float | Tensor,
) -> tuple[Objective, ImportanceWeight | None, dict[str, float | Tensor]]:
    """Checks what can be checked before the log-probs exist; the objective, importance weight and options in full."""
    objective = get_objective(objective)
    importance = objective.resolve_importance(importance)
    options = objective.resolve_options(options if beta is None else {"beta": beta, **options})
    if not has_lengths and "lengths" in objective.needs | (importance.needs if importance else frozenset()):
        raise ValueError(f"lengths: expected [S] counts of scored tokens for {objective.name!r}, got None")
    if has_behaviour and not objective.importance_weighted:
        raise ValueError(f"behaviour: {objective.name!r} is not importance weighted and would ignore it")
    _check_pairs(pairs, S, device)
    P = S // 2 if pairs is None else pairs.shape[0]
    _check_per_pair(P, device, sample_weight=sample_weight, **options)
    _check_denominator(denominator)
    return objective, importance, options


def _check_pairs(pairs: Tensor | None, S: int, device: torch.device) -> None:
    """ValueError unless `pairs` names rows of S sequences; values are read on the CPU only, elsewhere that waits."""
    if pairs is None:
        if S % 2:
            raise ValueError(f"policy: expected an even number of sequences, chosen then rejected, or pairs; got {S}")
        return
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"pairs: expected int32 or int64 [P, 2], got {pairs.dtype} {list(pairs.shape)}")
    if pairs.device != device:
        raise ValueError(f"pairs: expected on {device}, got {pairs.device}")
    if device.type == "cpu" and not torch.compiler.is_compiling() and ((pairs < 0) | (pairs >= S)).any():
        raise ValueError(f"pairs: expected rows in 0..{S - 1}, got {pairs.tolist()}")


def _check_sums(policy: Tensor, **others: Tensor | None) -> None:
    if policy.ndim != 1 or not policy.is_floating_point():
        raise ValueError(f"policy: expected a floating tensor [S], got {policy.dtype} {list(policy.shape)}")
    for name, tensor in others.items():
        if tensor is None and name != "reference":
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected {list(policy.shape)}, got {tensor!r}")
        if tensor.shape != policy.shape:
            raise ValueError(f"{name}: expected {list(policy.shape)}, got {list(tensor.shape)}")
        if tensor.device != policy.device:
            raise ValueError(f"{name}: expected on {policy.device}, got {tensor.device}")
        if name != "lengths" and not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def _check_per_pair(P: int, device: torch.device, **values: float | Tensor | None) -> None:
    for name, value in values.items():
        is_option = name != "sample_weight"
        if value is None or (is_option and not isinstance(value, Tensor)):
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor [{P}], got {value!r}")
        if value.shape != (P,) and not (is_option and value.ndim == 0):
            raise ValueError(f"{name}: expected [{P}], one value a pair, got {list(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name}: expected on {device}, got {value.device}")


def _check_denominator(denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator: expected a scalar, got {list(denominator.shape)}")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator: expected a number above 0, got {denominator!r}")
