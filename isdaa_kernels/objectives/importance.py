"""The importance weight of IS-DAA: how much likelier the policy makes a pair than the policy that wrote it.

Letters: P preference pairs; a', b' log-ratios to the behaviour policy of chosen and rejected, in nats.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import Pair, PairLogprob
from isdaa_kernels.objectives.options import is_finite_number

MODES = ("joint", "per_completion", "none")


class PairWeight(NamedTuple):
    """The weights, their logarithm before clip and floor, and where the clip bites (bool); all [P]."""

    weight: Tensor
    log_ratio: Tensor
    clipped: Tensor


class Weighting(ABC):
    """A factor on the loss of each pair, computed from the pair's log-probs."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """What it reads beyond the policy's sums: names of `objective.NEEDS`."""

    @abstractmethod
    def weigh(self, pair: PairLogprob, nonempty_P: Tensor) -> PairWeight:
        """The weights of `pair`, fp64 [P]; `nonempty_P` (bool) says which pairs count where all pairs are looked at."""


@dataclass(frozen=True)
class ImportanceWeight(Weighting):
    """w = exp(min(a' + b', 2 epsilon)), without gradient (Nguyen et al. 2025, arXiv 2506.08681, and the authors' code).

    The defaults are the authors'. Every setting gives exactly 1 where policy and behaviour agree. In the order they
    act:

    power            a', b' are multiplied by it (> 0); below 1 it flattens the weights. Default 1.
    length_exponent  a' is divided by |chosen|^x and b' by |rejected|^x. 0 (default): sums. 1: the geometric mean per
                     token, the "adaptive" weight (AIS) of the paper's predecessor. Above 0 it needs lengths.
    epsilon, mode    `joint` (default): min(a' + b', 2 epsilon). One completion may exceed epsilon if the other makes up
                     for it. `per_completion`: min(a', epsilon) + min(b', epsilon). `none`: no clip, and fp64 overflows
                     to inf beyond 709 nats. epsilon >= 0, default 1 (weights up to e^2); for a largest weight W take
                     epsilon = log(W) / 2.
    floor            least weight, in (0, 1]; None (default): weights may underflow to 0, the intended end of a pair
                     that the policy has left.
    normalize        divide by the mean weight over the batch's pairs (self-normalised); a non-finite weight and a pair
                     with an empty completion are left out of the mean. Default False.
    detach           True (default): the weight is a constant. False: it is differentiated too, which adds loss * w to
                     the gradient of both log-probs where the clip does not bite.

    Raises ValueError for a value outside these domains.
    """

    epsilon: float = 1.0
    mode: str = "joint"
    floor: float | None = None
    power: float = 1.0
    length_exponent: float = 0.0
    normalize: bool = False
    detach: bool = True

    def __post_init__(self) -> None:
        _check(self.mode in MODES, "mode", f"one of {', '.join(MODES)}", self.mode)
        _check(_in(self.epsilon, 0, math.inf), "epsilon", "a finite number of at least 0", self.epsilon)
        _check(_in(self.power, 0, math.inf) and self.power > 0, "power", "a finite number above 0", self.power)
        _check(_in(self.length_exponent, 0, 1), "length_exponent", "a number in [0, 1]", self.length_exponent)
        _check(
            self.floor is None or (_in(self.floor, 0, 1) and self.floor > 0), "floor", "a number in (0, 1]", self.floor
        )
        for name in ("normalize", "detach"):
            _check(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"behaviour", "lengths"} if self.length_exponent > 0 else {"behaviour"})

    def weigh(self, pair: PairLogprob, nonempty_P: Tensor) -> PairWeight:
        """The weights of `pair`; `nonempty_P` says which pairs count in the mean of `normalize`."""
        ratio = self._tempered_log_ratio(pair)
        log_weight_P, clipped_P = self._clip(ratio)
        if self.floor is not None:
            log_weight_P = log_weight_P.clamp(min=math.log(self.floor))
        # One exponential of the sum: the product of two could be inf * 0.
        weight_P = _normalized(log_weight_P, nonempty_P) if self.normalize else log_weight_P.exp()
        weight_P = weight_P.detach() if self.detach else weight_P
        return PairWeight(weight_P, (ratio.chosen + ratio.rejected).detach(), clipped_P)

    def _tempered_log_ratio(self, pair: PairLogprob) -> Pair:
        ratio = pair.policy.minus(pair.behaviour)
        if self.length_exponent > 0:
            ratio = ratio.over(Pair(*(length_P**self.length_exponent for length_P in pair.lengths)))
        return Pair(self.power * ratio.chosen, self.power * ratio.rejected)

    def _clip(self, ratio: Pair) -> tuple[Tensor, Tensor]:
        total_P = ratio.chosen + ratio.rejected
        if self.mode == "none":
            return total_P, torch.zeros_like(total_P, dtype=torch.bool)
        if self.mode == "joint":
            return total_P.clamp(max=2 * self.epsilon), total_P.detach() >= 2 * self.epsilon
        chosen_P, rejected_P = (completion_P.clamp(max=self.epsilon) for completion_P in ratio)
        return chosen_P + rejected_P, torch.maximum(*ratio).detach() >= self.epsilon


@dataclass(frozen=True)
class SelfWeight(Weighting):
    """w = min(cap, exp(m_w + m_l)), m the mean over a completion's tokens of log p(token) - log sum_v p_v^2, without gradient.

    Weighted preference optimisation, Zhou et al. 2024 (arXiv 2406.11827): how near the pair is to what the policy would write, against
    the policy's own sharpness ("sampled alignment"), with no behaviour policy. cap: above 0, their code's 1 by default; None: no cap, as
    in TRL from 0.29.
    """

    cap: float | None = 1.0

    def __post_init__(self) -> None:
        if self.cap is not None and not (_in(self.cap, 0, math.inf) and self.cap > 0):
            raise ValueError(f"SelfWeight: cap: expected a finite number above 0, or None, got {self.cap!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"log_sum_sq_prob", "lengths"})

    def weigh(self, pair: PairLogprob, nonempty_P: Tensor) -> PairWeight:
        chosen_P, rejected_P = pair.policy.minus(pair.log_sum_sq_prob).over(pair.lengths)
        total_P = (chosen_P + rejected_P).detach()
        if self.cap is None:
            return PairWeight(total_P.exp(), total_P, torch.zeros_like(nonempty_P))
        limit = math.log(self.cap)
        return PairWeight(total_P.clamp(max=limit).exp(), total_P, total_P >= limit)


def _normalized(log_weight_P: Tensor, nonempty_P: Tensor) -> Tensor:
    """exp(x) / mean(exp(x)) over the pairs that count; shifted by the largest x, or tiny weights would give 0 / 0."""
    counts_P = nonempty_P & log_weight_P.isfinite()
    # The extra element keeps the maximum defined when no pair counts.
    candidates = torch.where(counts_P, log_weight_P.detach(), -1e300)
    peak = torch.cat([candidates, candidates.new_full((1,), -1e300)]).amax()
    # An empty pair's logarithm is 0, which the shift may send beyond all bounds.
    shifted_P = torch.where(nonempty_P, log_weight_P - peak, 0).exp()
    mean = torch.where(counts_P, shifted_P, 0).sum() / counts_P.sum().clamp(min=1)
    return shifted_P / mean


def _in(value: object, low: float, high: float) -> bool:
    return is_finite_number(value) and low <= value <= high


def _check(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"ImportanceWeight: {name}: expected {expected}, got {value!r}")
