"""Objectives of other divergences: each against the derivative of the function that defines its divergence, and its limits."""

import math

import pytest
import torch
from torch import Tensor

from isdaa_kernels.objectives import OBJECTIVES, Pair, PairLogprob

A, B = torch.linspace(-3, 3, 7).double().repeat(7), torch.linspace(-3, 3, 7).double().repeat_interleave(7)


def losses(name: str, a: Tensor = A, b: Tensor = B, **options) -> Tensor:
    pair = PairLogprob(Pair(a, b), Pair(torch.zeros_like(a), torch.zeros_like(b)))
    return OBJECTIVES[name].loss(pair, OBJECTIVES[name].resolve_options(options))


def slope_of(divergence, log_ratio: Tensor) -> Tensor:
    """f'(t) at t = e^log_ratio, by autograd."""
    t = log_ratio.exp().requires_grad_()
    return torch.autograd.grad(divergence(t).sum(), t)[0]


def alpha_divergence(alpha: float):
    return lambda t: (t ** (1 - alpha) - (1 - alpha) * t - alpha) / (alpha * (alpha - 1))


# D(policy, reference) = mean over the reference of f(policy / reference)
DIVERGENCES = [
    ("dpo", {}, lambda t: t * t.log()),
    ("dpo_forward_kl", {}, lambda t: -t.log()),
    ("dpo_js", {}, lambda t: t * t.log() - (1 + t) * ((1 + t) / 2).log()),
    ("dpo_alpha", {}, alpha_divergence(0.5)),
    ("dpo_alpha", {"alpha": 0.2}, alpha_divergence(0.2)),
    ("dpo_alpha", {"alpha": -1.0}, lambda t: (t - 1).square() / 2),
    ("chi_po", {"clip_range": None}, lambda t: (t - 1).square() / 2 + t * t.log()),
]


@pytest.mark.parametrize(("name", "options", "divergence"), DIVERGENCES)
def test_the_margin_is_the_difference_of_the_slopes_of_the_divergence(name, options, divergence):
    scaled = 0.3 * (slope_of(divergence, A) - slope_of(divergence, B))
    torch.testing.assert_close(losses(name, beta=0.3, **options), torch.nn.functional.softplus(-scaled))


def test_alpha_one_is_the_forward_kl_and_alpha_near_zero_is_dpo():
    torch.testing.assert_close(losses("dpo_alpha", alpha=1.0), losses("dpo_forward_kl"), rtol=1e-13, atol=0)
    torch.testing.assert_close(losses("dpo_alpha", alpha=1e-9), losses("dpo"), rtol=1e-8, atol=0)
    torch.testing.assert_close(losses("dpo_alpha", alpha=-1e-9), losses("dpo"), rtol=1e-8, atol=0)


def test_alpha_is_one_minus_the_coefficient_of_trl():
    coefficient = 0.7
    scores = [((coefficient - 1) * x).exp() / (coefficient - 1) for x in (A, B)]
    expected = torch.nn.functional.softplus(-0.3 * (scores[0] - scores[1]))
    torch.testing.assert_close(losses("dpo_alpha", beta=0.3, alpha=1 - coefficient), expected)


def test_chi_po_without_its_exponential_is_dpo():
    """A small power makes the exponential constant."""
    torch.testing.assert_close(losses("chi_po", ratio_power=1e-12), losses("dpo"), rtol=1e-10, atol=0)


def test_chi_po_clips_and_stops_the_gradient_there():
    a = torch.tensor([3.0, 0.1, -3.0], dtype=torch.float64, requires_grad=True)
    loss = losses("chi_po", a, torch.zeros(3, dtype=torch.float64), beta=1.0, clip_range=1.0)
    expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(1))]
    assert loss[0::2].tolist() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), a)
    assert gradient[0::2].tolist() == [0, 0]
    assert gradient[1] < 0


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("dpo_alpha", "alpha", (0.5, -2.0)),
        ("chi_po", "clip_range", (0.1, 3.0)),
        ("chi_po", "ratio_power", (0.5, 2.0)),
        ("chi_po", "log_ratio_weight", (0.0, 0.1)),
    ],
)
def test_an_option_may_hold_one_value_a_pair(name, option, values):
    a, b = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([-1.0, -1.0], dtype=torch.float64)
    together = losses(name, a, b, **{option: torch.tensor(values, dtype=torch.float64)})
    apart = torch.cat([losses(name, a[:1], b[:1], **{option: value}) for value in values])
    torch.testing.assert_close(together, apart, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo_alpha", {"alpha": 0.0}, "dpo_alpha: alpha: expected a finite number other than 0, got 0.0"),
        ("chi_po", {"clip_range": 0.0}, "chi_po: clip_range: expected a finite number above 0, or None, got 0.0"),
        ("chi_po", {"ratio_power": -1.0}, "chi_po: ratio_power: expected a finite number above 0, got -1.0"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses(name, **options)
