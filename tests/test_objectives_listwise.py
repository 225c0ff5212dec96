"""Objectives of groups: ragged groups, order, ties, extremes, and the losses of two completions that they extend.

Letters: G groups, K completions, S sequences.
"""

import itertools
import math

import pytest
import torch
from objective_cases import sample
from torch import Tensor

from isdaa_kernels.objectives import OBJECTIVES, GroupLogprob
from isdaa_kernels.objectives.listwise import OBJECTIVES as LISTWISE
from isdaa_kernels.preference_loss import preference_loss

NAMES = [objective.name for objective in LISTWISE]
# a full group, one of three, one of two, and two that have nothing to compare
GROUPS = torch.tensor([[0, 1, 2, 3], [4, -1, 5, 6], [-1, 7, 8, -1], [-1, -1, -1, 9], [-1, -1, -1, -1]])


def run(name: str, arguments: dict, **options) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of the policy."""
    policy = arguments["policy"].clone().requires_grad_()
    loss, _ = preference_loss(
        policy, **{n: v for n, v in arguments.items() if n != "policy"}, objective=name, **options
    )
    return loss.detach(), torch.autograd.grad(loss, policy)[0]


def ragged(name: str, seed: int = 0) -> dict:
    arguments = sample(OBJECTIVES[name], items=3, seed=seed)
    arguments = {n: v[:10] for n, v in arguments.items() if n != "groups"}
    if "behaviour" in OBJECTIVES[name].needs:
        arguments["behaviour"] = arguments["reference"] + torch.linspace(-1, 1, 10, dtype=torch.float64)
    return arguments | {"groups": GROUPS}


def alone(log_ratio: list, rewards: list, present: list | None = None) -> GroupLogprob:
    """One group with no reference but 0."""
    ratio, rewards = (torch.tensor([x], dtype=torch.float64) for x in (log_ratio, rewards))
    present = torch.tensor([present or [True] * len(log_ratio)])
    zeros = torch.zeros_like(ratio)
    return GroupLogprob(ratio.requires_grad_(), zeros, zeros, torch.ones_like(ratio), rewards, present)


# ---- Ragged groups


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), ("adpo", {"adaptation": 0.9})])
def test_padded_groups_are_each_group_alone(name, options):
    arguments = ragged(name)
    loss, gradient = run(name, arguments, **options, denominator=1.0)
    expected_loss, expected_gradient = torch.zeros(()), torch.zeros(10, dtype=torch.float64)
    for rows in GROUPS[:3]:
        rows = rows[rows >= 0]
        own = {n: v[rows] for n, v in arguments.items() if n != "groups"} | {"groups": len(rows)}
        own_loss, own_gradient = run(name, own, **options)
        expected_loss += own_loss
        expected_gradient[rows] = own_gradient
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    assert gradient[9] == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_absent_completions_hold_is_not_read(name):
    """A place without a row, an empty completion, and a group of one."""
    arguments = ragged(name)
    arguments["lengths"][2] = 0
    expected = run(name, arguments)
    for value in (math.nan, math.inf, 1e4):
        marred = {n: v.clone() for n, v in arguments.items()}
        for field in {"policy", "reference", "behaviour", "rewards"} & marred.keys():
            marred[field][[2, 9]] = value
        loss, gradient = run(name, marred)
        torch.testing.assert_close((loss, gradient), expected, rtol=1e-13, atol=0)
        assert (gradient[[2, 9]] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_group_of_two_gives_the_loss_zero(name):
    loss, gradient = run(name, ragged(name) | {"groups": torch.tensor([[3, -1], [-1, -1]])})
    assert loss == 0
    assert (gradient == 0).all()
    assert run(name, ragged(name) | {"groups": torch.zeros(0, 3, dtype=torch.int64)})[0] == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rewards", [None, (1.0, 0.0, 1.0, 0.0, 2.0, 2.0, 2.0, 0.5, 0.5, 0.0)], ids=["own", "tied"])
def test_the_order_of_completions_does_not_matter(name, rewards):
    arguments = ragged(name, seed=4)
    if rewards is not None:
        arguments["rewards"] = torch.tensor(rewards)
    arguments["policy"][3] = arguments["policy"][0] + (arguments["reference"][3] - arguments["reference"][0])
    expected = run(name, arguments)
    for order in itertools.permutations(range(4)):
        found = run(name, arguments | {"groups": GROUPS[:, list(order)]})
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_options_may_hold_one_value_a_group(name):
    arguments, options = ragged(name), OBJECTIVES[name].defaults
    for option in options:
        values = torch.tensor([0.3, 0.7, 0.9, 0.5, 0.5])
        together, _ = run(name, arguments, **{option: values}, denominator=1.0)
        apart = [
            run(name, arguments | {"groups": GROUPS[i : i + 1]}, **{option: value.item()})[0]
            for i, value in enumerate(values)
        ]
        torch.testing.assert_close(together, torch.stack(apart).sum(), rtol=1e-6, atol=0)


# ---- Laws


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_of_a_group_changes_nothing(name):
    """Nor does the gradient of its completions have a sum."""
    arguments = ragged(name)
    loss, gradient = run(name, arguments)
    sums = torch.stack([gradient[rows[rows >= 0]].sum() for rows in GROUPS])
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-15)
    shift = torch.tensor([64.0] * 4 + [-8.0] * 3 + [0.5] * 3)
    moved = run(name, arguments | {"policy": arguments["policy"] + shift})
    torch.testing.assert_close(moved, (loss, gradient), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_constants(name):
    arguments = ragged(name)
    targets = [arguments[field].requires_grad_() for field in ("reference", "rewards")]
    arguments["policy"].requires_grad_()
    loss, _ = preference_loss(**arguments, objective=name)
    assert torch.autograd.grad(loss, targets, allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", ["plackett_luce", "lipo", "rank_dpo"])
def test_of_two_completions_it_is_dpo(name):
    """With the labels 1 and 0 a pair counts as 1 / log 2 - 1 / log 3 where ranks weigh it."""
    pairs = sample(OBJECTIVES["dpo"], items=4)
    rewards = torch.tensor([1.0, 0.0]).repeat_interleave(4)
    groups = torch.arange(8).view(2, 4).T
    found = run(name, pairs | {"rewards": rewards, "groups": groups}, beta=0.4)
    factor = 1 if name == "plackett_luce" else 1 / math.log(2) - 1 / math.log(3)
    loss, gradient = run("dpo", pairs, beta=0.4)
    torch.testing.assert_close(found, (factor * loss, factor * gradient), rtol=1e-6, atol=1e-12)


def test_of_two_completions_rewards_are_soft_labels():
    """dpo_rw is then the cross entropy of S(reward difference / temperature)."""
    pairs = sample(OBJECTIVES["dpo"], items=1)
    rewards = torch.tensor([0.3, -0.2])
    found = run("dpo_rw", pairs | {"rewards": rewards, "groups": 2}, beta=0.4, reward_temperature=0.25)
    expected = run("dno", pairs, beta=0.4, preference=1 / (1 + math.exp(-2.0)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_exo_of_hard_labels_is_the_pairwise_exo():
    pairs = sample(OBJECTIVES["exo"], items=1)
    rewards = torch.tensor([math.log(0.9), math.log(0.1)])
    found = run("exo_rw", pairs | {"rewards": rewards, "groups": 2}, beta=0.4, reward_temperature=1.0)
    torch.testing.assert_close(found, run("exo", pairs, beta=0.4, label_smoothing=0.1), rtol=1e-6, atol=1e-7)


def test_brain_without_its_own_behaviour_is_dpo_rw_less_the_entropy():
    arguments = ragged("brain")
    arguments = arguments | {"behaviour": arguments["reference"]}
    fewer = {name: value for name, value in arguments.items() if name != "behaviour"}
    loss, gradient = run("brain", arguments, reward_temperature=0.7)
    other_loss, other_gradient = run("dpo_rw", fewer, beta=1.0, reward_temperature=0.7)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-12, atol=1e-15)
    assert loss < other_loss


def test_adpo_of_standardised_rewards_is_dpo_rw():
    arguments = sample(OBJECTIVES["adpo"], items=5) | {"groups": 4}
    rewards = arguments["rewards"].view(5, 4)
    standardised = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).view(-1)
    found = run("adpo", arguments)
    expected = run("dpo_rw", arguments | {"rewards": standardised}, beta=1.25)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert all(map(torch.equal, run("adpo_on_policy", arguments), found))  # the reference stands for the behaviour


@pytest.mark.parametrize("name", ["exo_rw", "dpo_rw", "adpo", "brain"])
def test_the_optimum_is_the_target(name):
    """Where the softmax of the policy is the target, the gradient is 0 and a reverse or posterior divergence too."""
    rewards, function = [0.4, -1.0, 0.1], OBJECTIVES[name].function
    scale = {"exo_rw": 1, "dpo_rw": 1, "adpo": 1.6, "brain": 1}[name]  # 0.8 / 0.5 of rewards with the deviation 1
    if name == "adpo":
        rewards = [1.0, -1.0, 0.0]
    options = {} if name in ("adpo", "brain") else {"beta": 0.5, "reward_temperature": 0.5}
    ratio = [reward * (4 if options else scale) for reward in rewards]
    group = alone(ratio, rewards)
    loss = function(group, **options)
    assert torch.autograd.grad(loss.sum(), group.policy)[0].abs().max() < 1e-7
    if name in ("exo_rw", "brain"):
        assert loss.abs().item() < 1e-12


@pytest.mark.parametrize("name", ["plackett_luce", "lipo", "rank_dpo"])
def test_equal_rewards_say_nothing(name):
    group = alone([0.5, -3.0, 2.0], [1.0, 1.0, 1.0])
    loss = OBJECTIVES[name].function(group)
    assert loss.abs().item() < 1e-15
    assert (torch.autograd.grad(loss.sum(), group.policy)[0] == 0).all()


def test_lipo_ranks_by_the_policy_and_equal_ones_by_reward():
    rewards = [1.0, 0.0, 2.0]
    by_reward = OBJECTIVES["rank_dpo"].function
    assert OBJECTIVES["lipo"].function(alone([0.2, 0.2, 0.2], rewards)) == by_reward(alone([0.2, 0.2, 0.2], rewards))
    assert OBJECTIVES["lipo"].function(alone([0.2, 0.1, 0.3], rewards)) == by_reward(alone([0.2, 0.1, 0.3], rewards))
    assert OBJECTIVES["lipo"].function(alone([0.2, 0.1, 0.0], rewards)) != by_reward(alone([0.2, 0.1, 0.0], rewards))


def test_plackett_luce_is_the_probability_of_the_ranking():
    """Of all rankings of four the probabilities sum to 1."""
    ratio, function = [0.3, -1.2, 2.0, 0.7], OBJECTIVES["plackett_luce"].function
    losses = [
        function(alone(ratio, list(map(float, rewards))), beta=0.9) for rewards in itertools.permutations(range(4))
    ]
    assert (-torch.cat(losses)).exp().sum().item() == pytest.approx(1, rel=1e-12)


# ---- Extremes

FAR = (0.0, 1e4, -1e4, 700.0)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_ratios_and_rewards_leave_loss_and_gradient_finite(name):
    for rewards in itertools.product(FAR, repeat=3):
        for ratio in itertools.product(FAR[:3], repeat=3):
            group = alone([*ratio, 0.0], [*rewards, 0.0], [True, True, True, False])
            loss = OBJECTIVES[name].function(group)
            gradient = torch.autograd.grad(loss.sum(), group.policy)[0]
            assert loss.float().isfinite().all(), (rewards, ratio)
            assert gradient.isfinite().all(), (rewards, ratio)
            assert gradient[0, 3] == 0


def test_rewards_that_differ_by_rounding_alone_do_not_make_a_target():
    rewards = torch.full((4,), 0.1, dtype=torch.float64) * 3 + torch.tensor([0, 1, 0, 0]) * 1e-16
    group = alone([0.0, 0.0, 0.0, 0.0], rewards.tolist())
    loss = OBJECTIVES["adpo"].function(group)
    assert torch.autograd.grad(loss.sum(), group.policy)[0].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "exo_rw",
            {"reward_temperature": 0.0},
            "exo_rw: reward_temperature: expected a finite number above 0, got 0.0",
        ),
        ("adpo", {"beta": -1.0}, "adpo: beta: expected a finite number above 0, got -1.0"),
        ("adpo", {"adaptation": 1.5}, r"adpo: adaptation: expected a number in \[0, 1\], got 1.5"),
        ("lipo", {"beta": torch.ones(2)}, r"beta: expected \[6\], one value a group, got \[2\]"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(**sample(OBJECTIVES[name]), objective=name, **options)
