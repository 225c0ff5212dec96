"""Sequence log-probs of policy and reference -> the loss of a preference objective, with its metrics.

Letters: S sequences, P preference pairs, N tokens of a packed batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels.objectives import ImportanceWeight, Objective, Pair, PairLogprob, get_objective
from isdaa_kernels.objectives.importance import PairWeight
from isdaa_kernels.objectives.metrics import PAIR_METRICS, pair_metrics
from isdaa_kernels.objectives.pairwise import dpo, ipo, ipo_mean, slic
from isdaa_kernels.ops import pair_loss_backend, pair_loss_forward
from isdaa_kernels.pair_loss import BASES, MODES, PairLossNumbers


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

    The objectives of this library run as one kernel forward and one backward (`isdaa_kernels.pair_loss` says what that
    covers), and have no second derivative then; all else is computed by PyTorch from the objective's own formula. The
    two are equal to within fp64 rounding.
    """
    _check_sums(policy, reference=reference, lengths=lengths, behaviour=behaviour)
    terms = check_preference(
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

    fused = terms.fused(policy.device)
    if fused is not None:
        return fused_preference_loss(terms, fused, policy, reference, behaviour, scored=lengths)
    return dense_preference_loss(terms, policy, reference, behaviour, lengths)


@dataclass(frozen=True)
class PreferenceTerms:
    """What a call asks for, checked and in full; options that are tensors are fp64."""

    P: int
    objective: Objective
    importance: ImportanceWeight | None
    options: dict[str, float | Tensor]
    pairs: Tensor | None
    sample_weight: Tensor | None
    denominator: float | Tensor | None

    def fused(self, device: torch.device, backend: str | None = None) -> str | None:
        """Which kernels give this loss, as `pair_loss_backend` says; None where PyTorch does."""
        base = _base_of(self.objective)
        if base is None or (self.importance is not None and type(self.importance) is not ImportanceWeight):
            return None
        settings = [x for x in (*self.options.values(), self.denominator) if isinstance(x, Tensor)]
        if any(x.requires_grad or x.device != device for x in settings):
            return None
        return pair_loss_backend(device.type, backend)

    def by_pair(self, device: torch.device) -> Tensor | None:
        """beta, label_smoothing, sample_weight and denominator of each pair, fp64 [4, P]; None where all pairs have the same numbers."""
        weight = 1.0 if self.sample_weight is None else self.sample_weight.detach()
        denominator = max(self.P, 1) if self.denominator is None else self.denominator
        values = (self.options["beta"], self.options.get("label_smoothing", 0.0), weight, denominator)
        if not any(isinstance(value, Tensor) for value in values):
            return None
        # a number is filled in, not copied to the device, which would wait
        rows = (
            value.detach().double().reshape(-1).expand(self.P)
            if isinstance(value, Tensor)
            else torch.full((self.P,), value, dtype=torch.float64, device=device)
            for value in values
        )
        return torch.stack(list(rows))

    def numbers(self, ignore_index: int) -> PairLossNumbers:
        def number(value: float | Tensor | None) -> float:  # a tensor's are read from `by_pair`
            return 0.0 if value is None or isinstance(value, Tensor) else float(value)

        options = {name: number(self.options.get(name)) for name in ("beta", "label_smoothing")}
        options |= {"base": BASES.index(_base_of(self.objective)), "denominator": number(self.denominator)}
        options["ignore_index"] = ignore_index
        weight = self.importance
        if weight is None:
            return PairLossNumbers(**options)
        return PairLossNumbers(
            **options,
            mode=MODES.index(weight.mode),
            weighted=True,
            normalize=weight.normalize,
            detach=weight.detach,
            epsilon=float(weight.epsilon),
            floor=0.0 if weight.floor is None else float(weight.floor),
            power=float(weight.power),
            length_exponent=float(weight.length_exponent),
        )


def _base_of(objective: Objective) -> str | None:
    """The name in `BASES` of the pair loss that an objective has, with or without a weight."""
    functions = {"dpo": dpo, "ipo": ipo, "ipo_mean": ipo_mean, "slic": slic}
    return next((name for name, function in functions.items() if objective.function is function), None)


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
        terms.pairs,
        terms.by_pair(policy.device),
        terms.numbers(ignore_index).pack(),
        backend,
    )
    return PreferenceLoss(loss, dict(zip(PAIR_METRICS, metrics.unbind(0), strict=True)))


def dense_preference_loss(
    terms: PreferenceTerms, policy: Tensor, reference: Tensor, behaviour: Tensor | None, lengths: Tensor | None
) -> PreferenceLoss:
    """The loss from sums [S] by the objective's own formula and autograd."""
    pair, nonempty_P = _make_pairs(policy, reference, behaviour, lengths, terms.pairs)
    weight = _weigh(terms.importance, pair, nonempty_P)
    loss_P = weight.weight * terms.objective.function(pair, **terms.options)
    if terms.sample_weight is not None:
        loss_P = loss_P * terms.sample_weight.detach()
    loss_P = torch.where(nonempty_P, loss_P, 0)
    denominator = max(loss_P.numel(), 1) if terms.denominator is None else terms.denominator
    loss = (loss_P.sum() / denominator).reshape(())
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
) -> PreferenceTerms:
    """Checks what can be checked before the log-probs exist."""
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
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    return PreferenceTerms(P, objective, importance, options, pairs, sample_weight, denominator)


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
