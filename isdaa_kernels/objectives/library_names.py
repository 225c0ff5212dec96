"""What names and settings of other libraries mean, version by version: the tables behind `names.objective_of`.

They were written from the code of the versions in `READ`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple


class Library(NamedTuple):
    """Its title as people write it, its distribution as it is installed, the first and the last version that was read."""

    title: str
    distribution: str
    first: str
    last: str


READ = {
    "trl": Library("TRL", "trl", "0.24", "1.16"),
    "llama_factory": Library("LLaMA-Factory", "llamafactory", "0.9.2", "0.9.5"),
}


class Option(NamedTuple):
    """An option of ours that is not simply the setting of that name; `text` says what it is."""

    name: str
    convert: Callable[[object], object]
    text: str


@dataclass(frozen=True, eq=False)
class Name:
    """In versions since..until (None: as far as was read) `trainer` computes `objective` under `name`, if its settings are as in `when`.

    options  settings of theirs, and the options of ours that they are.
    fixed    options of ours for which they have no setting.
    call     arguments of `policy_loss` for which they have none.
    plus     terms that they always add, with their weights.
    state    whether the objective's state is part of what they compute.
    alone    why there is no counterpart in a list of several names; empty: there is.
    """

    library: str
    trainer: str
    name: str
    objective: str
    options: Mapping[str, str | Option] = field(default_factory=dict)
    when: Mapping[str, object] = field(default_factory=dict)
    since: str | None = None
    until: str | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)
    call: Mapping[str, object] = field(default_factory=dict)
    plus: tuple[tuple[str, float], ...] = ()
    state: bool = False
    alone: str = ""
    note: str = ""

    def holds(self, release: tuple[int, ...]) -> bool:
        return between(release, self.since, self.until)


@dataclass(frozen=True)
class Setting:
    """A setting of a trainer's and its default, in versions since..until.

    change   what it does to the loss, where it is not `off`, of the names in `only` (None: all): a method of `names.Draft`, and its
             argument. Without one it is an option of the rows that list it, and other names ignore it.
    all_but  that other names do not ignore it, but for these.
    shown_at the objective beside which the documentation names it.
    note     what must be known of that change.
    """

    library: str
    trainer: str
    name: str
    default: object
    change: tuple[str, object] | None = None
    off: object = None
    only: tuple[str, ...] | None = None
    all_but: tuple[str, ...] | None = None
    since: str | None = None
    until: str | None = None
    shown_at: str | None = None
    note: str = ""

    def holds(self, release: tuple[int, ...]) -> bool:
        return between(release, self.since, self.until)


def between(release: tuple[int, ...], since: str | None, until: str | None) -> bool:
    """Whether since <= release <= until, each as far as it is written: 1.16.3 is not beyond 1.16, and 1.16 is 1.16.0."""
    low, high = (tuple(map(int, text.split("."))) if text else () for text in (since, until))
    return (*release, 0, 0) >= low and (not high or release[: len(high)] <= high)


def same(value: object) -> object:
    return value


_RUNNING_MEAN = "Needs state=RewardMean(beta), the running mean of the rewards."
_FROM_TRL = (
    "This is what the name says. LLaMA-Factory leaves the loss to TRL and, with TRL from 0.20, does not pass the name on: it trains on "
    "`sigmoid`."
)
_WITHOUT_ZERO = "TRL leaves out tokens whose id is 0."
_GLOBAL = (
    "Pass the number of scored tokens of the whole step, over accumulation and ranks, as denominator, divided by the number of ranks where "
    "their gradients are averaged, as TRL does."
)
_SAMPLER = "Give sampler_logprob."
_SCALE = {"beta": "beta"}
_SMOOTHED = {"beta": "beta", "label_smoothing": "label_smoothing"}
_SIMPO = {**_SMOOTHED, "simpo_gamma": "margin"}
_KTO = {"beta": "beta", "desirable_weight": "desirable_weight", "undesirable_weight": "undesirable_weight"}
_PREF = {"pref_beta": "beta"}
_NO_SFT = {"sft_weight": 0.0}
_OLD, _NEW = {"until": "0.28"}, {"since": "0.29"}  # TRL's DPO trainer before and after it was written anew
_GONE = {"until": "1.13"}


def _alpha(convert: Callable[[object], object], text: str) -> dict[str, str | Option]:
    return {**_SCALE, "f_alpha_divergence_coef": Option("alpha", convert, text)}


def _divergence(kind: str, **more: object) -> dict[str, object]:
    return {"f_divergence_type": kind, **more}


def _dpo_of_trl() -> tuple[Name, ...]:
    row = partial(Name, "trl", "dpo")
    by_alpha = _divergence("alpha_divergence")
    smoothing = Option("label_smoothing", lambda value: value or 1e-3, "`label_smoothing` 0 is 1e-3")
    return (
        row("sigmoid", "dpo_forward_kl", _SCALE, _divergence("forward_kl"), **_NEW),
        row("sigmoid", "dpo_js", _SCALE, _divergence("js_divergence")),
        row("sigmoid", "dpo", _SCALE, _divergence("alpha_divergence", f_alpha_divergence_coef=1.0), **_NEW),
        row(
            "sigmoid",
            "dpo_alpha",
            _alpha(lambda value: 1 - value, "`alpha` is 1 - `f_alpha_divergence_coef`"),
            by_alpha,
            **_NEW,
        ),
        row("sigmoid", "dpo_alpha", _alpha(same, "`alpha` is `f_alpha_divergence_coef`"), by_alpha, **_OLD),
        row("sigmoid", "dpo", _SMOOTHED, **_OLD),
        row("sigmoid", "dpo", _SCALE, **_NEW),
        row("sigmoid_norm", "dpo_mean", _SCALE, since="1.4"),
        row("hinge", "slic", _SCALE),
        row("ipo", "ipo_mean", _SCALE, alone="makes means of the sums of all names beside it", **_OLD),
        row("ipo", "ipo_mean", _SCALE, **_NEW),
        row("robust", "robust_dpo", _SMOOTHED),
        row(
            "exo_pair",
            "exo",
            {**_SCALE, "label_smoothing": smoothing},
            alone="may change the label_smoothing of all names beside it",
            **_OLD,
        ),
        row("exo_pair", "exo", _SMOOTHED, **_NEW),
        row("nca_pair", "nca", _SCALE),
        row("bco_pair", "bco", _SCALE, state=True, note=_RUNNING_MEAN, **_OLD),
        row("bco_pair", "bco", _SCALE, **_NEW),
        row("sppo_hard", "sppo_hard", _SCALE),
        row("aot", "aot", _SMOOTHED),
        row("aot_pair", "aot_unpaired", _SMOOTHED, until="0.27"),
        row("aot_unpaired", "aot_unpaired", _SMOOTHED, since="0.28"),
        row("apo_zero", "apo_zero", _SCALE),
        row("apo_down", "apo_down", _SCALE),
        row("discopop", "discopop", {**_SCALE, "discopop_tau": "mixing_temperature"}),
        row("sft", "sft", note=_WITHOUT_ZERO, **_OLD),
        row("sft", "sft", **_NEW),
    )


def _cpo_of_trl() -> tuple[Name, ...]:
    row, with_alpha, without = partial(Name, "trl", "cpo"), {**_SIMPO, "alpha": "alpha"}, {"alpha": 0.0}
    return (
        row("sigmoid", "cpo", _SMOOTHED, fixed=_NO_SFT),
        row("hinge", "cpo_hinge", _SCALE, fixed=_NO_SFT),
        row("ipo", "cpo_ipo", _SCALE, fixed=_NO_SFT),
        row("simpo", "simpo", _SIMPO, without, fixed=_NO_SFT),
        row("simpo", "alphapo", with_alpha),
        row("alphapo", "simpo", _SIMPO, without, fixed=_NO_SFT),
        row("alphapo", "alphapo", with_alpha),
    )


def _tpo_of_trl() -> tuple[Name, ...]:
    row, no_gold = partial(Name, "trl", "tpo", since="1.3", fixed=_NO_SFT), {"tpo_alpha": 0.0}
    by_mean = {**_SMOOTHED, "tpo_l_gamma": "margin"}
    return (
        row("sigmoid", "cpo", _SMOOTHED, no_gold),
        row("sigmoid", "tpo", _SMOOTHED),
        row("hinge", "cpo_hinge", _SCALE, no_gold),
        row("hinge", "tpo_hinge", _SCALE),
        row("ipo", "cpo_ipo", _SCALE, no_gold),
        row("ipo", "tpo_ipo", _SCALE),
        row("tpo-l", "simpo", by_mean, no_gold),
        row("tpo-l", "tpo_mean", by_mean),
    )


def _others_of_trl() -> tuple[Name, ...]:
    row = partial(Name, "trl")
    return (
        row("kto", "kto", "kto", _KTO),
        row("kto", "apo_zero_unpaired", "apo_zero_unpaired", _KTO),
        row(
            "orpo",
            "orpo",
            "orpo",
            {"beta": "odds_weight"},
            fixed=_NO_SFT,
            plus=(("sft", 1.0),),
            note="TRL's likelihood term covers the prompts, too; here the tokens that are scored.",
        ),
        row("online_dpo", "sigmoid", "dpo", _SCALE),
        row("online_dpo", "ipo", "ipo", _SCALE, note="Sums, where TRL's DPO trainer has means under this name."),
        row("bco", "bco", "bco_unpaired", _SCALE, state=True, note=_RUNNING_MEAN, **_GONE),
        row(
            "xpo",
            "xpo",
            "xpo",
            {**_SCALE, "alpha": "exploration_weight"},
            note="reference_chosen [P] says where the reference's completion was chosen.",
            **_GONE,
        ),
        row(
            "nash_md",
            "nash_md",
            "nash_md",
            _SCALE,
            note="preference [S] is the judged probability that the completion beats the mixture's.",
            **_GONE,
        ),
    )


def _grpo_of_trl() -> tuple[Name, ...]:
    row, by_sequence = partial(Name, "trl", "grpo", since="1.16"), {"importance_sampling_level": "sequence"}
    clip = {"epsilon": "clip_low", "delta": "ratio_cap"}
    soft = {"sapo_temperature_pos": "positive_temperature", "sapo_temperature_neg": "negative_temperature"}
    gamma = {"vespo_k_pos": "positive_power", "vespo_lambda_pos": "positive_rate"}
    gamma |= {"vespo_k_neg": "negative_power", "vespo_lambda_neg": "negative_rate"}
    return (
        row("grpo", "gspo", clip, by_sequence),
        row("grpo", "grpo", clip),
        row("bnpo", "gspo", clip, by_sequence, call={"reduction": "batch_token_mean"}),
        row("bnpo", "bnpo", clip),
        row("dr_grpo", "gspo", clip, by_sequence, call={"reduction": "max_length"}),
        row("dr_grpo", "dr_grpo", clip),
        row("dapo", "gspo", clip, by_sequence, call={"reduction": "token_mean"}, note=_GLOBAL),
        row("dapo", "dapo", clip, note=_GLOBAL),
        row("luspo", "luspo", clip, by_sequence),
        row("luspo", "grpo", clip, call={"reduction": "sequence_sum"}),
        row("cispo", "cispo", note=_GLOBAL),
        row("sapo", "sapo", soft),
        row("vespo", "vespo", gamma, note=_GLOBAL),
        Name(
            "trl",
            "rloo",
            "rloo",
            "rloo",
            {"epsilon": "clip_low"},
            since="1.16",
            note="TRL's beta weighs a divergence in the rewards; its advantages are those of `group_advantages` that leave one out.",
        ),
    )


def _of_llama_factory() -> tuple[Name, ...]:
    row = partial(Name, "llama_factory", "dpo")
    weights = {"kto_chosen_weight": "desirable_weight", "kto_rejected_weight": "undesirable_weight"}
    return (
        row("sigmoid", "dpo", {**_PREF, "dpo_label_smoothing": "label_smoothing"}),
        row("hinge", "slic", _PREF, note=_FROM_TRL),
        row("ipo", "ipo_mean", _PREF, note=_FROM_TRL),
        row(
            "kto_pair",
            "kto_pair",
            _PREF,
            note="Only TRL 0.8 has it; with later versions LLaMA-Factory stops or, from 0.20, trains on `sigmoid`.",
        ),
        row("orpo", "orpo", {"pref_beta": "odds_weight"}),
        row("simpo", "simpo", {**_PREF, "simpo_gamma": "margin"}),
        Name("llama_factory", "kto", "kto", "kto", {**_PREF, **weights}),
    )


NAMES: tuple[Name, ...] = (
    *_dpo_of_trl(), *_cpo_of_trl(), *_tpo_of_trl(), *_others_of_trl(), *_grpo_of_trl(), *_of_llama_factory(),
)  # fmt: skip

_TOKENS = "losses of tokens, with ratios to the policy that sampled them"
_DISTILLATION = "the distributions of a teacher, not preferences"
_REWARDS = "a model of rewards"
_IMITATION = "imitation of single completions"
NOT_COVERED = {
    ("trl", "sdpo"): _DISTILLATION,
    ("trl", "sdft"): _DISTILLATION,
    ("trl", "gkd"): _DISTILLATION,
    ("trl", "reward"): _REWARDS,
    ("trl", "sft"): _IMITATION,
    ("llama_factory", "ppo"): _TOKENS,
    ("llama_factory", "rm"): _REWARDS,
    ("llama_factory", "sft"): _IMITATION,
}


def _options(library: str, trainer: str, **defaults: object) -> tuple[Setting, ...]:
    return tuple(Setting(library, trainer, name, default) for name, default in defaults.items())


def _settings_of_trl() -> tuple[Setting, ...]:
    dpo = partial(Setting, "trl", "dpo")
    of_start = "counts tokens from the start of the prompt"
    of_last = "leaves the log-prob of the last token out of the weight"
    return (
        *_options("trl", "dpo", beta=0.1, label_smoothing=0.0, discopop_tau=0.05),
        dpo("f_divergence_type", "reverse_kl", all_but=("sft",)),
        dpo("f_alpha_divergence_coef", 1.0, **_OLD),
        dpo("f_alpha_divergence_coef", 0.5, **_NEW),
        dpo("reference_free", False, **_OLD),
        dpo("loss_weights", None, ("weigh_parts", None)),
        dpo("rpo_alpha", None, ("add", "sft"), shown_at="sft", note=_WITHOUT_ZERO, **_OLD),
        dpo("ld_alpha", None, ("refuse", of_start), **_OLD),
        dpo("ld_alpha", None, ("weigh_tail", True), shown_at="ld_dpo", **_NEW),
        dpo("use_weighting", False, ("refuse", of_last), off=False, **_OLD),
        dpo("use_weighting", False, ("weigh_pairs", None), off=False, shown_at="wpo", **_NEW),
        *_options("trl", "cpo", beta=0.1, label_smoothing=0.0, simpo_gamma=0.5, alpha=0.0),
        Setting("trl", "cpo", "cpo_alpha", 1.0, ("add", "sft"), off=0.0, only=("sigmoid", "hinge", "ipo", "simpo")),
        *_options("trl", "tpo", beta=0.01, label_smoothing=0.0, tpo_l_gamma=0.5),
        Setting("trl", "tpo", "tpo_alpha", 1.0, ("add_gold", None), off=0.0),
        *_options("trl", "kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
        *_options("trl", "orpo", beta=0.1),
        *_options("trl", "online_dpo", beta=0.1),
        *_options("trl", "bco", beta=0.1),
        *_options("trl", "xpo", beta=0.1, alpha=1e-5, loss_type="sigmoid"),
        *_options("trl", "nash_md", beta=0.1),
    )


def _settings_of_grpo() -> tuple[Setting, ...]:
    rule, always = partial(Setting, "trl", "grpo", since="1.16"), object()
    bounded = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")
    # whose mean is over tokens, as that of the entropy always is there
    by_token = ("bnpo", "dapo", "cispo", "vespo")
    sampler = {
        "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": None,
    }
    gamma = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    options = {"epsilon": 0.2, "delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, **gamma}
    return (
        *(rule(name, default) for name, default in options.items()),
        rule("epsilon_high", None, ("bound_above", None), off=always, only=bounded),
        rule("importance_sampling_level", "token"),
        rule(
            "max_completion_length",
            512,
            ("pass_on", "max_length"),
            off=always,
            only=("dr_grpo",),
            all_but=(*bounded, "sapo", "vespo"),
        ),
        rule("beta", 0.0, ("pass_on", "kl_weight"), off=0.0),
        rule("use_bias_correction_kl", True, ("correct_divergence", None), off=False),
        rule("off_policy_mask_threshold", None, ("pass_on", "off_policy_threshold")),
        rule("entropy_coef", 0.0, ("pass_on", "entropy_weight"), off=0.0, only=by_token),
        rule("use_vllm", False, ("correct_sampler", None), off=False, note=_SAMPLER),
        # read with use_vllm
        *(rule(name, default, ("look_at_sampler", None), off=default) for name, default in sampler.items()),
        Setting("trl", "rloo", "epsilon", 0.2, since="1.16"),
        Setting("trl", "rloo", "epsilon_high", None, ("bound_above", None), off=always, since="1.16"),
    )


def _settings_of_llama_factory() -> tuple[Setting, ...]:
    dpo = partial(Setting, "llama_factory", "dpo")
    of_sums = ("sigmoid", "hinge", "kto_pair")
    return (
        *_options("llama_factory", "dpo", pref_beta=0.1, dpo_label_smoothing=0.0, simpo_gamma=0.5),
        dpo(
            "pref_bco_weight",
            0.0,
            ("mix_with_bco", None),
            off=0.0,
            only=of_sums,
            since="0.9.4",
            shown_at="bco",
            note=_RUNNING_MEAN,
        ),
        dpo("pref_ftx", 0.0, ("add", "sft_mean"), off=0.0, shown_at="sft_mean"),
        dpo("ld_alpha", None, ("weigh_tail", False), since="0.9.3", shown_at="ld_dpo_policy"),
        *_options("llama_factory", "kto", pref_beta=0.1, kto_chosen_weight=1.0, kto_rejected_weight=1.0, pref_ftx=0.0),
    )


SETTINGS: tuple[Setting, ...] = (*_settings_of_trl(), *_settings_of_grpo(), *_settings_of_llama_factory())
