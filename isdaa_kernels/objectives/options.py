"""The options of objectives: one meaning a name, whichever objective has it, and the values it takes."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Domain(NamedTuple):
    """The sentence of the error, and the test of a value that is no tensor."""

    sentence: str
    accepts: Callable[[object], bool]


def is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def number(sentence: str, inside: Callable[[float], bool]) -> Domain:
    """The finite numbers for which `inside` holds."""
    return Domain(sentence, lambda value: is_finite_number(value) and inside(value))


ANY_NUMBER = number("a finite number", lambda value: True)
POSITIVE = number("a finite number above 0", lambda value: value > 0)
NONNEGATIVE = number("a finite number of at least 0", lambda value: value >= 0)
SHARE = number("a number in [0, 1]", lambda value: 0 <= value <= 1)


def optional(domain: Domain) -> Domain:
    """The same, or None."""
    return Domain(f"{domain.sentence}, or None", lambda value: value is None or domain.accepts(value))


DOMAINS: Mapping[str, Domain] = {
    "beta": POSITIVE,  # scale of the margin; the strength of the regularisation
    "label_smoothing": number("a number in [0, 0.5]", lambda value: 0 <= value <= 0.5),  # share of flipped labels
    "margin": ANY_NUMBER,  # by how much the scaled margin must exceed 0
    "preference": SHARE,  # probability that the chosen completion is the better one
    "alpha": number("a finite number other than 0", lambda value: value != 0),  # of the deformed logarithm (1 - exp(-alpha x)) / alpha
    "sft_weight": NONNEGATIVE,  # of the term that imitates a completion
    "temperature": POSITIVE,  # of a softmax or sigmoid inside the loss
    "tail_weight": SHARE,  # of tokens beyond the length of the shorter completion
}  # fmt: skip
