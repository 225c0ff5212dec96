"""The record that makes a pure function an objective: its name, what it needs, its options and their defaults.

Letters: P preference pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, signature

from torch import Tensor

from isdaa_kernels.objectives.importance import ImportanceWeight, is_finite_number

# What an objective can ask the caller for beyond the policy's sums.
NEEDS = {
    "reference": "sums under the frozen reference policy",
    "lengths": "counts of scored tokens",
}

# The sentence of the error, and the test. One meaning a name, whichever objective has the option.
DOMAINS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("a finite number above 0", lambda value: value > 0),
    "label_smoothing": ("a number in [0, 0.5]", lambda value: 0 <= value <= 0.5),
}
ANY_NUMBER = ("a finite number", lambda value: True)


def needs(*names: str) -> Callable[[Callable], Callable]:
    """Decorator: states beside the formula what it reads from its `PairLogprob` beyond the policy."""

    def declare(function: Callable) -> Callable:
        assert set(names) <= set(NEEDS), f"{function.__name__}: unknown need in {names}"
        function.needs = frozenset(names)
        return function

    return declare


@dataclass(frozen=True)
class Objective:
    """A pairwise loss: `function(pair: PairLogprob, **options) -> loss [P]`, without reduction, state or device code.

    `defaults` are the keyword options of the function. `importance` is the weight that multiplies the pair's loss
    unless the caller gives another; None for an objective that is not importance weighted.
    """

    name: str
    function: Callable[..., Tensor]
    needs: frozenset[str]
    defaults: Mapping[str, object]
    importance: ImportanceWeight | None = None

    @property
    def importance_weighted(self) -> bool:
        return self.importance is not None

    def resolve_options(self, options: Mapping[str, object]) -> dict[str, object]:
        """The defaults overlaid with `options`. Raises ValueError for an unknown name or a number out of its domain."""
        for name, value in options.items():
            if name not in self.defaults:
                raise ValueError(
                    f"{self.name}: unknown option {name!r}, expected one of {', '.join(sorted(self.defaults))}"
                )
            sentence, inside = DOMAINS.get(name, ANY_NUMBER)
            # A tensor (one value a pair) is not looked at: that would wait for the device.
            if not isinstance(value, Tensor) and not (is_finite_number(value) and inside(value)):
                raise ValueError(f"{self.name}: {name}: expected {sentence}, got {value!r}")
        return {**self.defaults, **options}

    def resolve_importance(self, importance: ImportanceWeight | None) -> ImportanceWeight | None:
        """The caller's weight or the default one. Raises ValueError where the objective would ignore it."""
        if importance is None:
            return self.importance
        if not self.importance_weighted:
            raise ValueError(
                f"importance: {self.name!r} is not importance weighted, expected an objective such as 'is_dpo'"
            )
        if not isinstance(importance, ImportanceWeight):
            raise ValueError(f"importance: expected an ImportanceWeight, got {importance!r}")
        return importance


def make_objective(function: Callable[..., Tensor]) -> Objective:
    """The record of a function that `needs` decorates; its name and options are read from its signature."""
    parameters = signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}
    return Objective(function.__name__, function, function.needs, defaults)


def importance_sampled(base: Objective, importance: ImportanceWeight | None = None) -> Objective:
    """`is_<base>`: the pair loss of `base` times the clipped importance ratio of the pair (IS-DAA, arXiv 2506.08681).

    The formula of the base is untouched: the weight is a factor on its result, so any pairwise objective gains it.
    """
    return replace(base, name=f"is_{base.name}", importance=importance or ImportanceWeight())
