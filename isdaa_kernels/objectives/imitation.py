"""Terms that imitate a completion, and weighted sums of objectives.

Letters: P preference pairs; a, b log-ratios to the reference of chosen and rejected, Delta = a - b; logp_w the log-prob of the chosen
completion under the policy, m_w the same in nats per scored token; LS log-sigmoid.
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.objective import Objective, declare, make_objective
from isdaa_kernels.objectives.options import ANY_NUMBER, DOMAINS, Domain, is_finite_number, optional
from isdaa_kernels.objectives.pairwise import bco, dpo

Part = Objective | Callable[..., Tensor] | str


@declare("lengths", source="TRL", whole_batch=True)
def sft(pair: PairLogprob) -> Tensor:
    """-logp_w P / (sum of |chosen| over the P pairs that count): the mean over them is that over all their chosen tokens; [P].

    The cross entropy of the chosen completions, reduced as TRL does for loss_type `sft`: every token has the same weight, so a longer
    completion has more. It looks at the whole batch; micro-batches give each its own mean. Where a pair is empty,
    the call's default denominator still counts it. d/dlogp_w = -P / (sum of |chosen|).
    """
    return _mean_over_batch(pair, pair.policy.chosen, pair.lengths.chosen)


@declare("lengths", "gold", source="TRL", whole_batch=True)
def sft_gold(pair: PairLogprob) -> Tensor:
    """-logp_g P / (sum of |gold| over the P pairs that count): the mean over them is that over all their gold tokens; [P].

    `sft` of a gold completion: the term of TRL's TPO trainer, where `tpo` takes the mean of each pair's own. d/dlogp_g = -P / (sum of
    |gold|).
    """
    return _mean_over_batch(pair, pair.gold.policy, pair.gold.lengths)


def _mean_over_batch(pair: PairLogprob, logprob_P: Tensor, length_P: Tensor) -> Tensor:
    present_P = torch.ones_like(length_P, dtype=torch.bool) if pair.present is None else pair.present
    tokens = torch.where(present_P, length_P, 0).sum().clamp(min=1)
    return -logprob_P * (present_P.sum() / tokens)


@declare("lengths", source="LLaMA-Factory")
def sft_mean(pair: PairLogprob) -> Tensor:
    """-m_w, the mean over the tokens of the chosen completion; [P].

    The term that LLaMA-Factory adds as pref_ftx: every completion has the same weight. d/dlogp_w = -1 / |chosen|.
    """
    return -pair.mean_policy.chosen


@declare(source="Ouyang et al. 2022, arXiv 2203.02155")
def sft_sum(pair: PairLogprob) -> Tensor:
    """-logp_w, the sum over the tokens of the chosen completion; [P].

    The likelihood of the whole completion, as papers write it: Ouyang et al. 2022 (arXiv 2203.02155) and many others. d/dlogp_w = -1.
    """
    return -pair.policy.chosen


@declare("reference", source="Liu et al. 2024, arXiv 2405.16436", systems=("RPO",))
def rpo(pair: PairLogprob, *, beta: float = 0.01, sft_weight: float = 0.005) -> Tensor:
    """-LS(beta Delta) - beta sft_weight logp_w; [P].

    Regularised preference optimisation, Liu et al. 2024 (arXiv 2405.16436): imitation of the chosen completion as a guard against what the
    implicit reward overrates. sft_weight is their eta; the form with sums and the defaults are those of their main code and recipe. Their
    other code adds eta times the mean over tokens, without beta (beta = 0.5, eta = 0.2): that is `iterative_rpo`, or a sum with `sft`.
    d/da = -beta (S(-beta Delta) + sft_weight), S the sigmoid, d/db = beta S(-beta Delta).
    """
    return dpo(pair, beta=beta) - beta * sft_weight * pair.policy.chosen


@declare("reference", "lengths", source="Pang et al. 2024, arXiv 2404.19733")
def iterative_rpo(pair: PairLogprob, *, beta: float = 0.1, sft_weight: float = 1.0) -> Tensor:
    """-LS(beta Delta) - sft_weight m_w; [P].

    Iterative reasoning preference optimisation, Pang et al. 2024 (arXiv 2404.19733), with the policy of the iteration before as reference.
    The completion is chain of thought and answer, and m_w the mean over both; sft_weight is their alpha. The first version of the paper
    takes the mean over the prompt as well and puts alpha before the first term; at its value, 1, it makes no difference where. TRL adds
    `sft`. d/da = -beta S(-beta Delta) - sft_weight / |chosen|, S the sigmoid, d/db = beta S(-beta Delta).
    """
    return dpo(pair, beta=beta) - sft_weight * pair.mean_policy.chosen


def weighted_sum(
    name: str,
    parts: Mapping[Part, float] | Iterable[tuple[Part, float]],
    *,
    source: str = "",
    systems: tuple[str, ...] = (),
    note: str = "",
    **defaults: object,
) -> Objective:
    """The pairwise objective that is the sum of `parts`, each times its weight::

        weighted_sum("mixed", {"dpo": 0.8, "bco": 0.2, "sft": 1.0}, beta=0.1)    # TRL's loss_type and loss_weights
        weighted_sum("with_bco", {"dpo": 1 / 1.5, "bco": 0.5 / 1.5}, beta=0.1)   # LLaMA-Factory's pref_bco_weight = 0.5

    parts      objectives by name, as the functions in this package, or, in (part, weight) tuples, as an `Objective`, which is no key of a
               dict. Pairwise, without an importance weight (weigh the sum: `importance_sampled`) and without token weights; at most one of
               them has a state, which becomes that of the sum. A weight is a finite number.
    defaults   of options of the sum, for all parts that have them.

    The sum needs what any part needs. Its options are those of its parts by name; a value holds for all parts that have the option. An
    option whose default differs from part to part has the default None: each part's own.

    Raises ValueError for parts, weights or defaults other than these.
    """
    terms = [(_part(name, part), weight) for part, weight in (parts.items() if isinstance(parts, Mapping) else parts)]
    _check_terms(name, terms)
    objectives = [part for part, _ in terms]
    stateful = next((part for part in objectives if part.state is not None), None)
    defaults = _check_defaults(name, _shared_defaults(objectives), defaults)
    objective = Objective(
        name,
        _sum_function(name, terms, defaults, note),
        frozenset().union(*(part.needs for part in objectives)),
        defaults,
        domains={option: _domain(objectives, option, default is None) for option, default in defaults.items()},
        state=None if stateful is None else stateful.state,
        state_required=stateful is not None and stateful.state_required,
        whole_batch=any(part.whole_batch for part in objectives),
        source=source,
        systems=systems,
    )
    objective.resolve_options(defaults)
    return objective


def _sum_function(
    name: str, terms: list[tuple[Objective, float]], defaults: Mapping[str, object], note: str
) -> Callable[..., Tensor]:
    """A function like those above, with their formula, signature and name."""

    def function(pair: PairLogprob, **options: object) -> Tensor:
        unknown = options.keys() - defaults.keys()
        if unknown:
            raise TypeError(f"{name}: unexpected options {sorted(unknown)}")
        options = {**defaults, **options}
        losses = []
        for part, weight in terms:
            # None where that is the default of the sum: the part's own.
            given = [n for n in part.defaults if not (options[n] is None and defaults[n] is None)]
            losses.append(weight * part.function(pair, **{n: options[n] for n in given}))
        return sum(losses[1:], start=losses[0])

    function.__name__ = function.__qualname__ = name
    function.__doc__ = "\n\n".join(filter(None, (f"{_formula(terms)}; [P].", note, _own_defaults(terms, defaults))))
    function.__signature__ = Signature(
        [
            Parameter("pair", Parameter.POSITIONAL_OR_KEYWORD, annotation=PairLogprob),
            *(Parameter(n, Parameter.KEYWORD_ONLY, default=value) for n, value in defaults.items()),
        ],
        return_annotation=Tensor,
    )
    return function


def _part(name: str, part: Part) -> Objective:
    if isinstance(part, str):
        # The registry imports this module.
        from isdaa_kernels.objectives import get_objective

        return get_objective(part)
    if isinstance(part, Objective):
        return part
    if not hasattr(part, "declared"):
        raise ValueError(f"{name}: parts: expected objectives, their functions or names, got {part!r}")
    return make_objective(part)


def _check_terms(name: str, terms: list[tuple[Objective, float]]) -> None:
    if not terms:
        raise ValueError(f"{name}: parts: expected at least one objective")
    for part, weight in terms:
        # Token weights change the log-probs that all parts see.
        weighs_tokens = part.token_weight is not None or "token_weight" in part.needs
        if part.kind != "pair" or part.importance_weighted or weighs_tokens:
            raise ValueError(
                f"{name}: parts: expected pairwise objectives without importance or token weights, got {part.name!r}"
            )
        if not is_finite_number(weight):
            raise ValueError(f"{name}: weight of {part.name}: expected a finite number, got {weight!r}")
    stateful = [part.name for part, _ in terms if part.state is not None]
    if len(stateful) > 1:
        raise ValueError(f"{name}: parts: expected at most one with a state, got {', '.join(stateful)}")
    for part in (part for part, _ in terms if part.state is not None):
        for other in (other for other, _ in terms if other is not part):
            if part.state.gives & other.defaults.keys():
                raise ValueError(f"{name}: parts: the state of {part.name} gives an option of {other.name}, too")


def _shared_defaults(objectives: list[Objective]) -> dict[str, object]:
    """The default of each option; None where the parts differ."""
    defaults = {}
    for part in objectives:
        for option, value in part.defaults.items():
            defaults[option] = value if defaults.get(option, value) == value else None
    return defaults


def _check_defaults(name: str, defaults: dict[str, object], given: Mapping[str, object]) -> dict[str, object]:
    for option in given.keys() - defaults.keys():
        raise ValueError(f"{name}: no part has the option {option!r}")
    return {**defaults, **given}


def _domain(objectives: list[Objective], option: str, none: bool) -> Domain:
    """The values that all parts with the option accept; and None, if `none`."""
    having = (part for part in objectives if option in part.defaults)
    domain, *others = dict.fromkeys(part.domains.get(option, DOMAINS.get(option, ANY_NUMBER)) for part in having)
    for other in others:
        domain = _both(domain, other)
    return optional(domain) if none and not domain.accepts(None) else domain


def _both(one: Domain, other: Domain) -> Domain:
    return Domain(f"{one.sentence} and {other.sentence}", lambda value: one.accepts(value) and other.accepts(value))


def _formula(terms: list[tuple[Objective, float]]) -> str:
    """0.8 dpo + 0.2 bco + sft"""
    return " + ".join(part.name if weight == 1 else f"{weight:g} {part.name}" for part, weight in terms).replace(
        "+ -", "- "
    )


def _own_defaults(terms: list[tuple[Objective, float]], defaults: Mapping[str, object]) -> str:
    """Says of options whose default is each part's own what that is."""
    sentences = []
    for option in (option for option, value in defaults.items() if value is None):
        values = (f"{part.defaults[option]} in {part.name}" for part, _ in terms if option in part.defaults)
        sentences.append(f"Default of {option}: {', '.join(values)}.")
    return " ".join(sentences)


OBJECTIVES = (
    *(make_objective(function) for function in (sft, sft_gold, sft_mean, sft_sum, rpo, iterative_rpo)),
    weighted_sum(
        "mpo",
        {dpo: 0.8, bco: 0.2, sft: 1.0},
        source="Wang et al. 2024, arXiv 2411.10442",
        note="Mixed preference optimisation, Wang et al. 2024 (arXiv 2411.10442): a preference, a quality and a generation loss, with the "
        "weights of its authors and of TRL's documentation and one beta for both. The authors' quality loss has the running mean of the "
        "rewards, here the state `RewardMean(0.1)`. Not the maximum MPO, which is `mpo_maximum`.",
        beta=0.1,
    ),
)
