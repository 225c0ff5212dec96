"""Losses of preference games: the pairwise losses that they fall back to, their optima, and what Nash-MP adds to Nash-MD.

Letters: H policies, S completions.
"""

import pytest
import torch
from objective_cases import sample
from torch import Tensor

from isdaa_kernels.objectives import OBJECTIVES, CompletionLogprob, Pair, PairLogprob
from isdaa_kernels.preference_loss import preference_loss


def run(name: str, arguments: dict, **options) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of the policy."""
    policy = arguments["policy"].clone().requires_grad_()
    loss, _ = preference_loss(
        policy, **{n: v for n, v in arguments.items() if n != "policy"}, objective=name, **options
    )
    return loss.detach(), torch.autograd.grad(loss, policy)[0]


def with_opponents(*opponents: Tensor) -> dict:
    return sample(OBJECTIVES["ipo"]) | {"opponents": torch.stack(opponents)}


PAIRS = sample(OBJECTIVES["ipo"])
FALLS_BACK = [
    ("dno", {"beta": 0.3, "preference": 0.8}, "dpo", {"beta": 0.3, "label_smoothing": 0.2}, 1),
    ("dno", {}, "dpo", {}, 1),
    ("sppo", {}, "sppo_hard", {"beta": 1e-3}, 2),
    ("sppo", {"preference": 0.8, "rejected_preference": 0.2}, "sppo_single", {"preference": 0.8}, 1),
    ("egpo", {"beta": 0.2}, "ipo_mean", {"beta": 0.2}, 1),
    ("xpo", {"beta": 0.2, "exploration_weight": 0.0}, "dpo", {"beta": 0.2}, 1),
]


@pytest.mark.parametrize(("name", "options", "other", "other_options", "factor"), FALLS_BACK)
def test_falls_back_to_a_pairwise_loss(name, options, other, other_options, factor):
    found, expected = run(name, PAIRS, **options), run(other, PAIRS, **other_options)
    torch.testing.assert_close(found[0] * factor, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1] * factor, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["inpo", "mnpo"])
def test_opponents_equal_to_the_reference_are_one_anchor(name):
    other = {"inpo": "ipo", "mnpo": "ipo_mean"}[name]
    anchored = with_opponents(PAIRS["reference"], PAIRS["reference"])
    for share in (0.0, 0.3, 1.0):
        found = run(name, anchored, beta=0.2, reference_share=share)
        torch.testing.assert_close(found, run(other, PAIRS, beta=0.2), rtol=1e-6, atol=1e-12)


def test_mnpo_with_one_opponent_is_inpo_per_token():
    arguments = with_opponents(PAIRS["reference"] - 1.5) | {"lengths": torch.ones(12)}
    found, expected = run("mnpo", arguments, opponent_weights=(2.0,)), run("inpo", arguments)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_mnpo_opponents_of_weight_zero_do_not_enter():
    two = with_opponents(PAIRS["reference"] - 1.5, PAIRS["reference"].flip(0))
    alone = run("mnpo", with_opponents(PAIRS["reference"] - 1.5))
    assert all(map(torch.equal, run("mnpo", two, opponent_weights=[3.0, 0.0]), alone))
    assert not torch.equal(run("mnpo", two)[0], alone[0])


def test_the_optimum_of_a_square_loss_is_the_target():
    """The margin at which the gradient vanishes, with one value of the option a pair."""
    target = torch.tensor([0.4, -0.7, 0.0], dtype=torch.float64)
    zeros, lengths = torch.zeros_like(target), torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    pair = PairLogprob(Pair(lengths * target / 0.25, zeros), Pair(zeros, zeros), lengths=Pair(lengths, lengths))
    assert (OBJECTIVES["egpo"].function(pair, beta=0.25, preference_difference=target) < 1e-24).all()
    chances = {"preference": 0.5 + target / 2, "rejected_preference": 0.5 - target}
    pair = PairLogprob(Pair(2 * target, -4 * target), Pair(zeros, zeros))
    assert (OBJECTIVES["sppo"].function(pair, beta=0.25, **chances) < 1e-24).all()


def test_xpo_pushes_the_completion_of_the_reference_down():
    _, gradient = run("xpo", PAIRS, exploration_weight=0.5, reference_chosen=torch.tensor([1.0, 0, 0, 1, 0, 1]))
    _, without = run("xpo", PAIRS, exploration_weight=0.0)
    expected = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.float64) * 0.5 / 6
    torch.testing.assert_close(gradient - without, expected, rtol=1e-12, atol=1e-15)


def test_nash_mp_is_nash_md_with_two_anchors_in_one():
    """beta KL(policy || reference) + beta / eta KL(policy || pi_t), token by token, has the gradient of one scaled divergence."""
    generator = torch.Generator().manual_seed(0)
    policy, reference, pi_t = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64) - 2
    beta, eta, preference = 0.2, 0.6, torch.tensor([0.1, 0.9, 0.5, 1.0], dtype=torch.float64)

    def surrogate(anchor: Tensor, policy: Tensor) -> Tensor:
        return ((policy - anchor).detach() * policy).sum(1)

    def gradient(loss_of) -> Tensor:
        leaf = policy.clone().requires_grad_()
        return torch.autograd.grad(loss_of(leaf).sum(), leaf)[0]

    def one_anchor(leaf: Tensor) -> Tensor:
        anchor = (eta * reference + pi_t) / (eta + 1)
        batch = CompletionLogprob(leaf.sum(1), kl_score=surrogate(anchor, leaf))
        return OBJECTIVES["nash_md"].function(batch, beta=beta * (1 + 1 / eta), preference=preference)

    def two_anchors(leaf: Tensor) -> Tensor:
        reward = (0.5 - preference) * leaf.sum(1)
        return reward + beta * surrogate(reference, leaf) + beta / eta * surrogate(pi_t, leaf)

    torch.testing.assert_close(gradient(one_anchor), gradient(two_anchors), rtol=1e-12, atol=1e-12)


def test_nash_md_passes_the_gradient_of_the_divergence_on():
    kl_score = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, dtype=torch.float64)
    loss, _ = preference_loss(zeros, zeros, objective="nash_md", beta=0.3, kl_score=kl_score)
    assert torch.autograd.grad(loss, kl_score)[0].tolist() == [0.15, 0.15]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dno", {"preference": 1.5}, r"dno: preference: expected a number in \[0, 1\], got 1.5"),
        ("sppo", {"rejected_preference": -0.1}, r"sppo: rejected_preference: expected a number in \[0, 1\], got -0.1"),
        ("egpo", {"preference_difference": 1.1}, r"egpo: preference_difference: expected a number in \[-1, 1\], got"),
        ("xpo", {"exploration_weight": -1e-5}, "xpo: exploration_weight: expected a finite number of at least 0"),
        ("inpo", {"reference_share": 2.0}, r"inpo: reference_share: expected a number in \[0, 1\], got 2.0"),
        ("mnpo", {"opponent_weights": (1.0,)}, r"opponent_weights: expected 2 numbers, one an opponent, got \(1.0,\)"),
        (
            "mnpo",
            {"opponent_weights": (0.0, 0)},
            "mnpo: opponent_weights: expected a tuple of numbers of at least 0, not",
        ),
        ("mnpo", {"opponent_weights": (1.0, -1)}, "mnpo: opponent_weights: expected a tuple of numbers of at least 0"),
        ("mnpo", {"opponent_weights": 1.0}, "mnpo: opponent_weights: expected a tuple of numbers of at least 0"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(**sample(OBJECTIVES[name]), objective=name, **options)
