"""The page docs/objectives.md, from the registry and the tables of other libraries' names: `python -m isdaa_kernels.objectives`."""

from collections.abc import Iterable
from inspect import getdoc
from types import ModuleType

from isdaa_kernels.objectives import FAMILIES, Objective
from isdaa_kernels.objectives.library_names import NAMES, NOT_COVERED, READ, SETTINGS, Name, Option, Setting
from isdaa_kernels.objectives.objective import NEEDS, REDUCTIONS

INTRODUCTION = """\
# Objectives

An objective is a pure function of log-probs that returns one loss an item, chosen by name:

```python
from isdaa_kernels import linear_preference_loss, preference_loss

loss, metrics = preference_loss(policy, reference, objective="exo", beta=0.2)
loss, metrics = linear_preference_loss(hidden, head, targets, cu_seqlens, reference_logprob=reference_logprob, objective="is_dpo")
```

Losses of tokens, from advantages and ratios to the policy that the step started from, are those of `policy_loss`:

```python
from isdaa_kernels import group_advantages, linear_policy_loss

advantages = group_advantages(rewards, 8)      # eight completions a prompt
loss, metrics = linear_policy_loss(hidden, head, targets, cu_seqlens, advantages=advantages, old_logprob=old_logprob, objective="dapo")
```

This page is printed by `python -m isdaa_kernels.objectives` from the docstrings, where sources, gradients and other readings are in full.

- **Kinds.** An item is a preference pair ([P] at the end of a formula), a single completion ([S]), a group of completions of one prompt
  ([G]; pass `groups`) or a token ([N]: `policy_loss`). How losses of tokens become one number is said behind the formula, and may be
  chosen (`reduction`).
- **Letters.** a and b are the log-ratios to the reference of the chosen and the rejected completion, Delta = a - b; logp_w, logp_l and
  logp_g the log-probs of the chosen, the rejected and the gold completion, m_w, m_l and m_g the same in nats per token; l the log-ratio of
  a single completion, l_t that of a token; of a group a are the log-ratios and r the rewards; rho is the ratio of a token's probabilities
  under the policy and the old one, A its advantage, logp its log-prob, clip(x) = max(1 - clip_low, min(x, 1 + clip_high)); |chosen| is
  the number of scored tokens; LS the log-sigmoid, S the sigmoid. Log-probs are sums over tokens unless the formula says otherwise.
- **Needs.** What a call must have beyond the sums of the policy, or the log-probs of its tokens. `linear_preference_loss` makes lengths,
  log_sum_sq_prob and kl_score itself, and reference_kl of `reference=(hidden, head)` in the pass of both log-probs. Advantages
  are never made inside an objective: `group_advantages` makes them from rewards.
- **Beside a loss of tokens** there are arguments of `policy_loss`, the same for all: the divergence from the reference (`kl_weight`:
  its k3 estimate, or with `kl_direction` of `linear_policy_loss` the exact one), the entropy bonus
  (`entropy_weight`), the correction for the sampler (`correction=SamplerCorrection(...)`, truncated or masked importance sampling),
  `off_policy_threshold` and `token_weight`.
- **Options** are keyword arguments: numbers, or, but for losses of tokens, tensors with one value an item. An option that an objective
  does not have is refused.
- **Importance weights.** Each pairwise objective without a weight has a form `is_<name>` whose pair losses are multiplied by the clipped
  importance ratio of the pair (`importance=ImportanceWeight(...)`), the weight of IS-DAA. `wpo` has a weight of its own.
- **States.** What lasts longer than a batch, or needs the other ranks, is a module that is passed as `state=`. Where it is optional, its
  options take their defaults without it.
- **Mixtures.** `weighted_sum("mixed", {"dpo": 0.8, "bco": 0.2, "sft": 1.0})` is an objective too, and so is any `Objective` of your own.
"""

OTHER_NAMES = """\
## By another library's name

```python
from isdaa_kernels import objective_of

named = objective_of("trl", "simpo", simpo_gamma=0.8)      # the installed version's, with its defaults for the rest
named = objective_of("trl", ["sigmoid", "sft"], loss_weights=[1.0, 0.5], version="1.16")
named = objective_of("llama_factory", "sigmoid", pref_beta=0.1, pref_ftx=0.2)
loss, metrics = preference_loss(policy, reference, lengths=lengths, **named.arguments())

named = objective_of("trl", "dapo", beta=0.04, version="1.16")      # a loss of tokens
loss, metrics = policy_loss(logprob, cu_seqlens, advantages=advantages, reference_logprob=reference_logprob, **named.arguments())
```

One name may stand for other numbers in another version or another trainer, so the version is part of the question. Covered are
{read}, whose code was read (TRL's losses of tokens: 1.16); TRL's last is run beside ours by
`tests/test_objectives_originals.py` and `tests/test_policy_originals.py`. A setting that the library would ignore, or that nothing here
honours, is refused, and `named.note` says what remains to be given or differs:

{notes}
In the tables below a trainer is named where it is not the one for DPO, versions where the name is not in all of them, settings where they
are not called as ours are (`pref_beta` is `beta`).

Without a counterpart: {refused}.
"""

# Names for sums, which no row of the tables has.
SUMS = {"mpo": 'TRL `["sigmoid", "bco_pair", "sft"]` with `loss_weights=[0.8, 0.2, 1.0]`'}

# Published systems that are in no objective's `systems`, and why they need none.
BY_AN_ARGUMENT = {
    "APO (accelerated)": "any pairwise objective with the policy of the iteration before as reference; the extrapolation is of the weights",
    "Curry-DPO": "`dpo`; pairs in the order of their difficulty, the policy of the stage before as reference",
    "DNO-Prct": "`dpo` with the policy of the iteration before as reference",
    "TR-DPO": "any objective with a reference; the caller moves the reference",
    "RSO": "`slic` or `dpo` on completions chosen by rejection sampling",
    "Egida": "`dpo` on 2000 pairs; the work is in the data",
    "More is Less": "`dpo`; the work is in the data",
    "Insights into Alignment": "an evaluation of `dpo`, `ipo`, `kto` and `cpo`",
    "Scaling laws for over-optimisation": "an analysis of `dpo`, `ipo` and `slic`; it plots rewards over `monitors.sqrt_kl`",
    "Likelihood over-optimisation": "an analysis; its indicators are `monitors.vocabulary_means`",
    "From r to Q*": "an analysis: the loss is `dpo`, the reward of a token beta times its log-ratio",
    "Survey of DPO": "a survey",
}
_IMAGES = "steps of a diffusion or a flow, not tokens"
NOT_HERE = {
    "D3PO": _IMAGES,
    "Diffusion-DRO": _IMAGES,
    "DSO": _IMAGES,
    "AWM": _IMAGES,
    "CPO (condition)": _IMAGES,
    "PDPPO": "reinforcement learning with two critics in simulated environments; the policy's part is `ppo`",
    "OFS-DPO": "its regulariser between a fast and a slow adapter was not found written down",
    "OptiDICE": "a method of offline reinforcement learning without a loss of a language model",
    "OPPO": "a method of reinforcement learning without a loss of a language model",
}

COLUMNS = ("name", "formula", "needs", "options and defaults", "names elsewhere", "source", "systems")


def page() -> str:
    parts = [INTRODUCTION, _other_names(), *(_family(family) for family in FAMILIES)]
    parts.append("## Covered by an argument\n\n" + _reasons(BY_AN_ARGUMENT))
    parts.append("## Not here\n\n" + _reasons(NOT_HERE))
    return "\n".join(parts)


def _other_names() -> str:
    noted = {row: f"{READ[row.library].title}: {row.note}" for row in (*NAMES, *SETTINGS) if row.note}
    notes = (
        f"- {', '.join(dict.fromkeys(_called(row) + _in_brackets(_versions(row)) for row in rows))} of {note}\n"
        for note, rows in _by_value(noted).items()
    )
    refused = "; ".join(
        f"{', '.join(f'{READ[library].title} {trainer}' for library, trainer in trainers)} ({reason})"
        for reason, trainers in _by_value(NOT_COVERED).items()
    )
    read = " and ".join(f"{title} from {first} to {last}" for title, _, first, last in READ.values())
    return OTHER_NAMES.format(read=read, notes="".join(notes), refused=refused)


def _family(family: ModuleType) -> str:
    title = family.__name__.rpartition(".")[2].replace("_", " ").capitalize()
    summary = " ".join(getdoc(family).split("\n\n")[0].split())
    rows = "".join(_row(_cells(objective)) for objective in family.OBJECTIVES)
    return f"## {title}\n\n{summary}\n\n{_row(COLUMNS)}{_row(['---'] * len(COLUMNS))}{rows}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cells(objective: Objective) -> tuple[str, ...]:
    return (
        f"`{objective.name}`",
        _escaped(_formula(objective)),
        _needs(objective),
        ", ".join(f"`{name}` {_number(value)}" for name, value in objective.defaults.items()) or "none",
        _escaped("; ".join(elsewhere(objective))),
        _escaped(objective.source),
        ", ".join(objective.systems),
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _formula(objective: Objective) -> str:
    text, _, item = objective.formula.removesuffix(".").rpartition("; ")
    if objective.token_weight is not None:
        of = "policy and reference" if objective.weigh_reference else "the policy"
        factor = _first_paragraph(objective.token_weight).rpartition("; ")[0]
        text += f", the log-prob of each token of {of} times {factor}"
    if "token_weight" in objective.needs:
        text += ", the log-prob of each token times its token_weight"
    if objective.reduction is not None:
        text += f": {REDUCTIONS[objective.reduction]}"
    if objective.importance is not None:
        text = f"w ({text}), {_first_paragraph(type(objective.importance)).removesuffix('.')}"
    return f"{text}; {item}"


def _first_paragraph(thing: object) -> str:
    return " ".join(getdoc(thing).split("\n\n")[0].split())


def _needs(objective: Objective) -> str:
    needs = objective.needs | (objective.importance.needs if objective.importance else frozenset())
    words = [name for name in NEEDS if name in needs]
    if objective.state is not None:
        words.append(f"state `{objective.state.__name__}`" + ("" if objective.state_required else " (optional)"))
    return ", ".join(words) or "none"


def elsewhere(objective: Objective) -> list[str]:
    """What other libraries call it; names that need no special settings first."""
    found = sorted((row for row in NAMES if row.objective == objective.name), key=lambda row: len(row.when))
    groups = _by_value({row: (row.library, row.trainer, row.name, tuple(row.when.items())) for row in found})
    rules = [rule for rule in SETTINGS if rule.shown_at == objective.name]
    return [*map(_name, groups.values()), *map(_setting, rules), *filter(None, [SUMS.get(objective.name)])]


def _name(rows: list[Name]) -> str:
    """One name, with what is said of it in all versions that have it."""
    first, apart = rows[0], len(rows) > 1
    whole = any(row.since is None for row in rows) and any(row.until is None for row in rows)
    said = [f"`{setting}={value!r}`" for setting, value in first.when.items()]
    said += [] if whole else [_versions(first)]
    for row in rows:
        words = [_option(*item, rows) for item in row.options.items()] + ["with its state" if row.state else ""]
        words = ", ".join(filter(None, words))
        said += [f"{_versions(row)}: {words}" if apart and words else words]
    said += [f"with `{term}` for its own term" for term, _ in first.plus]
    said += [f"with `{argument}={value!r}`" for argument, value in first.call.items()]
    said += [f"with `{rule.name}` times {_term(rule)} for its own term" for rule in _imitating(first)]
    return f"{READ[first.library].title} {_called(first)}{_in_brackets(', '.join(filter(None, said)))}"


def _option(setting: str, option: str | Option, rows: list[Name]) -> str:
    """Which option a setting is, or that it is one in some versions only; nothing where its name tells it."""
    if not isinstance(option, str):
        return option.text
    if option == "beta" or setting == option:
        return "" if all(setting in row.options for row in rows) else f"`{setting}`"
    return f"`{setting}` is `{option}`"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _called(row: Name | Setting) -> str:
    trainer = "" if row.trainer in ("dpo", row.name) else f"{row.trainer.replace('_', ' ')} "
    return f"{trainer}`{row.name}`"


def _imitating(row: Name) -> list[Setting]:
    """Settings that add a term unless they are switched off."""
    return [
        rule
        for rule in SETTINGS
        if (rule.library, rule.trainer) == (row.library, row.trainer)
        and rule.change is not None
        and rule.change[0] in ("add", "add_gold")
        and rule.default != rule.off
        and (rule.only is None or row.name in rule.only)
        and row.when.get(rule.name) != rule.off
    ]


def _term(rule: Setting) -> str:
    method, part = rule.change
    return "the mean over all gold tokens" if method == "add_gold" else f"`{part}`"


def _setting(rule: Setting) -> str:
    return f"{READ[rule.library].title} `{rule.name}`{_in_brackets(_versions(rule))}"


def _versions(rule: Name | Setting) -> str:
    if rule.since and rule.until:
        return f"{rule.since} to {rule.until}"
    return f"from {rule.since}" if rule.since else f"to {rule.until}" if rule.until else ""


def _reasons(reasons: dict[str, str]) -> str:
    lines = (f"- {', '.join(names)}: {reason}.\n" for reason, names in _by_value(reasons).items())
    return "".join(lines)


def _by_value(values: dict) -> dict:
    """value -> the keys that have it, in order."""
    found = {}
    for key, value in values.items():
        found.setdefault(value, []).append(key)
    return found
