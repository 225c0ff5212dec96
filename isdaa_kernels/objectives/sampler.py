"""The correction for a sampler that is not quite the policy which its completions are taken to come from.

Letters: N tokens of a packed batch. A sampler with other kernels, another precision or older weights gives other log-probs than the policy
`old`; the factor is the ratio old / sampler, bounded.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels.objectives.options import is_finite_number
from isdaa_kernels.objectives.token_batch import LOG_RATIOS, TokenLogprob, bounded_exp

LEVELS = tuple(LOG_RATIOS)
MODES = ("truncate", "mask", "none")


class TokenWeight(NamedTuple):
    """Factors for the losses of tokens, the log-ratios that they are made of, and where a bound acts (bool); all [N]."""

    weight: Tensor
    log_ratio: Tensor
    bounded: Tensor


@dataclass(frozen=True)
class SamplerCorrection:
    """A factor on the loss of each token: old / sampler, bounded, without gradient. The defaults are TRL's.

    level    the ratio of each token ("token"), that of its whole completion ("sequence", default), or the geometric mean of those of its
             completion ("sequence_mean").
    mode     "truncate": a ratio beyond a bound is held at it (truncated importance sampling, TIS). "mask" (default): it is 0, and the token
             has no gradient (masked importance sampling, MIS; IcePop with level="token", least=0.5, largest=5). "none": the factor is 1,
             and the sampler is compared with the policy in the metrics alone.
    largest, least
             the bounds, above 0; None: none. Default: at most 3.

    A token that the sampler has no log-prob for (NaN) counts as one that it agrees on. A log-ratio is held at 80 where nothing else does.
    Raises ValueError for a value outside these domains.
    """

    level: str = "sequence"
    mode: str = "mask"
    largest: float | None = 3.0
    least: float | None = None

    def __post_init__(self) -> None:
        _check(self.level in LEVELS, "level", f"one of {', '.join(LEVELS)}", self.level)
        _check(self.mode in MODES, "mode", f"one of {', '.join(MODES)}", self.mode)
        for name in ("largest", "least"):
            value = getattr(self, name)
            _check(
                value is None or (is_finite_number(value) and value > 0),
                name,
                "a finite number above 0, or None",
                value,
            )
        if self.largest is not None and self.least is not None:
            _check(self.least < self.largest, "least", f"a number below largest = {self.largest}", self.least)

    def weigh(self, batch: TokenLogprob) -> TokenWeight:
        """The factors of a batch that has a sampler."""
        sampler_N = torch.where(batch.sampler.isnan(), batch.old, batch.sampler)
        log_ratio_N = _level(batch, batch.old - sampler_N, self.level)
        low = -math.inf if self.least is None else math.log(self.least)
        high = math.inf if self.largest is None else math.log(self.largest)
        bounded_N = (log_ratio_N < low) | (log_ratio_N > high)
        if self.mode == "none":
            return TokenWeight(torch.ones_like(log_ratio_N), log_ratio_N, torch.zeros_like(bounded_N))
        if self.mode == "mask":
            return TokenWeight(torch.where(bounded_N, 0, bounded_exp(log_ratio_N)), log_ratio_N, bounded_N)
        return TokenWeight(bounded_exp(log_ratio_N.clamp(low, high)), log_ratio_N, bounded_N)


def off_policy_keep(batch: TokenLogprob, threshold: float) -> Tensor:
    """False at the tokens of a completion with an advantage below 0 that the policy has left: the mean over its tokens of log sampler -
    log policy (log old, where there is no sampler) is above `threshold`; bool [N].

    The off-policy sequence mask of DeepSeek-V3.2 (arXiv 2512.02556, equation 9), as in TRL; a NaN is kept, for the loss to show it.
    """
    before_N = batch.old if batch.sampler is None else torch.where(batch.sampler.isnan(), batch.old, batch.sampler)
    return ~((batch.advantages < 0) & (batch.mean(before_N - batch.policy.detach()) > threshold))


def _level(batch: TokenLogprob, log_ratio_N: Tensor, level: str) -> Tensor:
    if level == "token":
        return log_ratio_N
    return batch.mean(log_ratio_N) if level == "sequence_mean" else batch.completions.total(log_ratio_N)


def _check(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"SamplerCorrection: {name}: expected {expected}, got {value!r}")
