"""The importance weight: each option's value, by hand. Letters: P pairs; a', b' log-ratios to the behaviour policy."""

import math

import pytest
import torch

from isdaa_kernels.objectives import ImportanceWeight, Pair, PairLogprob

E = math.e


def weigh(weight: ImportanceWeight, a, b, lengths=None, nonempty=None):
    """`weight.weigh` of the pairs with log-ratios a', b'; the policy's log-probs are leaves that require a gradient."""
    a, b = (torch.tensor(value, dtype=torch.float64) for value in (a, b))
    behaviour = Pair(torch.full_like(a, -4.0), torch.full_like(b, -8.0))
    policy = Pair(*(x.requires_grad_() for x in (behaviour.chosen + a, behaviour.rejected + b)))
    lengths = lengths and Pair(*(torch.tensor(n, dtype=torch.float64) for n in lengths))
    nonempty_P = torch.ones(len(a), dtype=torch.bool) if nonempty is None else torch.tensor(nonempty)
    return weight.weigh(PairLogprob(policy, behaviour, behaviour, lengths), nonempty_P), policy


# a' + b' = -2, 1.5, 2 (the cap), 5: below, inside, on and over the clip of 2 epsilon = 2
A, B = [-3.0, 2.5, 1.0, 4.0], [1.0, -1.0, 1.0, 1.0]

VALUES = [
    ({}, [E**-2, E**1.5, E**2, E**2], [0, 0, 1, 1]),
    ({"epsilon": 0.0}, [E**-2, 1, 1, 1], [0, 1, 1, 1]),
    ({"epsilon": 0.25}, [E**-2, E**0.5, E**0.5, E**0.5], [0, 1, 1, 1]),
    # min(-3, 1) + min(1, 1), min(2.5, 1) + min(-1, 1), 1 + 1, min(4, 1) + 1
    ({"mode": "per_completion"}, [E**-2, E**0, E**2, E**2], [1, 1, 1, 1]),
    ({"mode": "per_completion", "epsilon": 2.0}, [E**-2, E**1, E**2, E**3], [0, 1, 0, 1]),
    ({"mode": "none"}, [E**-2, E**1.5, E**2, E**5], [0, 0, 0, 0]),
    ({"floor": 0.5}, [0.5, E**1.5, E**2, E**2], [0, 0, 1, 1]),
    # The power acts before the clip: 0.5 * 5 is still over the cap of 2, 0.5 * 2 is not.
    ({"power": 0.5}, [E**-1, E**0.75, E**1, E**2], [0, 0, 0, 1]),
]


@pytest.mark.parametrize(("options", "expected", "clipped"), VALUES, ids=lambda value: str(value))
def test_option_values(options, expected, clipped):
    result, _ = weigh(ImportanceWeight(**options), A, B)
    torch.testing.assert_close(result.weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert result.clipped.tolist() == [bool(flag) for flag in clipped]
    assert not result.weight.requires_grad


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, -3 / 4 + 1 / 2), (0.5, -3 / 2 + 1 / math.sqrt(2))])
def test_length_exponent(exponent, expected):
    weight = ImportanceWeight(length_exponent=exponent)
    assert weight.needs == {"behaviour", "lengths"}
    result, _ = weigh(weight, [-3.0], [1.0], lengths=([4.0], [2.0]))
    assert result.weight.item() == pytest.approx(math.exp(expected), rel=1e-12)
    assert result.log_ratio.item() == pytest.approx(expected, rel=1e-12)
    assert ImportanceWeight().needs == {"behaviour"}


def test_normalize_divides_by_the_mean():
    result, _ = weigh(ImportanceWeight(normalize=True, mode="none"), [0.0, math.log(2.0)], [0.0, math.log(1.5)])
    torch.testing.assert_close(result.weight, torch.tensor([0.5, 1.5], dtype=torch.float64))


def test_normalize_leaves_out_empty_pairs_and_non_finite_weights():
    a, b = [0.0, math.log(3.0), 1.0, math.nan], [0.0] * 4
    result, _ = weigh(ImportanceWeight(normalize=True), a, b, nonempty=[True, True, False, True])
    torch.testing.assert_close(result.weight[:2], torch.tensor([0.5, 1.5], dtype=torch.float64))
    assert result.weight[3].isnan()


def test_normalize_survives_weights_that_all_underflow():
    result, _ = weigh(ImportanceWeight(normalize=True), [-2000.0, -2000.0 + math.log(3.0)], [0.0, 0.0])
    torch.testing.assert_close(result.weight, torch.tensor([0.5, 1.5], dtype=torch.float64), rtol=1e-9, atol=0)


EVERY_KIND = [
    {},
    {"mode": "per_completion"},
    {"mode": "none"},
    {"floor": 1.0},
    {"power": 0.3},
    {"length_exponent": 1.0},
    {"normalize": True},
    {"epsilon": 0.0},
]


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_every_setting_is_exactly_one_where_policy_and_behaviour_agree(options):
    result, _ = weigh(ImportanceWeight(**options), [0.0] * 7, [0.0] * 7, lengths=([3.0] * 7, [4.0] * 7))
    assert result.weight.tolist() == [1.0] * 7


def test_one_exponential_of_the_sum_where_each_alone_overflows():
    result, _ = weigh(ImportanceWeight(), [1e4, -1e4, 5000.0], [-1e4, 1e4, -1e4])
    assert result.weight.tolist() == [1.0, 1.0, 0.0]


def test_a_nan_stays_in_its_pair():
    result, _ = weigh(ImportanceWeight(floor=0.5), [math.nan, 0.0], [0.0, 0.0])
    assert result.weight.isnan().tolist() == [True, False]


def test_detach_false_differentiates_the_weight_where_the_clip_does_not_bite():
    result, policy = weigh(ImportanceWeight(detach=False), [-3.0, 4.0], [1.0, 1.0])
    result.weight.sum().backward()
    expected = torch.tensor([E**-2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(policy.chosen.grad, expected)
    torch.testing.assert_close(policy.rejected.grad, expected)


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_gradcheck_of_the_undetached_weight(options):
    weight = ImportanceWeight(**{"epsilon": 0.7, **options, "detach": False})
    behaviour = Pair(*torch.tensor([[-3.0, -7.0, -2.5], [-4.0, -1.0, -6.0]], dtype=torch.float64))
    lengths = Pair(*torch.tensor([[3.0, 9.0, 2.0], [5.0, 1.0, 7.0]], dtype=torch.float64))
    leaves = [
        (x + d).requires_grad_() for x, d in zip(behaviour, torch.tensor([[0.2, -1, 3], [0.3, 0.1, 0.9]]), strict=True)
    ]

    def weights(chosen, rejected):
        pair = PairLogprob(Pair(chosen, rejected), behaviour, behaviour, lengths)
        return weight.weigh(pair, torch.ones(3, dtype=torch.bool)).weight

    assert torch.autograd.gradcheck(weights, leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, "epsilon: expected a finite number of at least 0, got -0.1"),
        ({"epsilon": math.inf}, "epsilon: expected a finite number"),
        ({"epsilon": math.nan}, "epsilon: expected a finite number"),
        ({"epsilon": None}, "epsilon: expected a finite number"),
        ({"epsilon": True}, "epsilon: expected a finite number"),
        ({"mode": "both"}, "mode: expected one of joint, per_completion, none, got 'both'"),
        ({"floor": 0.0}, r"floor: expected a number in \(0, 1\], got 0.0"),
        ({"floor": 2.0}, r"floor: expected a number in \(0, 1\], got 2.0"),
        ({"power": 0.0}, "power: expected a finite number above 0, got 0.0"),
        ({"length_exponent": 1.5}, r"length_exponent: expected a number in \[0, 1\], got 1.5"),
        ({"normalize": 1}, "normalize: expected True or False, got 1"),
        ({"detach": "no"}, "detach: expected True or False, got 'no'"),
    ],
)
def test_bad_setting(options, message):
    with pytest.raises(ValueError, match=f"ImportanceWeight: {message}"):
        ImportanceWeight(**options)
