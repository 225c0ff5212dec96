"""The public names are a promise: adding one is a decision, and each says what it does."""

import inspect
from importlib.resources import files

import pytest

import isdaa_kernels

NAMES = {
    "OBJECTIVES",
    "BatchState",
    "ImportanceWeight",
    "KlLogprobs",
    "LMHead",
    "NamedObjective",
    "NoBackend",
    "Objective",
    "Plan",
    "PolicyLoss",
    "PreferenceLoss",
    "Problem",
    "Routed",
    "SamplerCorrection",
    "SelfWeight",
    "VocabOrder",
    "VocabStats",
    "check",
    "chosen_tokens",
    "divergent_tokens",
    "explain_backends",
    "group_advantages",
    "guidance_weight",
    "importance_sampled",
    "linear_kl",
    "linear_logprob",
    "linear_logprob_stats",
    "linear_policy_loss",
    "linear_preference_loss",
    "logprob_from_logits",
    "logprob_stats_from_logits",
    "make_vocab_order",
    "monitors",
    "objective_of",
    "plan",
    "policy_loss",
    "preference_loss",
    "rto_rewards",
    "sequence_logprob",
    "shift_targets",
    "step_cu_seqlens",
    "weighted_sum",
}


def test_names():
    assert set(isdaa_kernels.__all__) == NAMES
    assert set(isdaa_kernels.OBJECTIVES) >= {
        "dpo",
        "ipo",
        "ipo_mean",
        "slic",
        "is_dpo",
        "is_slic",
        "simpo",
        "exo_rw",
        "grpo",
    }


@pytest.mark.parametrize("name", sorted(NAMES - {"OBJECTIVES"}))
def test_every_name_is_documented_and_typed(name):
    thing = getattr(isdaa_kernels, name)
    assert len(inspect.getdoc(thing) or "") > 40
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_the_types_ship():
    assert files("isdaa_kernels").joinpath("py.typed").is_file()


@pytest.mark.parametrize(("name", "positional"), [
    ("linear_logprob", ["hidden", "weight", "targets"]), ("logprob_from_logits", ["logits", "targets"]),
])  # fmt: skip
def test_the_signatures_of_the_primitives(name, positional):
    parameters = inspect.signature(getattr(isdaa_kernels, name)).parameters
    assert list(parameters)[: len(positional)] == positional
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[len(positional) :])
    # The form with statistics takes the same, and three more.
    with_stats = {"linear_logprob": "linear_logprob_stats", "logprob_from_logits": "logprob_stats_from_logits"}[name]
    more = inspect.signature(getattr(isdaa_kernels, with_stats)).parameters
    assert set(more) - set(parameters) == {"stats", "detached", "top_k"}
    assert [p for p in more if p in parameters] == list(parameters)
    assert all(more[p].default == parameters[p].default for p in parameters)
