"""Objectives: golden values by hand, gradients, laws, and the rules of the registry. Letters: P pairs."""

import inspect
import math

import pytest
import torch

from isdaa_kernels.objectives import (
    OBJECTIVES,
    ImportanceWeight,
    Objective,
    Pair,
    PairLogprob,
    get_objective,
    importance_sampled,
)
from isdaa_kernels.objectives.objective import NEEDS
from isdaa_kernels.objectives.options import DOMAINS
from isdaa_kernels.preference_loss import preference_loss

BASES = ("dpo", "ipo", "ipo_mean", "slic")
A, B = 0.5, -1.0  # log-ratios of the golden pair: Delta = 1.5, a + b = -0.5
LENGTHS = (5.0, 4.0)
W = math.exp(-0.5)

# name -> (options, loss of the golden pair)
GOLDEN = {
    "dpo": [
        ({}, math.log1p(math.exp(-0.15))),
        ({"beta": 2.0}, math.log1p(math.exp(-3.0))),
        ({"label_smoothing": 0.2}, 0.8 * math.log1p(math.exp(-0.15)) + 0.2 * math.log1p(math.exp(0.15))),
    ],
    "ipo": [({}, 12.25), ({"beta": 0.5}, 0.25)],  # (1.5 - 5)^2, (1.5 - 1)^2
    "ipo_mean": [({}, 21.6225), ({"beta": 0.5}, 0.4225)],  # 0.5 / 5 + 1 / 4 = 0.35; (0.35 - 5)^2, (0.35 - 1)^2
    "slic": [({}, 0.85), ({"beta": 0.5}, 0.25), ({"beta": 1.0}, 0.0)],
    "is_dpo": [
        ({}, W * math.log1p(math.exp(-0.15))),
        ({"label_smoothing": 0.5}, W * (math.log1p(math.exp(-0.15)) + 0.075)),
    ],
    "is_ipo": [({}, W * 12.25)],
    "is_ipo_mean": [({}, W * 21.6225)],
    "is_slic": [({}, W * 0.85)],
}


def make_pair(a, b, lengths=None) -> PairLogprob:
    """PairLogprob with the given log-ratios over a reference of -12.5 (chosen) and -8.25 (rejected)."""
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    reference = Pair(torch.full_like(a, -12.5), torch.full_like(b, -8.25))
    policy = Pair(reference.chosen + a, reference.rejected + b)
    lengths = Pair(*(torch.full_like(a, n) for n in (lengths or LENGTHS)))
    return PairLogprob(policy, reference, reference, lengths)


@pytest.mark.parametrize(("name", "options", "expected"), [(n, *row) for n, rows in GOLDEN.items() for row in rows])
def test_golden_value(name, options, expected):
    policy, reference = torch.tensor([-12.0, -9.25]), torch.tensor([-12.5, -8.25])
    loss, _ = preference_loss(policy, reference, objective=name, lengths=torch.tensor(LENGTHS), **options)
    assert loss.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_every_objective_has_a_golden_row():
    assert set(GOLDEN) == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_registry_rules(name):
    objective = OBJECTIVES[name]
    assert objective.name == name
    assert objective.needs <= set(NEEDS)
    assert set(objective.defaults) <= set(DOMAINS)
    assert len(inspect.getsource(objective.function).splitlines()) <= 15
    assert "[P]" in objective.function.__doc__
    assert objective.importance_weighted == name.startswith("is_")


@pytest.mark.parametrize("name", BASES)
def test_importance_sampled_keeps_the_formula_of_its_base(name):
    base, weighted = OBJECTIVES[name], OBJECTIVES[f"is_{name}"]
    assert weighted == importance_sampled(base)
    assert (weighted.function, weighted.needs, weighted.defaults) == (base.function, base.needs, base.defaults)
    assert weighted.importance == ImportanceWeight()


def test_only_the_mean_form_needs_lengths():
    needing = {name for name, objective in OBJECTIVES.items() if "lengths" in objective.needs}
    assert needing == {"ipo_mean", "is_ipo_mean"}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# base, options, dL/da, dL/db at (A, B); each hinge has a row on either side of its kink
GRADIENTS = [
    ("dpo", {"beta": 0.3}, -0.3 * sigmoid(-0.45), 0.3 * sigmoid(-0.45)),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.1}, 0.3 * (sigmoid(0.45) - 0.9), -0.3 * (sigmoid(0.45) - 0.9)),
    ("ipo", {"beta": 0.2}, 2 * (1.5 - 2.5), -2 * (1.5 - 2.5)),
    ("ipo_mean", {"beta": 0.2}, 2 * (0.35 - 2.5) / 5, -2 * (0.35 - 2.5) / 4),
    ("slic", {"beta": 0.4}, -0.4, 0.4),
    ("slic", {"beta": 0.7}, 0.0, 0.0),
]


@pytest.mark.parametrize("weight", [1.0, W])
@pytest.mark.parametrize(("base", "options", "grad_a", "grad_b"), GRADIENTS)
def test_closed_form_gradient(base, options, grad_a, grad_b, weight):
    name = base if weight == 1.0 else f"is_{base}"
    policy = torch.tensor([-12.0, -9.25], requires_grad=True)
    loss, _ = preference_loss(
        policy, torch.tensor([-12.5, -8.25]), objective=name, lengths=torch.tensor(LENGTHS), **options
    )
    loss.backward()
    expected = torch.tensor([weight * grad_a, weight * grad_b])
    torch.testing.assert_close(policy.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BASES)
def test_gradcheck(name):
    function = OBJECTIVES[name].function
    reference = Pair(*torch.tensor([[-3.0, -7.0, -2.5], [-4.0, -1.0, -6.0]], dtype=torch.float64))
    lengths = Pair(*torch.tensor([[3.0, 9.0, 2.0], [5.0, 1.0, 7.0]], dtype=torch.float64))
    # margins -0.3, 7.1 and 30.0: no hinge kink (10) within the finite difference
    chosen = (reference.chosen + torch.tensor([0.2, 3.1, 14.0])).requires_grad_()
    rejected = (reference.rejected + torch.tensor([0.5, -4.0, -16.0])).requires_grad_()

    def loss(chosen, rejected):
        return function(PairLogprob(Pair(chosen, rejected), reference, reference, lengths))

    assert torch.autograd.gradcheck(loss, (chosen, rejected))
    assert torch.autograd.gradgradcheck(loss, (chosen, rejected))


# The laws hold for any reference level: only log-ratios enter.
@pytest.mark.parametrize("name", BASES)
def test_shift_law(name):
    pair = make_pair([0.5, -2.0], [-1.0, 3.0])
    shifted = PairLogprob(*(Pair(p.chosen + 64.0, p.rejected - 32.0) for p in (pair.policy, pair.reference)))
    shifted = PairLogprob(shifted.policy, shifted.reference, shifted.reference, pair.lengths)
    function = OBJECTIVES[name].function
    torch.testing.assert_close(function(shifted), function(pair), rtol=1e-12, atol=0)


def test_dpo_of_the_swapped_pair_differs_by_the_scaled_margin():
    loss = OBJECTIVES["dpo"].function(make_pair([0.5, 40.0], [-1.0, 2.0]), beta=0.7)
    swapped = OBJECTIVES["dpo"].function(make_pair([-1.0, 2.0], [0.5, 40.0]), beta=0.7)
    torch.testing.assert_close(swapped - loss, 0.7 * torch.tensor([1.5, 38.0], dtype=torch.float64))


def test_label_smoothing_of_one_half_ignores_the_label():
    loss = OBJECTIVES["dpo"].function(make_pair([0.5], [-1.0]), label_smoothing=0.5)
    swapped = OBJECTIVES["dpo"].function(make_pair([-1.0], [0.5]), label_smoothing=0.5)
    torch.testing.assert_close(loss, swapped)


def test_ipo_mean_equals_ipo_at_length_one():
    pair = make_pair([0.5, -2.0], [-1.0, 3.0], lengths=(1.0, 1.0))
    torch.testing.assert_close(OBJECTIVES["ipo_mean"].function(pair), OBJECTIVES["ipo"].function(pair), rtol=0, atol=0)


@pytest.mark.parametrize("name", BASES)
def test_an_option_may_hold_one_value_a_pair(name):
    pair, function = make_pair([0.5, -2.0], [-1.0, 3.0]), OBJECTIVES[name].function
    together = function(pair, beta=torch.tensor([0.1, 0.7], dtype=torch.float64))
    apart = torch.stack([function(pair, beta=0.1)[0], function(pair, beta=0.7)[1]])
    torch.testing.assert_close(together, apart, rtol=1e-14, atol=0)


def test_own_objective_passes_through():
    own = Objective("square", lambda pair: pair.margin**2, frozenset({"reference"}), {})
    assert get_objective(own) is own
    loss, _ = preference_loss(torch.tensor([3.0, 1.0]), torch.zeros(2), objective=own)
    assert loss.item() == 4.0


def test_unknown_objective_lists_the_names():
    with pytest.raises(ValueError, match=r"objective: expected one of dpo, ipo, .*is_slic, got 'dop'"):
        get_objective("dop")
    with pytest.raises(ValueError, match="objective: expected one of"):
        get_objective(["dpo"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("is_dpo", {"gamma": 1.0}, "is_dpo: unknown option 'gamma', expected one of beta, label_smoothing"),
        ("ipo", {"label_smoothing": 0.1}, "ipo: unknown option 'label_smoothing', expected one of beta"),
        ("dpo", {"beta": 0.0}, "dpo: beta: expected a finite number above 0, got 0.0"),
        ("slic", {"beta": math.nan}, "slic: beta: expected a finite number above 0, got nan"),
        ("ipo", {"beta": "0.1"}, "ipo: beta: expected a finite number above 0, got '0.1'"),
        ("dpo", {"label_smoothing": 0.6}, r"dpo: label_smoothing: expected a number in \[0, 0.5\], got 0.6"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(2), torch.zeros(2), objective=name, **options)
