"""What a step reports beside its loss: detached scalars on the device, to be read when the caller chooses.

Letters: P preference pairs. Means, maxima and shares are over the pairs with two non-empty completions.
"""

import torch
from torch import Tensor

from isdaa_kernels.objectives.importance import PairWeight
from isdaa_kernels.objectives.pair import PairLogprob

VANISHED = 1e-3
# The names of `pair_metrics` in their order, for kernels that make the same numbers.
PAIR_METRICS = (
    "loss/mean", "margin/mean", "accuracy/frac", "chosen/mean", "rejected/mean", "weight/mean", "weight/max", "weight/clipped_frac",
    "weight/vanished_frac", "weight/ess", "log_weight/mean", "kl/mean", "empty_pairs/count",
)  # fmt: skip


@torch.no_grad()
def pair_metrics(pair: PairLogprob, weight: PairWeight, loss_P: Tensor, nonempty_P: Tensor) -> dict[str, Tensor]:
    """The metrics by name, whose ending says how the pairs were reduced; all fp32, so that one `stack` fetches them.

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
    """
    count = nonempty_P.sum()

    def mean(value_P: Tensor) -> Tensor:
        return torch.where(nonempty_P, value_P, 0).sum() / count.clamp(min=1)

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
        "weight/ess": _effective_sample_size(weight_P, largest),
        "log_weight/mean": mean(weight.log_ratio),
        "kl/mean": -mean(a_P + b_P) / 2,
        "empty_pairs/count": nonempty_P.numel() - count,
    }
    return {name: value.float() for name, value in metrics.items()}


def _effective_sample_size(weight_P: Tensor, largest: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, 0 where all weights are; over the largest first, or small squares would underflow."""
    tiny = torch.finfo(weight_P.dtype).tiny
    scaled_P = weight_P / largest.clamp(min=tiny)
    return scaled_P.sum().square() / scaled_P.square().sum().clamp(min=tiny)
