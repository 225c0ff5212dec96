"""Objectives without a reference model: what holds beyond their golden rows. Letters: S sequences, P pairs."""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from objective_cases import sample

from isdaa_kernels.objectives import OBJECTIVES, Pair, PairLogprob, reference_free
from isdaa_kernels.preference_loss import preference_loss

NAMES = [objective.name for objective in reference_free.OBJECTIVES]


def run(name: str, arguments: dict, **options):
    """(loss, gradient of the policy)"""
    tensors = dict(arguments)
    policy = tensors.pop("policy").clone().requires_grad_()
    loss, _ = preference_loss(policy, objective=name, **tensors, **options)
    (grad,) = torch.autograd.grad(loss, policy)
    return loss.detach(), grad


def pair_of(mean_chosen: float, mean_rejected: float, length: float = 1.0) -> PairLogprob:
    policy = torch.tensor([[mean_chosen], [mean_rejected]], dtype=torch.float64) * length
    lengths = torch.full((2, 1), length, dtype=torch.float64)
    return PairLogprob(Pair(*policy.requires_grad_().unbind(0)), lengths=Pair(*lengths.unbind(0)))


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_for_the_metrics_does_not_enter_the_loss(name):
    arguments = sample(OBJECTIVES[name])
    with_reference, without = run(name, arguments), run(name, {**arguments, "reference": None})
    assert torch.equal(with_reference[0], without[0])
    assert torch.equal(with_reference[1], without[1])


# Triple preference optimisation is the objective of pairs whose chosen completion is the gold one.
@pytest.mark.parametrize(
    ("triple", "of_pairs", "options"),
    [
        ("tpo", "cpo", {"beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.7}),
        ("tpo_hinge", "cpo_hinge", {"beta": 0.3, "sft_weight": 0.7}),
        ("tpo_ipo", "cpo_ipo", {"beta": 0.3, "sft_weight": 0.7}),
        ("tpo_mean", "simpo", {"beta": 3.0, "margin": 0.4, "label_smoothing": 0.2, "sft_weight": 0.7}),
    ],
)
def test_gold_may_be_the_chosen_completion(triple, of_pairs, options):
    arguments = sample(OBJECTIVES[of_pairs])
    chosen, rejected = torch.arange(12).view(2, 6)
    expected = run(of_pairs, arguments, **options)
    found = run(triple, {**arguments, "pairs": torch.stack([chosen, rejected, chosen], 1)}, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in NAMES if "gold" in OBJECTIVES[name].needs])
def test_an_empty_gold_completion_takes_its_pair_out(name):
    arguments = sample(OBJECTIVES[name])
    arguments["lengths"][12 + 1] = 0
    for value in ("policy", "reference"):
        arguments[value][12 + 1] = math.nan
    loss, grad = run(name, arguments, denominator=5)
    keep = torch.tensor([0, 2, 3, 4, 5])
    rest = {value: tensor.view(3, 6)[:, keep].reshape(-1) for value, tensor in arguments.items()}
    expected, expected_grad = run(name, rest, denominator=5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad.view(3, 6)[:, keep].reshape(-1), expected_grad)
    assert (grad.view(3, 6)[:, 1] == 0).all()


def test_alphapo_with_alpha_near_0_is_simpo():
    arguments = sample(OBJECTIVES["simpo"])
    options = {"beta": 3.0, "margin": 0.4, "label_smoothing": 0.1}
    expected = run("simpo", arguments, **options)
    for alpha in (1e-8, -1e-8):
        torch.testing.assert_close(run("alphapo", arguments, alpha=alpha, **options), expected, rtol=1e-6, atol=1e-9)


def test_alphapo_takes_one_alpha_a_pair():
    arguments = sample(OBJECTIVES["alphapo"], items=2)
    alpha = torch.tensor([0.25, -0.5], dtype=torch.float64)
    together, _ = run("alphapo", arguments, alpha=alpha)
    apart = [
        run("alphapo", {name: value.view(2, 2)[:, item] for name, value in arguments.items()}, alpha=alpha[item].item())
        for item in (0, 1)
    ]
    torch.testing.assert_close(together, torch.stack([loss for loss, _ in apart]).mean())


# From the bound of the mean log-prob over the place where two forms of log(1 - e^m) are as good as each other (-log 2) to where
# e^m is below the rounding of 1.
@pytest.mark.parametrize("mean", [-1e-6, -1e-5, -1e-3, -0.3, -0.69, -0.7, -3.0, -20.0, -36.0, -40.0, -300.0])
def test_log_odds_are_those_of_exact_arithmetic(mean):
    getcontext().prec = 60
    p = Decimal(mean).exp()
    expected = [float((p / (1 - p)).ln()), float(1 / (1 - p))]
    pair = pair_of(mean, -1.0)
    odds, _ = reference_free._log_odds(pair)
    (slope,) = torch.autograd.grad(odds.sum(), pair.policy.chosen)
    assert [odds.item(), slope.item()] == pytest.approx(expected, rel=1e-9)


# -LS(o) = -m and -LS(-o) = -log(1 - e^m), without odds.
@pytest.mark.parametrize("chosen", [-1e-4, -0.5, -2.0, -50.0, -1e4])
@pytest.mark.parametrize("rejected", [-1e-4, -0.5, -2.0, -50.0, -1e4])
def test_asft_needs_no_odds(chosen, rejected):
    pair = pair_of(chosen, rejected)
    loss = reference_free.asft(pair, odds_weight=0.3, sft_weight=0.7)
    expected = -chosen - 0.3 * math.log(-math.expm1(rejected))
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    slopes = torch.autograd.grad(loss.sum(), pair.policy)
    assert [slope.item() for slope in slopes] == pytest.approx([-1.0, 0.3 / math.expm1(min(-rejected, 700))], rel=1e-6)


def test_the_parts_of_orpo_and_asft_add_up():
    arguments = sample(OBJECTIVES["orpo"])
    imitation, _ = run("sft_mean", arguments)
    for name, weight in (("orpo", 0.3), ("asft", 0.3)):
        part, _ = run(f"{name}_align", arguments)
        whole, _ = run(name, arguments, odds_weight=weight, sft_weight=0.7)
        torch.testing.assert_close(whole, 0.7 * imitation + weight * part)
    torch.testing.assert_close(run("asft", arguments)[0] - run("asft_align", arguments)[0], imitation)


# Log-probs above 0, which no policy has but a caller's numbers may: the bound of the odds holds there too.
@pytest.mark.parametrize("name", ["orpo", "orpo_align", "asft", "asft_align"])
@pytest.mark.parametrize("means", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (1e4, -1e4), (-1e4, 1e4)])
def test_odds_of_certain_completions_are_finite(name, means):
    pair = pair_of(*means)
    loss = OBJECTIVES[name].function(pair)
    slopes = torch.autograd.grad(loss.sum(), pair.policy)
    assert torch.stack([loss, *slopes]).isfinite().all()


def test_orpo_has_no_option_of_two_meanings():
    arguments = sample(OBJECTIVES["orpo"])
    with pytest.raises(ValueError, match="orpo: unknown option 'beta', expected one of odds_weight, sft_weight"):
        run("orpo", arguments, beta=0.1)
    with pytest.raises(ValueError, match=r"orpo: odds_weight: expected a finite number of at least 0, got -0.1"):
        run("orpo", arguments, odds_weight=-0.1)


def test_slic_hf_and_slic_are_the_same_hinge():
    arguments = sample(OBJECTIVES["slic"])
    ratio = arguments["policy"] - arguments["reference"]
    expected, _ = run("slic", arguments, beta=0.5)
    found, _ = run("slic_hf", {**arguments, "policy": 0.5 * ratio}, sft_weight=0.0)
    torch.testing.assert_close(found, expected)
