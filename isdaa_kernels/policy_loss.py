"""Token log-probs of packed completions and their advantages -> the loss of an objective of tokens, with its metrics.

Letters: N tokens of a packed batch, S completions.
"""

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels.objectives import Objective, SamplerCorrection, TokenLogprob, get_objective
from isdaa_kernels.objectives.objective import NEEDS, REDUCTIONS
from isdaa_kernels.objectives.options import MAX_EXPONENT, describe, is_finite_number
from isdaa_kernels.objectives.sampler import off_policy_keep
from isdaa_kernels.objectives.token_batch import LOG_RATIOS, Segments, k3
from isdaa_kernels.objectives.token_metrics import token_metrics
from isdaa_kernels.ops import segment_spread, segment_sum
from isdaa_kernels.preference_terms import check_denominator
from isdaa_kernels.sequence_logprob import check_cu_seqlens
from isdaa_kernels.stats import VocabStats


class PolicyLoss(NamedTuple):
    """The loss (differentiable fp32 scalar) and its metrics (`objectives.token_metrics`: detached fp32 scalars on the device)."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logprob: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
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
    token_kl: Tensor | None = None,
    entropy_weight: float = 0.0,
    stats: VocabStats | None = None,
    values: Tensor | None = None,
    rewards: Tensor | None = None,
    step_cu_seqlens: Tensor | None = None,
    **options: object,
) -> PolicyLoss:
    """The loss of an objective of tokens over packed completions, reduced to one number.

    Equal, for objective="dapo" with kl_weight, to::

        ratio, A = (logprob - old_logprob).double().exp(), advantages[completion]      # [N]
        loss = -minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
        d = reference_logprob - logprob
        loss = loss + kl_weight * (d.exp() - d - 1)
        loss[mask].sum() / denominator

    logprob        [N] or [1, N] log-probs under the policy, any floating dtype; all arithmetic is fp64, the gradient comes in the dtype
                   given.
    cu_seqlens     [S + 1] int32 or int64: where completions start, and N. All tokens count, those that are not scored too.
    mask           bool [N] or [1, N], True where a token is scored; None: all. What lies under False is never read, be it NaN, and gets
                   the gradient 0.
    advantages     [S], one number a completion (`group_advantages`), or [N], one a token; [S, 1] or [1, N] where N = S.
    old_logprob, reference_logprob, sampler_logprob
                   [N], under the policy at the start of the step, under the frozen reference, and under the policy as the sampler ran it.
                   None of them gets a gradient. Without old_logprob the policy itself is the old one: all ratios are 1. The reference is
                   for kl_weight, for objectives that need it, and for the metrics.
    objective      a name of `OBJECTIVES` whose kind is "token", or an `Objective`.
    reduction      how the losses of tokens become one number, of `objectives.objective.REDUCTIONS`; None: the objective's own.
    max_length     what "max_length" divides by: the most tokens that a completion may have.
    denominator    what the mean divides by: the number of tokens ("token_mean"), of calls ("batch_token_mean") or of completions (the
                   others). None: that of the call, empty completions included. For gradient accumulation pass that of the whole step; over
                   ranks that of all, divided by the number of ranks where their gradients are averaged (DDP, FSDP), as Trainers do.
    token_weight   [N], a constant factor for the objective's loss of each token: masks of tool output, of tokens of low entropy.
    correction     how the loss is corrected for the sampler; None: `SamplerCorrection()` where there is a sampler_logprob.
    off_policy_threshold
                   leaves out completions with an advantage below 0 that the policy has left (`sampler.off_policy_keep`); None: none.
    kl_weight      of the divergence from the reference, a token at a time: the k3 estimate, or `token_kl`. TRL calls it beta.
    kl_corrected   whether it is multiplied by the token's importance ratio, which is differentiated too; by the geometric mean over the
                   completion where that is the objective's ratio. TRL: use_bias_correction_kl. The product is at most e^80: beyond, the
                   ratio is held, without gradient.
    token_kl       [N], the exact divergence of each token's distributions (`linear_kl`), differentiable, in the place of the estimate.
    entropy_weight of the entropy of each token's distribution (`stats.entropy`, not detached), subtracted. Reduced as the loss is: TRL
                   takes the mean over tokens, whatever the loss type.
    stats          of `linear_logprob_stats`, [N] or [1, N]: their means become metrics.
    values         [N], a critic's; differentiable. For objectives that need them.
    rewards        [S]. For objectives that need them, and for the metrics.
    step_cu_seqlens
                   [T + 1], where steps start, and N (`objectives.step_cu_seqlens`); none goes on from one completion to the next. For
                   objectives that look at steps.
    options        the objective's own: numbers.

    token_weight, the correction and the threshold act on the objective's loss, not on divergence and entropy. No token to score: the loss
    is 0, with zero gradients. A NaN reaches the loss and no gradient but those of its own completion. No host sync. Raises ValueError for
    shapes, dtypes, devices, names and options other than these, for what is missing and for what would be ignored, before any work.
    """
    _check_tensors(logprob, cu_seqlens, mask)
    N, S = logprob.numel(), cu_seqlens.numel() - 1
    inputs = TokenInputs(
        logprob, cu_seqlens, mask, advantages, old_logprob, reference_logprob, sampler_logprob, values, rewards, token_kl,
        token_weight, step_cu_seqlens, stats,
    )  # fmt: skip
    terms = check_policy(
        N, S, logprob.device, inputs, objective=objective, reduction=reduction, max_length=max_length, denominator=denominator,
        correction=correction, off_policy_threshold=off_policy_threshold, kl_weight=kl_weight, kl_corrected=kl_corrected,
        entropy_weight=entropy_weight, **options,
    )  # fmt: skip
    return terms.loss(inputs)


@dataclass(frozen=True)
class TokenInputs:
    """The tensors of a call as they came."""

    logprob: Tensor | None
    cu_seqlens: Tensor
    mask: Tensor | None = None
    advantages: Tensor | None = None
    old_logprob: Tensor | None = None
    reference_logprob: Tensor | None = None
    sampler_logprob: Tensor | None = None
    values: Tensor | None = None
    rewards: Tensor | None = None
    token_kl: Tensor | None = None
    token_weight: Tensor | None = None
    step_cu_seqlens: Tensor | None = None
    stats: VocabStats | None = None

    def batch(self) -> TokenLogprob:
        policy_N = self.logprob.reshape(-1).double()
        scored_N = torch.ones_like(policy_N, dtype=torch.bool) if self.mask is None else self.mask.reshape(-1)
        completions = _segments(self.cu_seqlens, policy_N)

        def keep(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.where(scored_N, value.reshape(-1).double(), 0)

        def constant(value: Tensor | None, by_completion: bool = False) -> Tensor | None:
            if value is None:
                return None
            return keep(completions.spread(value.detach().reshape(-1)) if by_completion else value.detach())

        policy_N = keep(policy_N)
        steps, starts_N = None, None
        if self.step_cu_seqlens is not None:
            steps = _segments(self.step_cu_seqlens, policy_N)
            # the scored tokens of a step that have as many after them as all but one
            count_N = scored_N.double()
            starts_N = scored_N & (steps.later(count_N) + 1 == steps.total(count_N))
        return TokenLogprob(
            policy_N,
            policy_N.detach() if self.old_logprob is None else constant(self.old_logprob),
            scored_N,
            completions,
            completions.total(scored_N.double()).clamp(min=1),
            advantages=constant(self.advantages, self._by_completion(self.advantages)),
            reference=constant(self.reference_logprob),
            sampler=constant(self.sampler_logprob),
            values=keep(self.values),
            rewards=constant(self.rewards, by_completion=True),
            token_kl=keep(self.token_kl),
            steps=steps,
            step_starts=starts_N,
        )

    def _by_completion(self, advantages: Tensor | None) -> bool:
        if advantages is None:
            return False
        return advantages.numel() != self.logprob.numel() or (advantages.ndim == 2 and advantages.shape[0] > 1)


@dataclass(frozen=True)
class PolicyTerms:
    """What a call asks for, checked and in full."""

    objective: Objective
    options: dict[str, object]
    reduction: str
    max_length: int | None
    denominator: float | Tensor | None
    correction: SamplerCorrection | None
    off_policy_threshold: float | None
    kl_weight: float
    kl_corrected: bool
    entropy_weight: float

    def loss(self, inputs: TokenInputs) -> PolicyLoss:
        batch = inputs.batch()
        factor = None if self.correction is None else self.correction.weigh(batch)
        if factor is not None:
            batch = replace(batch, correction=factor.weight.detach())
        objective_N, kept_N = self._objective_loss(batch, inputs.token_weight)
        loss_N = objective_N
        if self.kl_weight > 0:
            loss_N = loss_N + self.kl_weight * self._divergence(batch)
        if self.entropy_weight > 0:
            loss_N = loss_N - self.entropy_weight * inputs.stats.entropy.reshape(-1).double()
        loss_N = torch.where(batch.scored, loss_N, 0)
        loss = self._reduce(batch, loss_N, inputs.cu_seqlens.numel() - 1)
        metrics = token_metrics(
            batch, torch.where(batch.scored, objective_N, 0), self.objective, self.options, factor, kept_N, inputs.stats
        )
        return PolicyLoss(loss.reshape(()).float(), metrics)

    def _objective_loss(self, batch: TokenLogprob, token_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(the objective's loss of each token with its factors, which tokens the threshold keeps)."""
        loss_N = self.objective.loss(batch, self.options)
        if batch.correction is not None and not self.objective.own_correction:
            loss_N = loss_N * _held(batch.correction, loss_N)
        if token_weight is not None:
            loss_N = loss_N * torch.where(batch.scored, token_weight.detach().reshape(-1).double(), 0)
        if self.off_policy_threshold is None:
            return loss_N, None
        kept_N = off_policy_keep(batch, self.off_policy_threshold)
        return torch.where(kept_N, loss_N, 0), kept_N

    def _divergence(self, batch: TokenLogprob) -> Tensor:
        kl_N = k3(batch.policy, batch.reference) if batch.token_kl is None else batch.token_kl
        if not self.kl_corrected:
            return kl_N
        level = "sequence_mean" if self.objective.ratio == "sequence_mean" else "token"
        most_N = MAX_EXPONENT - kl_N.detach().clamp(min=1).log()
        return kl_N * torch.minimum(LOG_RATIOS[level](batch), most_N).exp()

    def _reduce(self, batch: TokenLogprob, loss_N: Tensor, S: int) -> Tensor:
        tokens = batch.scored.sum().clamp(min=1)
        if self.reduction == "sequence_mean":
            loss_N = loss_N / batch.lengths
        elif self.reduction == "batch_token_mean":
            loss_N = loss_N / tokens
        elif self.reduction == "max_length":
            loss_N = loss_N / self.max_length
        counts = {"token_mean": tokens, "batch_token_mean": 1}
        if self.denominator is None:
            return loss_N.sum() / counts.get(self.reduction, max(S, 1))
        if not isinstance(self.denominator, Tensor):
            return loss_N.sum() / self.denominator
        # no rank has a token: 0 by 1 and not by 0; a sum, for which a number on the host need not be copied
        return loss_N.sum() / (self.denominator + ~batch.scored.any())


def _held(correction_N: Tensor, loss_N: Tensor) -> Tensor:
    """The correction, unless that makes a loss larger that is beyond e^80 then: a ratio and its correction may both be large."""
    most_N = math.exp(MAX_EXPONENT) / loss_N.detach().abs().clamp(min=1)
    return torch.minimum(correction_N, most_N.clamp(min=1))


def check_policy(
    N: int,
    S: int,
    device: torch.device,
    inputs: TokenInputs,
    *,
    objective: str | Objective,
    reduction: str | None,
    max_length: int | None,
    denominator: float | Tensor | None,
    correction: SamplerCorrection | None,
    off_policy_threshold: float | None,
    kl_weight: float,
    kl_corrected: bool,
    entropy_weight: float,
    made: Set[str] = frozenset(),
    **options: object,
) -> PolicyTerms:
    """Checks what can be checked before the log-probs exist. `made`: what the call makes itself, of
    "reference" and "entropy"."""
    objective = get_objective(objective)
    if objective.kind != "token":
        raise ValueError(
            f"objective: {objective.name!r} is a loss of a {objective.kind}; expected one of tokens, such as 'grpo'"
        )
    options = objective.resolve_options(options)
    for name, value in options.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{objective.name}: {name}: expected a number, got a tensor {list(value.shape)}")
    _check_shapes(N, S, device, inputs)
    has_reference = inputs.reference_logprob is not None or "reference" in made
    _check_needs(N, device, objective, inputs, has_reference)
    for name, value in (("kl_weight", kl_weight), ("entropy_weight", entropy_weight)):
        if not is_finite_number(value) or value < 0:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    if not isinstance(kl_corrected, bool):
        raise ValueError(f"kl_corrected: expected True or False, got {kl_corrected!r}")
    _check_divergence(inputs, has_reference, kl_weight, kl_corrected)
    if entropy_weight > 0 and "entropy" not in made:
        _check_entropy(inputs)
    correction = _correction(objective, inputs, correction)
    _check_threshold(off_policy_threshold, inputs)
    reduction = _reduction(objective, reduction, max_length)
    check_denominator(denominator)
    return PolicyTerms(
        objective, options, reduction, max_length, denominator, correction, off_policy_threshold, kl_weight, kl_corrected,
        entropy_weight,
    )  # fmt: skip


def _segments(cu_seqlens: Tensor, like_N: Tensor) -> Segments:
    like_N = like_N.detach()
    return Segments(partial(_sum, cu_seqlens), lambda value_S: segment_spread(value_S.double(), cu_seqlens, like_N))


def _sum(cu_seqlens: Tensor, value_N: Tensor) -> Tensor:
    return segment_sum(value_N, cu_seqlens)


def _check_tensors(logprob: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> None:
    if not isinstance(logprob, Tensor) or not logprob.is_floating_point() or not _is_packed(logprob, logprob.numel()):
        raise ValueError(f"logprob: expected a floating tensor [N] or [1, N], got {_describe(logprob)}")
    N, device = logprob.numel(), logprob.device
    check_cu_seqlens(cu_seqlens, N, device)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not _is_packed(mask, N) or mask.device != device:
        raise ValueError(f"mask: expected bool [{N}] on {device}, got {_describe(mask)}")


def _is_packed(value: Tensor, N: int) -> bool:
    return tuple(value.shape) in {(N,), (1, N)}


def _describe(value: object) -> str:
    return f"{describe(value)} on {value.device}" if isinstance(value, Tensor) else describe(value)


def _check_shapes(N: int, S: int, device: torch.device, inputs: TokenInputs) -> None:
    by_token = ("old_logprob", "reference_logprob", "sampler_logprob", "values", "token_kl", "token_weight")
    for name in (*by_token, "advantages", "rewards"):
        value = getattr(inputs, name)
        if value is None:
            continue
        allowed = {(N,), (1, N)} if name in by_token else {(S,)} if name == "rewards" else {(S,), (S, 1), (N,), (1, N)}
        if not isinstance(value, Tensor) or tuple(value.shape) not in allowed:
            expected = f"[{N}]" if name in by_token else f"[{S}]"
            expected += f", one a completion, or [{N}], one a token" if name == "advantages" else ""
            got = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}: expected {expected}, got {got}")
        if name == "advantages" and N == S > 1 and value.ndim == 1:
            raise ValueError(
                f"{name}: [{N}] could be per token or per completion here; expected [1, {N}] per token or [{S}, 1] per completion"
            )
        is_number = value.is_floating_point()
        if name in ("rewards", "advantages"):
            is_number = value.dtype != torch.bool and not value.is_complex()
        if value.device != device or not is_number:
            raise ValueError(f"{name}: expected a floating dtype on {device}, got {value.dtype} on {value.device}")
    if inputs.stats is not None:
        _check_stats(N, device, inputs.stats)


def _check_steps(N: int, device: torch.device, inputs: TokenInputs) -> None:
    try:
        check_cu_seqlens(inputs.step_cu_seqlens, N, device)
    except ValueError as error:
        raise ValueError(f"step_{error}") from None
    # its values where those of cu_seqlens are looked at
    if device.type == "cpu" and not torch.compiler.is_compiling():
        across = sorted(set(inputs.cu_seqlens.tolist()) - set(inputs.step_cu_seqlens.tolist()))
        if across:
            raise ValueError(
                f"step_cu_seqlens: expected a step to start where a completion does, at {across[0]}, got one across it"
            )


def _check_stats(N: int, device: torch.device, stats: VocabStats) -> None:
    if not isinstance(stats, VocabStats):
        raise ValueError(f"stats: expected a VocabStats, got {type(stats).__name__}")
    for name, value in vars(stats).items():
        if value is not None and (not _is_packed(value, N) or value.device != device):
            raise ValueError(f"stats.{name}: expected [{N}] on {device}, got {_describe(value)}")


def _check_entropy(inputs: TokenInputs) -> None:
    entropy = None if inputs.stats is None else inputs.stats.entropy
    if entropy is None:
        raise ValueError("stats: expected the entropy of each token for entropy_weight, got none")
    if _lacks_gradient(inputs.logprob, entropy):
        raise ValueError("stats.entropy: expected one with a gradient for entropy_weight, got a detached one")


def _lacks_gradient(logprob: Tensor | None, term: Tensor | None) -> bool:
    """Whether a term of the loss would train nothing where the log-probs train."""
    trains = torch.is_grad_enabled() and logprob is not None and logprob.requires_grad
    return trains and term is not None and not term.requires_grad


def _check_needs(N: int, device: torch.device, objective: Objective, inputs: TokenInputs, has_reference: bool) -> None:
    given = {"advantages": inputs.advantages, "values": inputs.values, "rewards": inputs.rewards}
    has = {name for name, value in given.items() if value is not None} | ({"reference"} if has_reference else set())
    for name, meaning in NEEDS.items():
        if name in objective.needs - has:
            argument = "reference_logprob" if name == "reference" else name
            meaning = "[N] log-probs under the frozen reference policy" if name == "reference" else meaning
            raise ValueError(f"{argument}: expected {meaning} for {objective.name!r}, got None")
    for name in has - objective.needs - {"reference", "rewards"}:
        raise ValueError(f"{name}: {objective.name!r} would ignore it; expected None")
    if inputs.step_cu_seqlens is not None and "values" not in objective.needs:
        raise ValueError(f"step_cu_seqlens: {objective.name!r} would ignore it; expected None")
    if inputs.step_cu_seqlens is not None:
        _check_steps(N, device, inputs)


def _check_divergence(inputs: TokenInputs, has_reference: bool, kl_weight: float, kl_corrected: bool) -> None:
    if kl_weight > 0 and not has_reference and inputs.token_kl is None:
        raise ValueError("reference_logprob: expected [N] log-probs under the reference for kl_weight, got None")
    if kl_weight == 0 and (inputs.token_kl is not None or kl_corrected):
        name = "kl_corrected" if inputs.token_kl is None else "token_kl"
        raise ValueError(f"{name}: would be ignored without a kl_weight above 0; expected its default")
    if _lacks_gradient(inputs.logprob, inputs.token_kl):
        raise ValueError("token_kl: expected one with a gradient, got a detached one, which would train nothing")


def _correction(
    objective: Objective, inputs: TokenInputs, correction: SamplerCorrection | None
) -> SamplerCorrection | None:
    if inputs.sampler_logprob is None:
        if correction is not None:
            raise ValueError("sampler_logprob: expected [N] log-probs under the sampler for correction, got None")
        return None
    if correction is None:
        correction = SamplerCorrection(level="token") if objective.own_correction else SamplerCorrection()
    if not isinstance(correction, SamplerCorrection):
        raise ValueError(f"correction: expected a SamplerCorrection, got {correction!r}")
    if objective.own_correction and correction.level != "token":
        raise ValueError(
            f"correction: expected level='token' for {objective.name!r}, which multiplies the factors of a completion's tokens, "
            f"got {correction.level!r}"
        )
    return correction


def _check_threshold(threshold: float | None, inputs: TokenInputs) -> None:
    if threshold is None:
        return
    if not is_finite_number(threshold) or threshold < 0:
        raise ValueError(f"off_policy_threshold: expected a finite number of at least 0, or None, got {threshold!r}")
    if inputs.advantages is None:
        raise ValueError("advantages: expected them for off_policy_threshold, got None")


def _reduction(objective: Objective, reduction: str | None, max_length: int | None) -> str:
    reduction = objective.reduction if reduction is None else reduction
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if reduction == "max_length":
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(
                f"max_length: expected a whole number of at least 1 for {objective.name!r}, got {max_length!r}"
            )
    elif max_length is not None:
        raise ValueError(f"max_length: the reduction {reduction!r} would ignore it; expected None")
    return reduction
