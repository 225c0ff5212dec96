"""`group_advantages` and `rto_rewards` by hand, and what they refuse. Letters: S completions, G groups."""

import math

import pytest
import torch

from isdaa_kernels import group_advantages, rto_rewards

# groups of three: mean 2, standard deviation 1; and mean 1, standard deviation sqrt(3)
REWARDS = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 3.0])
ROOT = math.sqrt(3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [-1, 0, 1, -1 / ROOT, -1 / ROOT, 2 / ROOT]),
        ({"scale": "none"}, [-1, 0, 1, -1, -1, 2]),
        ({"scale": "none", "baseline": "leave_one_out"}, [-1.5, 0, 1.5, -1.5, -1.5, 3]),
        # of all six: mean 1.5, squares 0.25 + 0.25 + 2.25 + 2.25 + 2.25 + 2.25 = 9.5
        ({"scale": "batch"}, [x / math.sqrt(9.5 / 5) for x in (-1, 0, 1, -1, -1, 2)]),
        ({"scale": "none", "baseline": "none"}, [1, 2, 3, 0, 0, 3]),
        ({"baseline": "none"}, [1, 2, 3, 0, 0, 3 / ROOT]),
    ],
)
def test_by_hand(settings, expected):
    found = group_advantages(REWARDS, 3, epsilon=0.0, **settings)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_docstrings_lines():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    grouped = rewards.double().view(-1, 4)
    expected = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4), expected.view(-1))


def test_groups_by_rows_of_different_sizes():
    rows = torch.tensor([[5, 0, 2], [3, 1, -1]])
    found = group_advantages(torch.tensor([1.0, 4.0, 2.0, 2.0, 9.0, 3.0]), rows, scale="none")
    # the fifth completion is in no group
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, -1.0, 0.0, 1.0], dtype=torch.float64))


def test_a_completion_in_several_groups_has_the_advantage_of_the_last():
    rows = torch.tensor([[0, 1], [2, 1], [-1, 0]], dtype=torch.int32)
    found = group_advantages(torch.tensor([1.0, 4.0, 2.0, 7.0]), rows, scale="none")
    assert found.tolist() == [0, 1, -1, 0]
    assert group_advantages(torch.ones(3), torch.zeros(2, 0, dtype=torch.int64)).tolist() == [0, 0, 0]
    assert group_advantages(torch.zeros(0), torch.full((2, 2), -1)).shape == (0,)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_groups_of_one_have_nothing_to_compare(scale, baseline):
    assert (group_advantages(REWARDS, 1, scale=scale, baseline=baseline) == 0).all()
    rows = torch.tensor([[0, -1], [1, 2]])
    found = group_advantages(REWARDS, rows, scale="none", baseline=baseline)
    assert found[0] == 0
    assert found[1] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_zero(dtype, baseline):
    """Exactly, though 0.1 + 0.1 + 0.1 is more than 0.3 in fp64; and without an epsilon, too."""
    for scale in ("group", "batch", "none"):
        for size in (2, 3, 7):
            for epsilon in (1e-4, 0.0):
                rewards = torch.full((2 * size,), 0.1, dtype=dtype)
                assert (group_advantages(rewards, size, scale=scale, baseline=baseline, epsilon=epsilon) == 0).all()


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_no_deviation_and_no_epsilon_divide_by_nothing(scale):
    rewards = torch.tensor([2.0, 2.0, math.nan])
    assert group_advantages(rewards, 1, scale=scale, epsilon=0.0).tolist() == [0, 0, 0]
    assert group_advantages(rewards, 1, scale=scale, baseline="none", epsilon=0.0).tolist() == [2, 2, 0]
    found = group_advantages(torch.full((3,), 0.1).double(), 3, scale=scale, baseline="none", epsilon=0.0)
    torch.testing.assert_close(found, torch.full((3,), 0.1).double())


def test_differences_of_large_rewards():
    rewards = 1e9 + torch.tensor([0.25, 0.5, 0.75]).double()
    assert group_advantages(rewards, 3, epsilon=0.0).tolist() == [-1, 0, 1]


def test_a_reward_that_is_missing_is_left_out():
    found = group_advantages(torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan, 2.0]), 3, scale="none")
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))


def test_no_completions():
    assert group_advantages(torch.zeros(0), 3).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 4}, "groups: expected rows .*, or the size of equal groups that make up 6 completions, got 4"),
        ({"groups": 0}, "groups: expected rows"),
        ({"groups": torch.tensor([0, 1])}, r"groups: expected int32 or int64 \[G, K\]"),
        ({"groups": torch.tensor([[0, 6]])}, r"groups: expected rows in -1..5, got \[\[0, 6\]\]"),
        ({"scale": "std"}, "scale: expected one of group, batch, none, got 'std'"),
        ({"baseline": "max"}, "baseline: expected one of mean, leave_one_out, none, got 'max'"),
        ({"rewards": torch.zeros(2, 3)}, r"rewards: expected a floating tensor \[S\]"),
        ({"rewards": torch.zeros(6, dtype=torch.int64)}, r"rewards: expected a floating tensor \[S\], got torch.int64"),
        ({"rewards": [1.0]}, r"rewards: expected a floating tensor \[S\], got \[1.0\]"),
        ({"epsilon": -1.0}, "epsilon: expected a finite number of at least 0, got -1.0"),
        ({"epsilon": math.nan}, "epsilon: expected a finite number of at least 0, got nan"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(**{"rewards": REWARDS, "groups": 3, **arguments})


def test_rewards_of_tokens_by_hand():
    """Log-ratios of the reward policy 0.4, 2 (clipped), -3 (clipped), 1 and of the policy 0.1, 0.2, 0.3, -0.5; an empty completion."""
    reference = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64)
    reward = reference + torch.tensor([0.4, 2.0, -3.0, 1.0, math.nan])
    policy = reference + torch.tensor([0.1, 0.2, 0.3, -0.5, math.nan])
    mask = torch.tensor([True, True, True, True, False])
    found = rto_rewards(
        reward, reference, policy, torch.tensor([0, 2, 2, 5]), torch.tensor([10.0, 20.0, 30.0]), mask=mask
    )
    expected = [0.02 - 0.001, 0.05 - 0.002 + 10, -0.05 - 0.003, 0.05 + 0.005 + 30, 0.0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    whole = rto_rewards(
        reward[:4], reference[:4], policy[:4], torch.tensor([0, 4]), torch.tensor([1.0]), token_weight=0.1, clip=1.0,
        kl_weight=0.0,
    )  # fmt: skip
    torch.testing.assert_close(whole, torch.tensor([0.04, 0.2, -0.3, 1.1], dtype=torch.float64))


def test_rewards_of_tokens_refuse_other_lengths():
    five = torch.zeros(5)
    with pytest.raises(ValueError, match=r"policy_logprob: expected \[5\], got torch.float32 \[4\]"):
        rto_rewards(five, five, torch.zeros(4), torch.tensor([0, 5]), torch.zeros(1))
    with pytest.raises(ValueError, match=r"rewards: expected \[1\], got \[2\]"):
        rto_rewards(five, five, five, torch.tensor([0, 5]), torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_logprob": torch.zeros(1, 5)}, r"reward_logprob: expected \[N\], got \[1, 5\]"),
        ({"mask": torch.ones(5)}, r"mask: expected bool \[5\], got torch.float32 \[5\]"),
        (
            {"cu_seqlens": torch.tensor([0.0, 5.0])},
            r"cu_seqlens: expected int32 or int64 \[S \+ 1\], got torch.float32",
        ),
        ({"cu_seqlens": torch.tensor([0, 9])}, r"cu_seqlens: expected non-decreasing values from 0 to 5, got \[0, 9\]"),
        ({"clip": -0.1}, "clip: expected a finite number of at least 0, got -0.1"),
        ({"kl_weight": math.inf}, "kl_weight: expected a finite number of at least 0, got inf"),
    ],
)
def test_bad_input_of_the_rewards_of_tokens(arguments, message):
    five = torch.zeros(5)
    given = {"reward_logprob": five, "reference_logprob": five, "policy_logprob": five, "rewards": torch.zeros(1)}
    given |= {"cu_seqlens": torch.tensor([0, 5])} | arguments
    with pytest.raises(ValueError, match=message):
        rto_rewards(**given)
