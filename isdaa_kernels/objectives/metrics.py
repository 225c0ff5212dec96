"""What a step reports beside its loss: detached scalars on the device, to be read when the caller chooses.

Letters: P preference pairs, S completions, G groups. Means, maxima and shares are over the items that count: those without an empty
completion. All numbers are fp32, so that one `stack` fetches them; the ending of a name says how items were reduced.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import CompletionLogprob, GroupLogprob, PairLogprob, mean_of_present
from isdaa_kernels.objectives.importance import PairWeight

VANISHED = 1e-3
# The names of `pair_metrics` in their order, for kernels that make the same numbers.
PAIR_METRICS = (
    "loss/mean", "margin/mean", "accuracy/frac", "chosen/mean", "rejected/mean", "weight/mean", "weight/max", "weight/clipped_frac",
    "weight/vanished_frac", "weight/ess", "log_weight/mean", "kl/mean", "empty_pairs/count",
)  # fmt: skip


@torch.no_grad()
def pair_metrics(pair: PairLogprob, weight: PairWeight, loss_P: Tensor, nonempty_P: Tensor) -> dict[str, Tensor]:
    """
    loss/mean             weighted pair loss
    margin/mean           Delta = a - b, nats, not scaled by beta
    accuracy/frac         share with Delta > 0: a tie is not right, so it is 0 where policy and reference are equal
    chosen/mean, rejected/mean    the log-ratios a and b to the reference, nats a completion
    weight/mean, /max     importance weight; 1 for an objective without one
    weight/clipped_frac   share where the clip bites
    weight/vanished_frac  share below 1e-3
    weight/ess            effective sample size (sum w)^2 / sum w^2, in pairs
    log_weight/mean       logarithm of the weight before clip and floor (0 for an objective without one)
    kl/mean               mean of reference - policy over the completions of the pairs, nats a completion: the k1
                          estimate of KL(reference || policy) if the reference wrote them; it may be negative
    empty_pairs/count     pairs with an empty completion

    Without a reference a and b are log-probs, and there is no kl/mean.
    """
    mean = partial(mean_of_present, present=nonempty_P)
    a_P, b_P = pair.log_ratio
    weight_P = torch.where(nonempty_P, weight.weight, 0)
    # The appended 0 keeps the maximum of no pairs defined; weights are never negative.
    largest = torch.cat([weight_P, weight_P.new_zeros(1)]).amax()
    metrics = {
        "loss/mean": mean(loss_P),
        "margin/mean": mean(pair.margin),
        "accuracy/frac": mean((pair.margin > 0).double()),
        "chosen/mean": mean(a_P),
        "rejected/mean": mean(b_P),
        "weight/mean": mean(weight_P),
        "weight/max": largest,
        "weight/clipped_frac": mean(weight.clipped.double()),
        "weight/vanished_frac": mean((weight_P < VANISHED).double()),
        "weight/ess": effective_sample_size(weight_P, largest),
        "log_weight/mean": mean(weight.log_ratio),
        "kl/mean": -mean(a_P + b_P) / 2,
        "empty_pairs/count": (~nonempty_P).sum(),
    }
    if pair.reference is None:
        del metrics["kl/mean"]
    return to_float(metrics)


@torch.no_grad()
def completion_metrics(batch: CompletionLogprob, loss_S: Tensor, nonempty_S: Tensor) -> dict[str, Tensor]:
    """
    loss/mean             loss of a completion
    log_ratio/mean        log policy - log reference, nats a completion (the log-prob without a reference)
    desirable/mean, undesirable/mean    the same over the completions of that label, where there are labels; 0 where none has it
    kl/mean               reference - policy, where there is a reference: the k1 estimate of `pair_metrics`
    empty_completions/count
    """
    mean, log_ratio_S = partial(mean_of_present, present=nonempty_S), batch.log_ratio
    metrics = {"loss/mean": mean(loss_S), "log_ratio/mean": mean(log_ratio_S)}
    if batch.desirable is not None:
        metrics["desirable/mean"] = mean_of_present(log_ratio_S, nonempty_S & batch.desirable)
        metrics["undesirable/mean"] = mean_of_present(log_ratio_S, nonempty_S & ~batch.desirable)
    if batch.reference is not None:
        metrics["kl/mean"] = -mean(log_ratio_S)
    return to_float(metrics | {"empty_completions/count": (~nonempty_S).sum()})


@torch.no_grad()
def group_metrics(batch: GroupLogprob, loss_G: Tensor, nonempty_G: Tensor) -> dict[str, Tensor]:
    """
    loss/mean             loss of a group
    log_ratio/mean        log policy - log reference, nats a completion (the log-prob without a reference)
    accuracy/frac         share of the groups where one completion has the largest log-ratio and it has the largest reward, where there
                          are rewards: a tie of log-ratios is not right
    kl/mean               reference - policy, where there is a reference: the k1 estimate of `pair_metrics`
    empty_groups/count    groups with fewer than two completions
    """
    mean = partial(mean_of_present, present=nonempty_G)
    log_ratio = batch.sum(batch.log_ratio) / batch.present.sum(-1)
    metrics = {"loss/mean": mean(loss_G), "log_ratio/mean": mean(log_ratio)}
    if batch.rewards is not None:
        rewards, log_ratios = (
            torch.where(batch.present, value, -torch.inf) for value in (batch.rewards, batch.log_ratio)
        )
        likeliest = log_ratios == log_ratios.amax(-1, keepdim=True)
        best = (rewards == rewards.amax(-1, keepdim=True)) & likeliest
        metrics["accuracy/frac"] = mean((best.any(-1) & (likeliest.sum(-1) == 1)).double())
    if batch.reference is not None:
        metrics["kl/mean"] = -mean(log_ratio)
    return to_float(metrics | {"empty_groups/count": (~nonempty_G).sum()})


def to_float(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in metrics.items()}


def statistic_means(stats: Mapping[str, Tensor], present: Tensor | None) -> dict[str, Tensor]:
    """The mean of each statistic of the vocabulary, by name."""
    return {f"{name}/mean": mean_of_present(value.double(), present) for name, value in stats.items()}


def clip_shares(
    log_ratio: Tensor, low: float, high: float, present: Tensor | None, advantages: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shares of the ratios below exp(low) and above exp(high); with advantages, of those whose gradient a clip there takes away."""
    below, above = log_ratio < low, log_ratio > high
    if advantages is not None:
        below, above = below & (advantages < 0), above & (advantages > 0)
    return mean_of_present(below.double(), present), mean_of_present(above.double(), present)


def effective_sample_size(weight_P: Tensor, largest: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, 0 where all weights are; over the largest first, or small squares would underflow."""
    tiny = torch.finfo(weight_P.dtype).tiny
    scaled_P = weight_P / largest.clamp(min=tiny)
    return scaled_P.sum().square() / scaled_P.square().sum().clamp(min=tiny)
