"""The public names are a promise: adding one is a decision, and each says what it does."""

import inspect
from importlib.resources import files

import pytest

import isdaa_kernels

NAMES = {
    "OBJECTIVES",
    "ImportanceWeight",
    "LMHead",
    "NoBackend",
    "Objective",
    "Plan",
    "PreferenceLoss",
    "Problem",
    "check",
    "explain_backends",
    "importance_sampled",
    "linear_logprob",
    "linear_preference_loss",
    "plan",
    "preference_loss",
    "sequence_logprob",
    "shift_targets",
}


def test_names():
    assert set(isdaa_kernels.__all__) == NAMES
    assert {"dpo", "ipo", "ipo_mean", "slic", "is_dpo", "is_ipo", "is_ipo_mean", "is_slic"} == set(
        isdaa_kernels.OBJECTIVES
    )


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


def test_the_signature_of_the_primitive():
    parameters = inspect.signature(isdaa_kernels.linear_logprob).parameters
    assert list(parameters)[:3] == ["hidden", "weight", "targets"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in list(parameters.values())[3:])
