"""Objectives by the names of other libraries, TRL's `loss_type` and LLaMA-Factory's `pref_loss`:

    named = objective_of("trl", ["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.2)
    preference_loss(policy, reference, lengths=lengths, **named.arguments())

What a name means in which version is in the tables of `library_names`; tests run the originals of the newest ones beside ours.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from types import MappingProxyType
from typing import NamedTuple

from isdaa_kernels.objectives import (
    OBJECTIVES,
    Objective,
    SamplerCorrection,
    SelfWeight,
    Weighting,
    importance_sampled,
)
from isdaa_kernels.objectives.imitation import weighted_sum
from isdaa_kernels.objectives.library_names import NAMES, NOT_COVERED, READ, SETTINGS, Name, Setting, between
from isdaa_kernels.objectives.objective import token_weighted
from isdaa_kernels.objectives.tokens import tail_weight


class NamedObjective(NamedTuple):
    """What a name of another library stands for: an objective, its options, the weight of pairs, what differs or must be added, and other
    arguments of the call."""

    objective: Objective
    options: dict[str, object]
    importance: Weighting | None
    note: str
    call: Mapping[str, object] = MappingProxyType({})

    def arguments(self) -> dict[str, object]:
        """As keyword arguments of `preference_loss` and `linear_preference_loss`; of `policy_loss` and `linear_policy_loss` for a loss of
        tokens."""
        weight = {} if self.importance is None else {"importance": self.importance}
        return {"objective": self.objective, **weight, **self.options, **self.call}


def objective_of(
    library: str,
    name: str | Sequence[str],
    *,
    trainer: str | None = None,
    version: str | None = None,
    **settings: object,
) -> NamedObjective:
    """The objective that `library` computes under `name`, with its options.

    library    "trl" or "llama_factory".
    name       its `loss_type` or `pref_loss`; a list of them for the sum of TRL's DPO trainer, with `loss_weights`. Trainers without
               such a setting have one name, their own: "orpo", "bco", "xpo", "nash_md".
    trainer    which of its trainers: "dpo", "cpo", "tpo", "kto", "orpo", "online_dpo", "bco", "xpo", "nash_md", "grpo" or "rloo" of TRL,
               the stage "dpo" or "kto" of LLaMA-Factory. None: "dpo" where it has the name, else the one that does.
    version    None: the installed one.
    settings   the library's own, by its own names; those that are not given have its defaults.

    Raises ValueError for names, settings and versions that were not read, for a library that is not installed where `version` is None,
    and for a setting that the library would ignore or that no objective here honours, unless it has its default.
    """
    if library not in READ:
        raise ValueError(f"library: expected one of {', '.join(READ)}, got {library!r}")
    release = _release(library, version)
    names = (name,) if isinstance(name, str) else tuple(name)
    trainer = _trainer(library, names, release) if trainer is None else trainer
    rows = [row for row in NAMES if (row.library, row.trainer) == (library, trainer) and row.holds(release)]
    rules = [rule for rule in SETTINGS if (rule.library, rule.trainer) == (library, trainer) and rule.holds(release)]
    where = f"{READ[library].title} {'.'.join(map(str, release))} ({trainer})"
    _check_trainer(library, trainer, release, rows, where)
    values = _values(rules, settings, where)
    draft = Draft(_chosen_rows(rows, names, values, where), values, where)
    for rule in rules:
        draft.apply(rule)
    return draft.finish()


class Draft:
    """The loss of the chosen rows, which the settings change one after the other."""

    def __init__(self, rows: list[Name], values: dict[str, object], where: str) -> None:
        self.rows, self.values, self.where = rows, values, where
        self.names = tuple(row.name for row in rows)
        self.notes = list(dict.fromkeys(row.note for row in rows if row.note))
        self.options = {name: value for row in rows for name, value in _options(row, values).items()}
        self.parts = [(self._part(row), 1.0) for row in rows]
        self.parts += [(OBJECTIVES[term], weight) for row in rows for term, weight in row.plus]
        self.tail: tuple[float, bool] | None = None
        self.importance: Weighting | None = None
        self.call = {name: value for row in rows for name, value in row.call.items()}

    def _part(self, row: Name) -> Objective:
        """The row's objective, out of reach of the options that are other rows' alone."""
        part = replace(OBJECTIVES[row.objective], state_required=row.state)
        return _without(part, (self.options.keys() & part.defaults.keys()) - _options(row, self.values).keys())

    def apply(self, rule: Setting) -> None:
        value = self.values[rule.name]
        if rule.change is not None and (rule.only is None or set(self.names) & set(rule.only)):
            method, argument = rule.change
            if value != rule.off:
                getattr(self, method)(rule, value, argument)
                self.notes += [rule.note] if rule.note else []
            return
        using = {row.name for row in self.rows if rule.name in row.options or rule.name in row.when}
        ignoring = [name for name in self.names if name not in using | set(rule.all_but or ())]
        if (not using if rule.all_but is None else ignoring) and value not in (rule.default, rule.off):
            raise ValueError(
                f"{rule.name}: expected {rule.default!r} for {' + '.join(map(repr, ignoring))} of {self.where}: another value is "
                f"ignored there, or has no counterpart here; got {value!r}"
            )

    def finish(self) -> NamedObjective:
        objective = self._sum()
        is_dpo = objective == OBJECTIVES["dpo"]
        if self.tail is not None:
            self.options["tail_weight"], weigh_reference = self.tail
            name = f"ld_{objective.name}" if weigh_reference else f"ld_{objective.name}_policy"
            objective = OBJECTIVES[name] if is_dpo else token_weighted(objective, name, tail_weight, weigh_reference)
        if self.importance is not None:
            name = "wpo" if is_dpo else f"wpo_{objective.name}"
            objective = replace(importance_sampled(objective, self.importance), name=name)
        objective.resolve_options(self.options)
        return NamedObjective(objective, self.options, self.importance, " ".join(self.notes), self.call)

    def _sum(self) -> Objective:
        if len(self.parts) == 1 and self.parts[0][1] == 1:
            return self.parts[0][0]
        # A state that is no part of what they compute would be in the way of another.
        parts = [(part if part.state_required else replace(part, state=None), weight) for part, weight in self.parts]
        terms = (part.name if weight == 1 else f"{weight:g}*{part.name}" for part, weight in parts)
        return weighted_sum("+".join(terms), parts)

    # What settings change: `library_names.Setting.change`

    def add(self, rule: Setting, weight: float, part: str) -> None:
        self.parts.append((OBJECTIVES[part], weight))

    def add_gold(self, rule: Setting, weight: float, _: None) -> None:
        self.parts.append((OBJECTIVES["sft_gold"], weight))

    def weigh_parts(self, rule: Setting, weights: Sequence[float], _: None) -> None:
        if len(weights) != len(self.rows):
            raise ValueError(f"{rule.name}: expected {len(self.rows)} numbers, got {weights!r}")
        self.parts = [(part, weight) for (part, _), weight in zip(self.parts, weights, strict=True)]

    def mix_with_bco(self, rule: Setting, weight: float, _: None) -> None:
        """(loss + weight * bco) / (1 + weight)"""
        self.parts = [(part, share / (1 + weight)) for part, share in self.parts]
        self.parts.append((replace(OBJECTIVES["bco"], state_required=True), weight / (1 + weight)))

    def weigh_tail(self, rule: Setting, weight: float, weigh_reference: bool) -> None:
        if "sft" in self.names:
            raise ValueError(f"{rule.name}: {self.where} does not weigh the tokens of 'sft'; no counterpart here")
        self.tail = (weight, weigh_reference)

    def weigh_pairs(self, rule: Setting, value: bool, _: None) -> None:
        unweighted = {"aot", "aot_unpaired", "sft"} & set(self.names)
        if unweighted:
            raise ValueError(f"{rule.name}: {self.where} has no weighted {', '.join(sorted(unweighted))}")
        if self.tail is not None:
            raise ValueError(f"{rule.name}: {self.where} does not weigh the tokens in the weight; no counterpart here")
        self.importance = SelfWeight(cap=None)

    def bound_above(self, rule: Setting, value: float | None, _: None) -> None:
        """Theirs is the lower bound where it is not given; CISPO has no other."""
        option = "ratio_cap" if self.names == ("cispo",) else "clip_high"
        self.options[option] = self.values["epsilon"] if value is None else value

    def pass_on(self, rule: Setting, value: object, argument: str) -> None:
        self.call[argument] = value

    def correct_divergence(self, rule: Setting, value: bool, _: None) -> None:
        if self.values["beta"] != 0:
            self.call["kl_corrected"] = value

    def correct_sampler(self, rule: Setting, value: bool, _: None) -> None:
        level, mode = self.values["vllm_importance_sampling_mode"].split("_")
        bounds = (self.values[f"vllm_importance_sampling_clip_{end}"] for end in ("max", "min"))
        self.call["correction"] = SamplerCorrection(level, mode, *bounds)

    def look_at_sampler(self, rule: Setting, value: object, _: None) -> None:
        if not self.values["use_vllm"]:
            raise ValueError(f"{rule.name}: expected {rule.default!r} for {self.where} without use_vllm, got {value!r}")

    def refuse(self, rule: Setting, value: object, reason: str) -> None:
        raise ValueError(f"{rule.name}: {self.where} {reason}; no counterpart here")


def _options(row: Name, values: dict[str, object]) -> dict[str, object]:
    """Our options of a row."""
    found = dict(row.fixed)
    for setting, option in row.options.items():
        if isinstance(option, str):
            found[option] = values[setting]
        else:
            found[option.name] = option.convert(values[setting])
    return found


def _without(objective: Objective, names: set[str]) -> Objective:
    """The same without these options, which keep their defaults."""
    if not names:
        return objective
    kept = {name: value for name, value in objective.defaults.items() if name not in names}
    bound = partial(objective.function, **{name: objective.defaults[name] for name in names})
    return replace(objective, function=update_wrapper(bound, objective.function), defaults=kept)


def _chosen_rows(rows: list[Name], names: tuple[str, ...], values: dict[str, object], where: str) -> list[Name]:
    """The row of each name that is for these settings."""
    if not names or (len(names) > 1 and "loss_weights" not in values):
        raise ValueError(f"name: expected one name for {where}, got {list(names)!r}")
    chosen = []
    for name in names:
        mine = [row for row in rows if row.name == name]
        if not mine:
            known = ", ".join(dict.fromkeys(row.name for row in rows))
            raise ValueError(f"name: expected one of {known} for {where}, got {name!r}")
        # Where no row is for these settings, the one that it does not take is named when it is applied.
        fitting = (row for row in mine if all(values[setting] == value for setting, value in row.when.items()))
        chosen.append(next(fitting, mine[-1]))
    for row in chosen:
        if row.alone and len(chosen) > 1:
            raise ValueError(f"name: {row.name!r} {row.alone} in {where}; no counterpart here")
    return chosen


def _values(rules: list[Setting], settings: dict[str, object], where: str) -> dict[str, object]:
    defaults = {rule.name: rule.default for rule in rules}
    for name in settings.keys() - defaults.keys():
        raise ValueError(f"{name}: no setting of {where} that was read, expected one of {', '.join(defaults)}")
    return {**defaults, **settings}


def _trainer(library: str, names: tuple[str, ...], release: tuple[int, ...]) -> str:
    """The first trainer in `NAMES` that has one of the names."""
    having = (row.trainer for row in NAMES if row.library == library and row.name in names and row.holds(release))
    return next(having, "dpo")


def _check_trainer(library: str, trainer: str, release: tuple[int, ...], rows: list[Name], where: str) -> None:
    if rows:
        return
    known = ", ".join(dict.fromkeys(row.trainer for row in NAMES if row.library == library and row.holds(release)))
    reason = NOT_COVERED.get((library, trainer))
    raise ValueError(f"trainer: expected one of {known}, got {where}" + (f": {reason}" if reason else ""))


def _release(library: str, version: str | None) -> tuple[int, ...]:
    """The version's leading numbers, checked."""
    title, distribution, first, last = READ[library]
    if version is None:
        try:
            version = installed_version(distribution)
        except PackageNotFoundError:
            raise ValueError(f"version: {distribution} is not installed; expected a version of {title}") from None
    numbers = re.match(r"\d+(\.\d+)*", version)
    release = tuple(map(int, numbers[0].split("."))) if numbers else ()
    if not release or not between(release, first, last):
        raise ValueError(f"version: {title} was read from {first} to {last}; got {version!r}")
    return release
