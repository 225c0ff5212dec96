"""The record that makes a pure function an objective: its name, what it needs, its options and their defaults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import Parameter, getdoc, signature

from torch import Tensor

from isdaa_kernels.objectives.batch import CompletionLogprob, GroupLogprob, PairLogprob
from isdaa_kernels.objectives.importance import ImportanceWeight, Weighting
from isdaa_kernels.objectives.options import ANY_NUMBER, DOMAINS, Domain
from isdaa_kernels.objectives.state import BatchState
from isdaa_kernels.objectives.token_batch import LOG_RATIOS, TokenLogprob

# What an objective can ask the caller for beyond the policy's sums: the name of the argument, and what it holds.
NEEDS = {
    "reference": "[S] sums under the frozen reference policy",
    "lengths": "[S] counts of scored tokens",
    "behaviour": "[S] sums under the policy that wrote the completions, or a reference",
    "rewards": "[S], one number a completion",
    "opponents": "[H, S] sums under H earlier policies, the newest first",
    "desirable": "[S] bool",
    "mismatched": "[S] log-ratios policy - reference of a completion of another prompt",
    "log_sum_sq_prob": "[S] sums over the tokens of log sum_v p_v^2",
    "kl_score": "[S] sums over the tokens of stopgrad(log-ratio) * log-prob",
    "token_weight": "[N], a factor for each token's log-prob",
    "gold": "a third completion of each pair: pairs [P, 3], or sequences chosen, rejected, gold",
    "reference_kl": "[S] sums over the tokens of KL(reference || policy), differentiable",
    "advantages": "[S], one number a completion, or [N], one a token",
    "values": "[N], what a critic expects of the rest of the completion",
}

# What a function computes a loss for, by the record that it takes.
KINDS = {PairLogprob: "pair", CompletionLogprob: "completion", GroupLogprob: "group", TokenLogprob: "token"}

# How losses of tokens become one number: what each token's is multiplied by before all are summed, and what they are divided by then.
REDUCTIONS = {
    "token_mean": "the mean over tokens",
    "batch_token_mean": "the mean over the tokens of the call, then over calls",
    "sequence_mean": "the mean over the tokens of a completion, then over completions",
    "sequence_sum": "the sum over the tokens of a completion, then the mean over completions",
    "max_length": "the sum over the tokens of a completion by max_length, then the mean over completions",
}


def declare(
    *needs: str,
    source: str,
    systems: tuple[str, ...] = (),
    state: type[BatchState] | None = None,
    state_required: bool = False,
    whole_batch: bool = False,
    instead: Mapping[str, str] | None = None,
    reduction: str | None = None,
    ratio: str = "token",
    own_correction: bool = False,
    **domains: Domain,
) -> Callable[[Callable], Callable]:
    """Decorator: states beside the formula what it needs beyond the policy's sums, where it was published (authors, year, arXiv), the
    published systems whose loss it is, what keeps its numbers from step to step, whether the loss of an item depends on the others of the
    batch, options that stand for a need, what `Objective` says of a loss of tokens, and domains of options that differ from `DOMAINS`."""

    def decorate(function: Callable) -> Callable:
        assert set(needs) <= set(NEEDS), f"{function.__name__}: unknown need in {needs}"
        assert reduction is None or reduction in REDUCTIONS, f"{function.__name__}: unknown reduction {reduction}"
        assert ratio in LOG_RATIOS, f"{function.__name__}: unknown ratio {ratio}"
        function.declared = {
            "needs": frozenset(needs),
            "source": source,
            "systems": systems,
            "state": state,
            "state_required": state_required,
            "whole_batch": whole_batch,
            "instead": instead or {},
            "reduction": reduction,
            "ratio": ratio,
            "own_correction": own_correction,
            "domains": domains,
        }
        return function

    return decorate


@dataclass(frozen=True)
class Objective:
    """A loss: `function(batch, **options) -> one loss an item`, without reduction, state or device code.

    kind       what an item is: a `pair` (the function takes a `PairLogprob`), a `completion` (`CompletionLogprob`), a `group`
               (`GroupLogprob`) or a `token` (`TokenLogprob`).
    defaults   the keyword options of the function, and of `token_weight`.
    importance the weight that multiplies a pair's loss unless the caller gives another; None: not weighted.
    token_weight
               a factor for each token's log-prob before they are summed: `token_weight(place: TokenPlace, **options) -> [N]`, for the
               policy and, with `weigh_reference`, for the reference.
    state      the class that keeps what the loss needs beyond its batch; `state_required`: there is no loss without one.
    whole_batch
               the loss of an item depends on the others of its call, so that micro-batches are another loss than their union.
    instead    option -> what it makes needless where it is given.
    reduction  of a loss of tokens: how they become one number, of `REDUCTIONS`, unless the caller says otherwise.
    ratio      of a loss of tokens: the ratio to the old policy that it looks at, of `token_batch.LOG_RATIOS`, for the metrics.
    own_correction
               of a loss of tokens: its formula has the correction for the sampler in it, which else is a factor on the loss.
    """

    name: str
    function: Callable[..., Tensor]
    needs: frozenset[str]
    defaults: Mapping[str, object]
    importance: Weighting | None = None
    kind: str = "pair"
    domains: Mapping[str, Domain] = field(default_factory=dict)
    token_weight: Callable[..., Tensor] | None = None
    weigh_reference: bool = True
    state: type[BatchState] | None = None
    state_required: bool = False
    whole_batch: bool = False
    instead: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    systems: tuple[str, ...] = ()
    reduction: str | None = None
    ratio: str = "token"
    own_correction: bool = False

    @property
    def importance_weighted(self) -> bool:
        return self.importance is not None

    @property
    def has_importance_ratio(self) -> bool:
        """Whether its pairs can be weighted by how much likelier the policy makes them than the policy that wrote them: not where one of
        them is weighted already, nor where the sums are none of log-probs (signed labels of tokens, tokens weighted in the policy alone).
        """
        of_logprobs = "token_weight" not in self.needs and (self.token_weight is None or self.weigh_reference)
        return self.kind == "pair" and not self.importance_weighted and of_logprobs

    @property
    def state_settings(self) -> frozenset[str]:
        """What `make_state` can be told beside options of the objective."""
        names = signature(self.state).parameters if self.state else ()
        return frozenset(names) - {"process_group"}

    @property
    def formula(self) -> str:
        """The first paragraph of the function's docstring."""
        text = (getdoc(self.function) or "").split("\n\n")[0]
        return " ".join(text.split())

    def resolve_options(self, options: Mapping[str, object]) -> dict[str, object]:
        """The defaults overlaid with `options`. Raises ValueError for an unknown name or a number out of its domain."""
        for name, value in options.items():
            if name not in self.defaults:
                names = ", ".join(sorted(self.defaults)) or "none"
                raise ValueError(f"{self.name}: unknown option {name!r}, expected one of {names}")
            domain = self.domains.get(name, DOMAINS.get(name, ANY_NUMBER))
            # A tensor (one value an item) is not looked at: that would wait for the device.
            by_item = isinstance(value, Tensor) and domain.by_item
            if not by_item and not domain.accepts(value):
                raise ValueError(f"{self.name}: {name}: expected {domain.sentence}, got {value!r}")
        return {**self.defaults, **options}

    def resolve_importance(self, importance: Weighting | None) -> Weighting | None:
        """The caller's weight or the default one. Raises ValueError where the objective would ignore it."""
        if importance is None:
            return self.importance
        if not self.importance_weighted:
            raise ValueError(
                f"importance: {self.name!r} is not importance weighted, expected an objective such as 'is_dpo'"
            )
        if not isinstance(importance, Weighting):
            raise ValueError(f"importance: expected an ImportanceWeight, got {importance!r}")
        return importance

    def call_options(self, **given: object) -> dict[str, object]:
        """Of options and settings of a state, what a call takes beside the state that `make_state(**given)` is. Raises ValueError for what
        neither has, and for what the state would overrule."""
        made = self.state.gives if self.state else frozenset()
        for name in made & given.keys() - self.state_settings:
            raise ValueError(f"{self.name}: {name}: {self.state.__name__} gives it; expected None")
        self.resolve_options({n: v for n, v in given.items() if n in self.defaults or n not in self.state_settings})
        return {n: v for n, v in given.items() if n in self.defaults and n not in made}

    def make_state(self, **settings: object) -> BatchState | None:
        """A new state for this objective; None where it keeps nothing. settings: the state's own, and options of the objective, of which
        it takes those that are settings of the state too. Raises ValueError for others."""
        if self.state is None:
            return None
        known = self.state_settings
        options = self.resolve_options({n: v for n, v in settings.items() if n not in known or n in self.defaults})
        for name in known & options.keys():
            if options[name] is None:
                raise ValueError(
                    f"{self.name}: {name}: its parts have their own; expected the one of the part with the state"
                )
        own = {n: v for n, v in settings.items() if n in known}
        return self.state(**{**{n: v for n, v in options.items() if n in known}, **own})

    def loss(
        self, batch: PairLogprob | CompletionLogprob | GroupLogprob | TokenLogprob, options: Mapping[str, object]
    ) -> Tensor:
        """One loss an item, `options` being those of `resolve_options`."""
        of_tokens = {} if self.token_weight is None else keyword_defaults(self.token_weight)
        return self.function(batch, **{name: value for name, value in options.items() if name not in of_tokens})


def make_objective(function: Callable[..., Tensor]) -> Objective:
    """The record of a function that `declare` decorates; its name, kind and options are read from its signature."""
    first = next(iter(signature(function).parameters.values()))
    return Objective(
        function.__name__, function, defaults=keyword_defaults(function), kind=KINDS[first.annotation], **function.declared
    )  # fmt: skip


def importance_sampled(base: Objective, importance: Weighting | None = None) -> Objective:
    """`is_<base>`: the pair loss of `base` times the clipped importance ratio of the pair (IS-DAA, arXiv 2506.08681).

    The formula of the base is untouched: the weight is a factor on its result, so any pairwise objective gains it.
    Raises ValueError for an objective of another kind, and for one that has a weight.
    """
    if not base.has_importance_ratio:
        raise ValueError(
            f"base: expected a pairwise objective of sums of log-probs, without a weight, got {base.name!r}"
        )
    return replace(base, name=f"is_{base.name}", importance=importance or ImportanceWeight())


def token_weighted(
    base: Objective, name: str, token_weight: Callable[..., Tensor], weigh_reference: bool = True, **declared: object
) -> Objective:
    """`base`, an objective of two completions, on log-probs whose tokens are weighted first; `declared` (source, systems) replaces what
    the base says. Raises ValueError for another base."""
    if base.kind != "pair" or "gold" in base.needs or base.token_weight is not None:
        raise ValueError(
            f"base: expected a pairwise objective of two completions without token weights, got {base.name!r}"
        )
    defaults = {**base.defaults, **keyword_defaults(token_weight)}
    return replace(
        base, name=name, defaults=defaults, token_weight=token_weight, weigh_reference=weigh_reference, **declared
    )


def keyword_defaults(function: Callable) -> dict[str, object]:
    parameters = signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}
