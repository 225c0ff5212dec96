"""`objective_of`: names and settings of TRL and LLaMA-Factory. tests/test_objectives_originals.py compares the numbers."""

import math
import re
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from objective_cases import sample, sample_tokens

from isdaa_kernels import SamplerCorrection, policy_loss, preference_loss
from isdaa_kernels.objectives import OBJECTIVES, SelfWeight, names
from isdaa_kernels.objectives.library_names import NAMES, NOT_COVERED, SETTINGS, Name
from isdaa_kernels.objectives.names import objective_of
from isdaa_kernels.objectives.unpaired_state import RewardMean

# Every minor version that was read; for LLaMA-Factory every release.
VERSIONS = {
    "trl": [*(f"0.{minor}" for minor in range(24, 30)), *(f"1.{minor}" for minor in range(17))],
    "llama_factory": ["0.9.2", "0.9.3", "0.9.4", "0.9.5"],
}
TRL, FACTORY = "1.16.0", "0.9.5"
# What a library itself asks for where its default will not do.
ASKED = {"exo_pair": {"label_smoothing": 1e-3}}


def settings_of(row: Name) -> dict:
    return {**ASKED.get(row.name, {}), **row.when}


@pytest.mark.parametrize("row", NAMES, ids=lambda row: f"{row.library}-{row.trainer}-{row.name}")
def test_every_row_gives_a_loss_in_every_version_that_it_holds_for(row):
    held = [version for version in VERSIONS[row.library] if row.holds(tuple(map(int, version.split("."))))]
    assert held
    assert row.objective in OBJECTIVES
    for version in {held[0], held[-1]}:
        named = objective_of(row.library, row.name, trainer=row.trainer, version=version, **settings_of(row))
        if named.objective.kind == "token":
            loss, _ = policy_loss(**{**sample_tokens(named.objective), **named.arguments()})
            assert loss.isfinite()
            continue
        arguments = sample(named.objective)
        if named.objective.state_required:
            arguments["state"] = RewardMean(0.1)
        if named.objective.token_weight is None:
            loss, _ = preference_loss(**arguments, **named.arguments())
            assert loss.isfinite()


@pytest.mark.parametrize("row", NAMES, ids=lambda row: f"{row.library}-{row.trainer}-{row.name}")
def test_rows_name_settings_and_options_that_there_are(row):
    settings = {s.name for s in SETTINGS if (s.library, s.trainer) == (row.library, row.trainer)}
    options = {option if isinstance(option, str) else option.name for option in row.options.values()}
    assert set(row.options) | set(row.when) <= settings
    assert options | set(row.fixed) <= set(OBJECTIVES[row.objective].defaults)
    assert {part for part, _ in row.plus} <= set(OBJECTIVES)
    assert not row.state or OBJECTIVES[row.objective].state is not None


@pytest.mark.parametrize("library", VERSIONS)
def test_settings_have_one_meaning_a_version(library):
    for version in VERSIONS[library]:
        release = tuple(map(int, version.split(".")))
        held = [(s.trainer, s.name) for s in SETTINGS if s.library == library and s.holds(release)]
        assert len(held) == len(set(held))


def test_giving_the_defaults_of_the_library_changes_nothing():
    for row in NAMES:
        version = row.until or VERSIONS[row.library][-1]
        release = tuple(map(int, version.split(".")))
        rules = [s for s in SETTINGS if (s.library, s.trainer) == (row.library, row.trainer) and s.holds(release)]
        defaults = {rule.name: rule.default for rule in rules}
        call = {"trainer": row.trainer, "version": version}
        found = objective_of(row.library, row.name, **call, **{**defaults, **settings_of(row)})
        expected = objective_of(row.library, row.name, **call, **settings_of(row))
        assert (found.objective.name, found.options) == (expected.objective.name, expected.options)


# Coverage of the installed TRL, read as text: importing it takes seconds.
SOURCES = {
    "dpo": ("trainer/dpo_trainer.py", r'loss_type == "([\w-]+)"'),
    "grpo": ("trainer/grpo_trainer.py", r'if self\.loss_type (?:==|in) \[?"([\w", ]+)"'),
    "kto": ("trainer/kto_trainer.py", r'self\.loss_type == "([\w-]+)"'),
    "cpo": ("experimental/cpo/cpo_config.py", r'"choices": \["(sigmoid.*)"\]'),
    "tpo": ("experimental/tpo/tpo_trainer.py", r'self\.loss_type == "([\w-]+)"'),
    "online_dpo": ("experimental/online_dpo/online_dpo_trainer.py", r'args\.loss_type == "([\w-]+)"'),
}


@pytest.mark.parametrize("trainer", SOURCES)
def test_every_loss_type_of_the_installed_trl_is_covered(trainer):
    file, pattern = SOURCES[trainer]
    (root,) = find_spec("trl").submodule_search_locations
    found = re.findall(pattern, (Path(root) / file).read_text())
    types = {name for text in found for name in text.split('", "')}
    covered = {row.name for row in NAMES if row.trainer == trainer and row.library == "trl" and row.holds((1, 16))}
    assert len(types) > 1
    assert types == covered


def test_every_trainer_of_the_installed_trl_with_a_loss_type_is_covered_or_said_not_to_be():
    (root,) = find_spec("trl").submodule_search_locations
    files = [file for file in Path(root).rglob("*_trainer.py") if "loss_type ==" in file.read_text()]
    trainers = {file.stem.removesuffix("_trainer") for file in files}
    refused = {trainer for library, trainer in NOT_COVERED if library == "trl"}
    covered = {row.trainer for row in NAMES if row.library == "trl"}
    assert len(trainers) > 4
    assert trainers <= covered | refused
    assert not covered & refused


def test_a_name_may_mean_another_number_from_version_to_version():
    def of(name, version, **settings):
        named = objective_of("trl", name, version=version, **settings)
        return named.objective.name, named.options, named.objective.state_required

    assert of("sigmoid", "0.28.0", label_smoothing=0.2) == ("dpo", {"beta": 0.1, "label_smoothing": 0.2}, False)
    assert of("bco_pair", "0.28.0") == ("bco", {"beta": 0.1}, True)
    assert of("bco_pair", "0.29.0") == ("bco", {"beta": 0.1}, False)
    assert of("aot_pair", "0.27.2") == of("aot_unpaired", "0.28.0")
    assert of("exo_pair", "0.28") == ("exo", {"beta": 0.1, "label_smoothing": 1e-3}, False)
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    assert of("sigmoid", "0.28", **settings) == ("dpo_alpha", {"beta": 0.1, "alpha": 0.3}, False)
    assert of("sigmoid", "0.29", **settings) == ("dpo_alpha", {"beta": 0.1, "alpha": 0.7}, False)


def test_trainers_give_the_same_name_other_numbers():
    def of(name, trainer):
        return objective_of("trl", name, trainer=trainer, version=TRL).objective.name

    assert of("ipo", None) == of("ipo", "dpo") == "ipo_mean"
    assert of("ipo", "online_dpo") == "ipo"
    assert of("ipo", "cpo") == "cpo_ipo+sft"
    assert of("ipo", "tpo") == "tpo_ipo+sft_gold"
    assert [of(name, None) for name in ("simpo", "kto", "orpo", "tpo-l")] == [
        "simpo+sft", "kto", "orpo+sft", "tpo_mean+sft_gold",
    ]  # fmt: skip


def test_a_running_mean_that_is_part_of_the_loss_must_be_given():
    named = objective_of("trl", "bco_pair", version="0.24.0")
    policy, reference = torch.tensor([-12.0, -9.25]), torch.tensor([-12.5, -8.25])
    with pytest.raises(ValueError, match="state: expected a RewardMean"):
        preference_loss(policy, reference, **named.arguments())
    assert "RewardMean" in named.note
    # a = 0.5, b = -1, so the mean reward is -0.025
    loss, _ = preference_loss(policy, reference, state=RewardMean(0.1), **named.arguments())
    assert loss.item() == pytest.approx(2 * math.log1p(math.exp(-0.075)))


def test_losses_of_tokens_of_trl():
    def of(name, **settings):
        found = objective_of("trl", name, version=TRL, **settings).arguments()
        return {**found, "objective": found["objective"].name}

    clip = {"clip_low": 0.2, "clip_high": 0.2, "ratio_cap": None}
    assert of("dapo") == {"objective": "dapo", **clip}
    assert of("grpo", epsilon=0.1, delta=3.0) == {
        "objective": "grpo", "clip_low": 0.1, "clip_high": 0.1, "ratio_cap": 3.0,
    }  # fmt: skip
    assert of("dr_grpo", max_completion_length=64) == {"objective": "dr_grpo", **clip, "max_length": 64}
    by_sequence = {"importance_sampling_level": "sequence"}
    assert of("dapo", **by_sequence) == {"objective": "gspo", **clip, "reduction": "token_mean"}
    assert of("luspo") == {"objective": "grpo", **clip, "reduction": "sequence_sum"}
    assert of("luspo", **by_sequence) == {"objective": "luspo", **clip}
    assert of("cispo", epsilon_high=5.0) == {"objective": "cispo", "ratio_cap": 5.0}
    assert of("sapo", beta=0.1) == {
        "objective": "sapo", "positive_temperature": 1.0, "negative_temperature": 1.05, "kl_weight": 0.1, "kl_corrected": True,
    }  # fmt: skip
    found = of(
        "dapo", use_vllm=True, vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0
    )
    assert found["correction"] == SamplerCorrection("token", "truncate", 2.0)
    found = of("dapo", entropy_coef=0.01, off_policy_mask_threshold=0.5)
    assert (found["entropy_weight"], found["off_policy_threshold"]) == (0.01, 0.5)
    assert of("rloo", epsilon_high=0.3) == {"objective": "rloo", "clip_low": 0.2, "clip_high": 0.3}
    assert "denominator" in objective_of("trl", "dapo", version=TRL).note


def test_pref_bco_weight_of_llama_factory():
    settings = {"pref_beta": 0.2, "pref_bco_weight": 0.5, "pref_ftx": 0.3}
    named = objective_of("llama_factory", "sigmoid", version=FACTORY, **settings)
    loss, _ = preference_loss(
        torch.tensor([-12.0, -9.25], dtype=torch.float64),
        torch.tensor([-12.5, -8.25], dtype=torch.float64),
        lengths=torch.tensor([5, 4]),
        state=RewardMean(0.2),
        **named.arguments(),
    )
    dpo, bco = math.log1p(math.exp(-0.3)), 2 * math.log1p(math.exp(-0.15))
    assert loss.item() == pytest.approx((dpo + 0.5 * bco) / 1.5 + 0.3 * 12 / 5)


def test_gold_tokens_have_equal_weights_over_the_batch():
    """Pairs of gold completions of 2, 6 and 4 tokens, the last one beside an empty completion."""
    policy = torch.tensor(
        [-1.0, -1.0, -1.0, -2.0, -2.0, -2.0, -3.0, -9.0, -7.0], dtype=torch.float64, requires_grad=True
    )
    lengths = torch.tensor([1, 1, 1, 1, 1, 0, 2, 6, 4])
    named = objective_of("trl", "sigmoid", trainer="tpo", version=TRL, beta=0.5, tpo_alpha=0.25)
    loss, _ = preference_loss(policy, lengths=lengths, denominator=2, **named.arguments())
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) + 0.25 * 12 / 8)
    loss.backward()
    torch.testing.assert_close(policy.grad[6:], torch.tensor([-0.25 / 8, -0.25 / 8, 0.0], dtype=torch.float64))


def test_weights_of_pairs_and_tokens():
    named = objective_of("trl", "sigmoid", version=TRL, use_weighting=True, beta=0.3)
    assert (named.objective.name, named.importance, named.options) == ("wpo", SelfWeight(cap=None), {"beta": 0.3})
    assert named.objective.importance == named.importance
    named = objective_of("trl", ["hinge", "ipo"], version=TRL, use_weighting=True)
    assert (named.objective.name, named.importance) == ("wpo_slic+ipo_mean", SelfWeight(cap=None))

    # a weight of the one name is not lost
    named = objective_of("trl", ["sigmoid"], version=TRL, loss_weights=[0.5], use_weighting=True)
    assert (named.objective.name, named.objective.formula) == ("wpo_0.5*dpo", "0.5 dpo; [P].")
    named = objective_of("trl", "sigmoid", version=TRL, loss_weights=[0.5], ld_alpha=0.3)
    assert (named.objective.name, named.objective.formula) == ("ld_0.5*dpo", "0.5 dpo; [P].")

    named = objective_of("trl", "sigmoid", version=TRL, ld_alpha=0.3)
    assert (named.objective, named.options) == (OBJECTIVES["ld_dpo"], {"beta": 0.1, "tail_weight": 0.3})
    named = objective_of("llama_factory", "sigmoid", version=FACTORY, ld_alpha=0.3)
    assert named.objective == OBJECTIVES["ld_dpo_policy"]
    named = objective_of("llama_factory", "simpo", version=FACTORY, ld_alpha=0.3)
    assert (named.objective.name, named.objective.weigh_reference) == ("ld_simpo_policy", False)


def test_old_settings_for_imitation():
    named = objective_of("trl", "sigmoid", version="0.28", rpo_alpha=0.7)
    expected = objective_of("trl", ["sigmoid", "sft"], version="0.28", loss_weights=[1.0, 0.7])
    assert named.objective.formula == expected.objective.formula == "dpo + 0.7 sft; [P]."


def test_without_a_version_it_is_the_installed_one(monkeypatch):
    monkeypatch.setattr(names, "installed_version", lambda distribution: {"trl": "0.24.0"}[distribution])
    assert objective_of("trl", "bco_pair").objective.state_required

    def nothing(distribution):
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(names, "installed_version", nothing)
    with pytest.raises(ValueError, match="version: llamafactory is not installed; expected a version of LLaMA-Factory"):
        objective_of("llama_factory", "sigmoid")


@pytest.mark.parametrize("version", ["0.23.1", "1.17.0", "2", "new", ""])
def test_a_version_that_was_not_read(version):
    with pytest.raises(ValueError, match=f"version: TRL was read from 0.24 to 1.16; got '{version}'"):
        objective_of("trl", "sigmoid", version=version)


@pytest.mark.parametrize("version", ["0.24", "0.24.0", "1.16", "1.16.9", "1.16.0.dev0", "1"])
def test_a_version_that_was_read(version):
    assert objective_of("trl", "hinge", version=version).objective.name == "slic"


REFUSED = [
    (
        "trl",
        "sigmoid",
        {"label_smoothing": 0.1},
        r"label_smoothing: expected 0.0 for 'sigmoid' of TRL 1.16.0 .dpo.: another",
    ),
    ("trl", "ipo", {"label_smoothing": 0.1}, "label_smoothing: expected 0.0 for 'ipo'"),
    ("trl", "sigmoid", {"discopop_tau": 0.1}, "discopop_tau: expected 0.05"),
    ("trl", "sigmoid", {"f_alpha_divergence_coef": 0.1}, "f_alpha_divergence_coef: expected 0.5"),
    ("trl", "sigmoid", {"f_divergence_type": "chi"}, "f_divergence_type: expected 'reverse_kl' for 'sigmoid'"),
    ("trl", "hinge", {"f_divergence_type": "forward_kl"}, "f_divergence_type: expected 'reverse_kl' for 'hinge'"),
    ("trl", ["sigmoid", "hinge"], {"f_divergence_type": "forward_kl"}, "f_divergence_type: .* for 'hinge'"),
    ("trl", "sigmoid", {"gamma": 0.1}, r"gamma: no setting of TRL 1.16.0 \(dpo\) that was read, expected one of beta"),
    ("trl", "sigmoid", {"rpo_alpha": 1.0}, "rpo_alpha: no setting"),
    ("trl", "sigmoid", {"beta": -1.0}, "beta: expected a finite number above 0"),
    ("trl", "sigmoid", {"ld_alpha": 1.5}, "tail_weight: expected a number in"),
    ("trl", "sft", {"ld_alpha": 0.5}, "ld_alpha: TRL 1.16.0 .dpo. does not weigh the tokens of 'sft'"),
    ("trl", "aot", {"use_weighting": True}, "use_weighting: TRL .* has no weighted aot"),
    ("trl", ["sigmoid", "sft"], {"use_weighting": True}, "use_weighting: TRL .* has no weighted sft"),
    ("trl", "sigmoid", {"use_weighting": True, "ld_alpha": 0.5}, "use_weighting: TRL .* does not weigh the tokens"),
    ("trl", "exo_pair", {}, "exo: label_smoothing: expected"),
    ("trl", ["sigmoid", "ipo"], {"loss_weights": [1.0]}, r"loss_weights: expected 2 numbers, got \[1.0\]"),
    ("trl", [], {}, "name: expected one name"),
    ("trl", ["simpo", "sigmoid"], {"trainer": "cpo"}, "name: expected one name for TRL 1.16.0 .cpo., got"),
    (
        "trl",
        "simpo",
        {"trainer": "dpo"},
        "name: expected one of sigmoid, sigmoid_norm, .* for TRL 1.16.0 .dpo., got 'simpo'",
    ),
    ("trl", "aot_pair", {}, "name: expected one of .*aot_unpaired"),
    ("trl", "hinge", {"trainer": "cpo", "label_smoothing": 0.1}, "label_smoothing: expected 0.0"),
    ("trl", "sigmoid", {"trainer": "cpo", "alpha": 0.1}, "alpha: expected 0.0 for 'sigmoid'"),
    ("trl", "alphapo", {"cpo_alpha": 0.5}, "cpo_alpha: expected 1.0 for 'alphapo'"),
    ("trl", "sigmoid", {"trainer": "cpo", "simpo_gamma": 0.1}, "simpo_gamma: expected 0.5"),
    (
        "trl",
        "sigmoid",
        {"trainer": "ppo"},
        "trainer: expected one of dpo, cpo, tpo, kto, orpo, online_dpo, grpo, rloo, got TRL",
    ),
    ("trl", "grpo", {"entropy_coef": 0.1}, "entropy_coef: expected 0.0 for 'grpo' of TRL 1.16.0 .grpo."),
    ("trl", "cispo", {"delta": 4.0}, "delta: expected None for 'cispo'"),
    (
        "trl",
        "sapo",
        {"importance_sampling_level": "sequence"},
        "importance_sampling_level: expected 'token' for 'sapo'",
    ),
    (
        "trl",
        "grpo",
        {"vllm_importance_sampling_clip_max": 2.0},
        "vllm_importance_sampling_clip_max: expected 3.0 .* without use_vllm",
    ),
    (
        "trl",
        "dapo",
        {"top_entropy_quantile": 0.2},
        "top_entropy_quantile: no setting of TRL 1.16.0 .grpo. that was read",
    ),
    ("trl", "sft", {"trainer": "sft"}, "trainer: .*: imitation of single completions"),
    (
        "llama_factory",
        "ppo",
        {"trainer": "ppo"},
        "trainer: expected one of dpo, kto, got LLaMA-Factory 0.9.5 .ppo.: losses",
    ),
    ("torchtune", "sigmoid", {}, "library: expected one of trl, llama_factory, got 'torchtune'"),
    ("llama_factory", "ipo", {"dpo_label_smoothing": 0.1}, "dpo_label_smoothing: expected 0.0 for 'ipo'"),
    ("llama_factory", "ipo", {"pref_bco_weight": 0.1}, "pref_bco_weight: expected 0.0 for 'ipo'"),
    ("llama_factory", "sigmoid", {"simpo_gamma": 0.1}, "simpo_gamma: expected 0.5"),
    ("llama_factory", "kto", {"pref_ftx": 0.1}, "pref_ftx: expected 0.0 for 'kto'"),
]


@pytest.mark.parametrize(("library", "name", "settings", "message"), REFUSED)
def test_what_would_be_ignored_or_cannot_be_honoured_is_refused(library, name, settings, message):
    with pytest.raises(ValueError, match=message):
        objective_of(library, name, version=FACTORY if library == "llama_factory" else TRL, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (["sigmoid", "ipo"], {}, "name: 'ipo' makes means of the sums of all names beside it in TRL 0.28 .dpo."),
        (["exo_pair", "sigmoid"], {}, "name: 'exo_pair' may change the label_smoothing"),
        ("sigmoid", {"ld_alpha": 0.5}, "ld_alpha: TRL 0.28 .dpo. counts tokens from the start of the prompt"),
        ("sigmoid", {"use_weighting": True}, "use_weighting: TRL 0.28 .dpo. leaves the log-prob of the last"),
        ("sigmoid", {"reference_free": True}, "reference_free: expected False"),
        ("sigmoid_norm", {}, "name: expected one of"),
    ],
)
def test_what_older_versions_of_trl_compute_otherwise_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        objective_of("trl", name, version="0.28", **settings)
