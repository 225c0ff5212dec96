"""The options of objectives: one meaning a name, whichever objective has it, and the values it takes."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

# What an exponent in a loss is held at: e^80 fits in fp32 with room for the sums over a batch. Beyond it the gradient is 0.
MAX_EXPONENT = 80.0


class Domain(NamedTuple):
    """The sentence of the error, and the test of a value that is no tensor."""

    sentence: str
    accepts: Callable[[object], bool]
    by_item: bool = True  # whether a tensor with one value an item will do, too


def is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def describe(value: object) -> str:
    """What was got in the place of a tensor, for an error."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def number(sentence: str, inside: Callable[[float], bool]) -> Domain:
    """The finite numbers for which `inside` holds."""
    return Domain(sentence, lambda value: is_finite_number(value) and inside(value))


ANY_NUMBER = number("a finite number", lambda value: True)
POSITIVE = number("a finite number above 0", lambda value: value > 0)
NONNEGATIVE = number("a finite number of at least 0", lambda value: value >= 0)
SHARE = number("a number in [0, 1]", lambda value: 0 <= value <= 1)


def optional(domain: Domain) -> Domain:
    """The same, or None."""
    return Domain(f"{domain.sentence}, or None", lambda value: value is None or domain.accepts(value), domain.by_item)


DOMAINS: Mapping[str, Domain] = {
    "beta": POSITIVE,  # scale of the margin; the strength of the regularisation
    "label_smoothing": number("a number in [0, 0.5]", lambda value: 0 <= value <= 0.5),  # share of flipped labels
    "margin": ANY_NUMBER,  # by how much the scaled margin must exceed 0
    "preference": SHARE,  # probability that the chosen completion is the better one
    "alpha": number("a finite number other than 0", lambda value: value != 0),  # of the deformed logarithm (1 - exp(-alpha x)) / alpha
    "sft_weight": NONNEGATIVE,  # of the term that imitates a completion
    "odds_weight": NONNEGATIVE,  # of the term of log-odds beside one that imitates a completion
    "mixing_temperature": POSITIVE,  # of the sigmoid that mixes two losses
    "tail_weight": SHARE,  # of tokens beyond the length of the shorter completion
    "baseline": ANY_NUMBER,  # subtracted from the scaled log-ratio of both completions
    "rejected_weight": NONNEGATIVE,  # of the term of the rejected completion
    "clip_range": optional(POSITIVE),  # the scaled margin is held between its negative and it; None: anywhere
    "ratio_power": POSITIVE,  # of policy / reference in a term exp(ratio_power * log-ratio)
    "log_ratio_weight": NONNEGATIVE,  # of the log-ratio beside such a term
    "partner": Domain("a tensor, or None", lambda value: value is None),  # the margin that each pair's own is compared with
    "desirable_weight": NONNEGATIVE,  # of the loss of a desirable completion
    "undesirable_weight": NONNEGATIVE,  # of the loss of an undesirable completion
    "kl": optional(NONNEGATIVE),  # divergence of the policy from the reference; None: estimated from the batch
    "rejected_preference": SHARE,  # probability that the rejected completion beats one of the policy
    "preference_difference": number("a number in [-1, 1]", lambda value: -1 <= value <= 1),  # of chosen and rejected, against a third
    "reference_share": SHARE,  # of the reference in the anchor; the rest are opponents
    "exploration_weight": NONNEGATIVE,  # of the log-prob of a completion of the reference
    "reference_chosen": SHARE,  # 1 where the reference wrote the chosen completion, 0 where the rejected one
    "reward_temperature": POSITIVE,  # rewards are divided by it in a softmax
    "adaptation": SHARE,  # of the temperature to the entropy of the target
    "drop_weight": NONNEGATIVE,  # of the drop of the chosen completion below the reference
    "length_weight": NONNEGATIVE,  # of a token by which the completions differ in length
    "calibration_weight": NONNEGATIVE,  # of the squares that pull both log-ratios to their targets
    "rejected_beta": NONNEGATIVE,  # scale of the log-ratio of the rejected completion, beta being that of the chosen one
    "objective_weight": POSITIVE,  # of the reward that the pairs are labelled by, among several
    "scale_floor": POSITIVE,  # least scale of a pair, where each pair has its own
    "scale_ceiling": POSITIVE,  # the largest
    "scale_penalty": NONNEGATIVE,  # what a unit of it costs
    "reward_gap": ANY_NUMBER,  # a reward model's reward of the chosen completion minus that of the rejected one
    "gap_threshold": POSITIVE,  # reward gap from which pairs weigh less
    "gap_slope": POSITIVE,  # how fast they do
    "largest_factor": number("a finite number above 1", lambda value: value > 1),  # of the reward gap
    "least_factor": number("a number in (0, 1)", lambda value: 0 < value < 1),  # of the reward gap
    "kl_weight": NONNEGATIVE,  # of the divergence from the reference
    "clip_low": SHARE,  # how far below 1 a ratio of probabilities may be before it has no gradient
    "clip_high": NONNEGATIVE,  # how far above 1
    "log_clip": NONNEGATIVE,  # how far from 0 its logarithm may be
    "ratio_cap": optional(POSITIVE),  # the most that such a ratio counts as; None: no bound
    "positive_temperature": POSITIVE,  # of the gate on the ratio of a token whose advantage is above 0
    "negative_temperature": POSITIVE,  # of the others
    "positive_power": NONNEGATIVE,  # of the ratio in the weight of a completion whose advantage is at least 0
    "positive_rate": NONNEGATIVE,  # at which that weight falls with the ratio
    "negative_power": NONNEGATIVE,  # of the others
    "negative_rate": NONNEGATIVE,  # of the others
    "advantage": ANY_NUMBER,  # of a step, over what its state was worth
    "advantage_scale": POSITIVE,  # what an advantage is divided by
}  # fmt: skip
