"""What a step of a loss of tokens reports beside its loss: detached scalars on the device, to be read when the caller chooses.

Letters: N tokens, S completions. Means, maxima and shares are over the scored tokens. All numbers are fp32, so that one `stack` fetches
them; the ending of a name says how they were reduced.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import mean_of_present
from isdaa_kernels.objectives.metrics import clip_shares, effective_sample_size, statistic_means, to_float
from isdaa_kernels.objectives.objective import Objective
from isdaa_kernels.objectives.sampler import TokenWeight
from isdaa_kernels.objectives.token_batch import LOG_RATIOS, TokenLogprob, bounded_exp, k3

STATS = ("entropy", "top_k_mass", "top_k_entropy", "lse", "mean_logit", "log_sum_sq_prob", "is_top1")


@torch.no_grad()
def token_metrics(
    batch: TokenLogprob,
    loss_N: Tensor,
    objective: Objective,
    options: Mapping[str, object],
    correction: TokenWeight | None = None,
    kept_N: Tensor | None = None,
    stats: object | None = None,
) -> dict[str, Tensor]:
    """
    loss/mean             the objective's loss of a token with its factors, without divergence and entropy
    logprob/mean          log-prob of the policy, nats a token
    ratio/mean, /max      the ratio to the old policy that the objective looks at, of a token or of a completion
    ratio/ess             effective sample size (sum r)^2 / sum r^2 of these ratios, in tokens
    clip/low_frac         share of tokens with an advantage below 0 and a ratio below the clip, for objectives with one
    clip/high_frac        share of tokens with an advantage above 0 and a ratio above the clip, for objectives with one
    correction/mean, /max, /bounded_frac, /ess     the factor that corrects for the sampler, where there is one
    sampler/log_ratio_mean    log old - log sampler, at the level of the correction
    off_policy/dropped_frac    share of the tokens that the threshold leaves out, where there is one
    kl/mean               estimate (k3) of KL(policy || reference), nats a token, where there is a reference
    kl/sqrt               square root of the mean over completions of its sum: what rewards are plotted against to see over-optimisation
    reward/mean           over completions, where there are rewards
    advantage/mean, advantage/zero_frac    where there are advantages
    entropy/mean, top_k_mass/mean, ...     each statistic of the vocabulary that was given
    tokens/count, empty_completions/count
    """
    mean = partial(mean_of_present, present=batch.scored)
    ratio_N = bounded_exp(LOG_RATIOS[objective.ratio](batch))
    metrics = {"loss/mean": mean(loss_N), "logprob/mean": mean(batch.policy)}
    metrics |= {f"ratio/{name}": value for name, value in _spread_of(batch, ratio_N, mean).items()}
    if batch.advantages is not None:
        metrics["advantage/mean"] = mean(batch.advantages)
        metrics["advantage/zero_frac"] = mean((batch.advantages == 0).double())
        low, high = clip_bounds(options)
        if high < math.inf:
            # gmpo clips tokens and looks at their mean after
            log_ratio_N = batch.log_ratio if "log_clip" in options else LOG_RATIOS[objective.ratio](batch)
            shares = clip_shares(log_ratio_N, low, high, batch.scored, batch.advantages)
            metrics["clip/low_frac"], metrics["clip/high_frac"] = shares
    if correction is not None:
        metrics |= {f"correction/{name}": x for name, x in _spread_of(batch, correction.weight, mean).items()}
        metrics["correction/bounded_frac"] = mean(correction.bounded.double())
        metrics["sampler/log_ratio_mean"] = mean(correction.log_ratio)
    if kept_N is not None:
        metrics["off_policy/dropped_frac"] = mean((~kept_N).double())
    lengths_S = batch.completions.sum(batch.scored.double())
    if batch.reference is not None:
        kl_N = torch.where(batch.scored, k3(batch.policy, batch.reference), 0)
        metrics["kl/mean"] = mean(kl_N)
        metrics["kl/sqrt"] = mean_of_present(batch.completions.sum(kl_N), lengths_S > 0).sqrt()
    if batch.rewards is not None:
        reward_S = batch.completions.sum(batch.rewards) / lengths_S.clamp(min=1)
        metrics["reward/mean"] = mean_of_present(reward_S, lengths_S > 0)
    found = {name: getattr(stats, name, None) for name in STATS}
    metrics |= statistic_means(
        {name: value.reshape(-1) for name, value in found.items() if value is not None}, batch.scored
    )
    metrics |= {"tokens/count": batch.scored.sum(), "empty_completions/count": (lengths_S == 0).sum()}
    return to_float(metrics)


def clip_bounds(options: Mapping[str, object]) -> tuple[float, float]:
    """The logarithms between which an objective with these options leaves a ratio as it is; infinite where nothing bounds it."""
    if "log_clip" in options:
        return -options["log_clip"], options["log_clip"]
    if "clip_high" in options:
        low = options["clip_low"]
        return (math.log1p(-low) if low < 1 else -math.inf), math.log1p(options["clip_high"])
    cap = options.get("ratio_cap")
    return -math.inf, math.inf if cap is None else math.log(cap)


def _spread_of(batch: TokenLogprob, weight_N: Tensor, mean: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Mean, maximum and effective sample size of weights of at least 0; all 0 where nothing is scored."""
    weight_N = torch.where(batch.scored, weight_N, 0)
    # The appended 0 keeps the maximum of no tokens defined.
    largest = torch.cat([weight_N, weight_N.new_zeros(1)]).amax()
    return {"mean": mean(weight_N), "max": largest, "ess": effective_sample_size(weight_N, largest)}
