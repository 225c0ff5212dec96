"""Numbers that tell whether a run on preferences over-optimises, as functions of log-probs and of statistics of the vocabulary.

Each is a detached fp32 scalar on the device of its inputs, made without waiting for it (one `torch.stack` fetches many); none has a part in
a loss. The metrics of `preference_loss` and `policy_loss` hold what these losses know anyway; here is what they do not know, and what
callers with log-probs of their own want.

Letters: N tokens, S completions, P preference pairs.
"""

import dataclasses
import math

import torch
from torch import Tensor

from isdaa_kernels.objectives import ImportanceWeight
from isdaa_kernels.objectives import metrics as shared
from isdaa_kernels.objectives.batch import Pair, PairLogprob, mean_of_present
from isdaa_kernels.objectives.options import is_finite_number
from isdaa_kernels.stats import VocabStats

SAMPLES = ("reference", "policy")


@torch.no_grad()
def vocabulary_means(stats: VocabStats, scored: Tensor | None = None) -> dict[str, Tensor]:
    """{"top_k_mass/mean": ..., ...}: the mean over tokens of each statistic that is there. Equal to

        {f"{name}/mean": value[scored].float().mean() for name, value in vars(stats).items() if value is not None}

    top_k_mass = sum of p and top_k_entropy = -sum p log p over the k likeliest next tokens are the two indicators of likelihood
    over-optimisation of Shi et al. (2024, arXiv 2410.11677): when both fall, more diversity has begun to harm. Here they are of the
    completions at hand, token by token given the text before, not of completions that the policy would sample: differences between steps
    tell more than the level.

    stats: of `linear_logprob_stats(..., stats=("top_k_mass", "top_k_entropy"), top_k=10)`, of any shape. scored: bool of that shape, tokens
    that count; None: all. 0 where none does. Raises ValueError for another shape or dtype, and for stats that hold nothing.
    """
    found = {name: value for name, value in vars(stats).items() if value is not None}
    if not found:
        raise ValueError("stats: expected at least one statistic, got none")
    for name, value in found.items():
        _check_mask("scored", scored, value, f"stats.{name}")
    return shared.to_float(shared.statistic_means(found, scored))


@torch.no_grad()
def sqrt_kl(
    policy: Tensor,
    reference: Tensor,
    *,
    samples_of: str = "reference",
    max_log_ratio: float = 2.0,
    present: Tensor | None = None,
) -> Tensor:
    """Square root of the divergence between policy and reference, nats ** 0.5 a completion, estimated on completions at hand. Equal to

        d = (policy - reference if samples_of == "reference" else reference - policy).clamp(max=max_log_ratio)
        (d.exp() - 1 - d)[present].mean().sqrt()

    The distance over which rewards are plotted to see over-optimisation (Gao et al. 2022, arXiv 2210.10760; Rafailov et al. 2024,
    arXiv 2406.02900, for direct alignment): a reward, a win rate or the held-out accuracy that falls while this rises.

    Each term is 0 or more, and e^d - 1 has mean 0 under the distribution that the completions were drawn from (the k3 estimate, Schulman
    2020). Without the clamp the mean is therefore an unbiased estimate, for completions drawn by the policy (samples_of="policy") of
    KL(policy || reference), which is what those papers plot, and for completions drawn by the reference of KL(reference || policy), which
    agrees with it to second order while they are near. What biases it:

    - Completions of preference data were written by some other policy and chosen for their quality: the estimate is then of neither
      divergence, and a distance between the two models on these completions.
    - The clamp, without which one completion that training made e^20 times likelier would be all of the mean, lowers it: a term counts
      at most exp(max_log_ratio) - 1 - max_log_ratio (4.4 nats at 2) in that direction. In the other it has no bound.
    - The root of a noisy mean is too small, by about variance / (8 mean ** 1.5).

    policy, reference: [S] sums over completions, of any floating dtype; the arithmetic is fp64. max_log_ratio: above 0, in nats. present:
    bool [S], completions that count; None: all. 0 where none does. A NaN that counts gives NaN. Raises ValueError for shapes, dtypes and
    values other than these.
    """
    _check_logprobs(policy=policy, reference=reference)
    _check_mask("present", present, policy, "policy")
    if samples_of not in SAMPLES:
        raise ValueError(f"samples_of: expected one of {', '.join(SAMPLES)}, got {samples_of!r}")
    if not is_finite_number(max_log_ratio) or max_log_ratio <= 0:
        raise ValueError(f"max_log_ratio: expected a finite number above 0, got {max_log_ratio!r}")
    log_ratio_S = policy.double() - reference.double()
    d_S = (log_ratio_S if samples_of == "reference" else -log_ratio_S).clamp(max=max_log_ratio)
    return mean_of_present(d_S.expm1() - d_S, present).sqrt().float()


@torch.no_grad()
def clip_fractions(
    log_ratio: Tensor, low: float, high: float, *, advantages: Tensor | None = None, present: Tensor | None = None
) -> dict[str, Tensor]:
    """{"clip/low_frac": ..., "clip/high_frac": ...}: shares of importance ratios below and above their clip. Equal to

        below, above = log_ratio < low, log_ratio > high
        if advantages is not None: below, above = below & (advantages < 0), above & (advantages > 0)
        below[present].float().mean(), above[present].float().mean()

    With advantages, only where the clip takes the gradient away (PPO and its kin); so `policy_loss` reports them of its own ratios.

    log_ratio: log policy - log old, of tokens or completions, any shape and floating dtype. low, high: logarithms, for PPO's 0.2
    math.log(0.8) and math.log(1.2); infinite where there is no bound. advantages, present (bool): of that shape. Raises ValueError for
    others.
    """
    _check_logprobs(log_ratio=log_ratio)
    if not low < high:
        raise ValueError(f"low, high: expected low below high, got {low!r} and {high!r}")
    _check_shape("advantages", advantages, log_ratio, "log_ratio")
    _check_mask("present", present, log_ratio, "log_ratio")
    below, above = shared.clip_shares(log_ratio, low, high, present, advantages)
    return {"clip/low_frac": below.float(), "clip/high_frac": above.float()}


@torch.no_grad()
def importance_fractions(
    policy: Tensor, behaviour: Tensor, importance: ImportanceWeight, *, lengths: Tensor | None = None
) -> dict[str, Tensor]:
    """{"weight/clipped_frac": ..., "weight/floored_frac": ...}: shares of pairs whose importance weight its clip holds down (at 2 epsilon
    for the sum, or at epsilon for a completion) and its floor holds up.

    policy, behaviour: [2P] sums over completions, the chosen first, then the rejected in the same order; any floating dtype. lengths: [2P]
    scored tokens, for a length exponent; a pair with an empty completion does not count. Both are 0 where no pair does, the second
    without a floor. Raises ValueError for shapes and dtypes other than these, and for a length exponent without lengths.
    """
    _check_logprobs(policy=policy, behaviour=behaviour)
    if not isinstance(importance, ImportanceWeight):
        raise ValueError(f"importance: expected an ImportanceWeight, got {importance!r}")
    _check_shape("lengths", lengths, policy, "policy")
    if policy.ndim != 1 or len(policy) % 2:
        raise ValueError(f"policy: expected [2P], chosen then rejected, got {list(policy.shape)}")
    if importance.length_exponent > 0 and lengths is None:
        raise ValueError(
            f"lengths: expected [{len(policy)}] for length_exponent {importance.length_exponent}, got None"
        )
    pairs = {"policy": policy.double(), "behaviour": behaviour.double(), "lengths": lengths}
    halves = {name: Pair(*value.chunk(2)) for name, value in pairs.items() if value is not None}
    nonempty_P = torch.ones(len(policy) // 2, dtype=torch.bool, device=policy.device)
    if lengths is not None:
        nonempty_P = (halves["lengths"].chosen > 0) & (halves["lengths"].rejected > 0)
        halves["lengths"] = Pair(*(length_P.clamp(min=1) for length_P in halves["lengths"]))
    plain = dataclasses.replace(importance, floor=None, normalize=False)
    found = plain.weigh(PairLogprob(**halves), nonempty_P)
    low = -math.inf if importance.floor is None else importance.floor
    shares = {"weight/clipped_frac": found.clipped, "weight/floored_frac": found.weight < low}
    return shared.to_float({name: mean_of_present(bites_P.double(), nonempty_P) for name, bites_P in shares.items()})


@torch.no_grad()
def effective_sample_size(log_weight: Tensor, *, present: Tensor | None = None) -> Tensor:
    """(sum w)^2 / sum w^2 of w = exp(log_weight): how many equal weights would be as noisy (Kish), 1 to all of them; 0 where all are 0.

    From logarithms, so that weights beyond the range of fp32 count; a factor common to all does not matter.

    log_weight: any shape and floating dtype, -inf for a weight of 0; NaN and inf give NaN. present: bool of that shape, weights that count;
    None: all. Raises ValueError for others.
    """
    _check_logprobs(log_weight=log_weight)
    _check_mask("present", present, log_weight, "log_weight")
    kept = log_weight.double().flatten()
    if present is not None:
        kept = torch.where(present.flatten(), kept, -math.inf)
    # The appended element keeps the maximum of no weights defined; where all are 0 the shift is not -inf.
    peak = torch.cat([kept, kept.new_full((1,), -math.inf)]).amax()
    weight = (kept - torch.where(peak == -math.inf, 0, peak)).exp()
    return shared.effective_sample_size(weight, weight.new_ones(())).float()


def _check_logprobs(**tensors: Tensor) -> None:
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(f"{name}: expected a floating tensor, got {got}")
        _check_shape(name, tensor, first, first_name)


def _check_shape(name: str, tensor: Tensor | None, like: Tensor, of: str) -> None:
    if tensor is not None and (tensor.shape != like.shape or tensor.device != like.device):
        got = f"{list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: expected {list(like.shape)} on {like.device} as {of}, got {got}")


def _check_mask(name: str, mask: Tensor | None, like: Tensor, of: str) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool, got {mask.dtype}")
    _check_shape(name, mask, like, of)
