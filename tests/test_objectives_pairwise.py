"""Pairwise objectives: what their formulas promise, and AOT's matching by rank, on one process and on several. Letters: P pairs."""

import math

import pytest
import torch
from objective_cases import sample
from torch import Tensor

from isdaa_kernels.objectives import OBJECTIVES, Pair, PairLogprob
from isdaa_kernels.objectives.matching import QuantileMatch, same_rank
from isdaa_kernels.objectives.unpaired_state import RewardMean
from isdaa_kernels.preference_loss import preference_loss

inf, nan = math.inf, math.nan


def pairs_of(a, b, reference=(0.0, 0.0), present=None) -> PairLogprob:
    """Pairs with those log-ratios; `reference` holds log-probs of chosen and rejected."""
    a, b, chosen, rejected = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b, *reference))
    reference = Pair(chosen + torch.zeros_like(a), rejected + torch.zeros_like(b))
    policy = Pair(reference.chosen + a, reference.rejected + b)
    return PairLogprob(policy, reference, reference, present=present)


def losses(name: str, pair: PairLogprob, **options) -> Tensor:
    return OBJECTIVES[name].loss(pair, OBJECTIVES[name].resolve_options(options))


def gradients(name: str, a, b, **options) -> Tensor:
    """[2, P]: derivatives of the sum of the losses by a and b."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (a, b)]
    return torch.stack(torch.autograd.grad(losses(name, pairs_of(*leaves), **options).sum(), leaves))


# ---- What the formulas promise


def test_robust_dpo_undoes_the_flips_of_labels():
    a, b, e = torch.randn(50).double(), torch.randn(50).double(), 0.3
    right = losses("robust_dpo", pairs_of(a, b), beta=2.0, label_smoothing=e)
    flipped = losses("robust_dpo", pairs_of(b, a), beta=2.0, label_smoothing=e)
    torch.testing.assert_close((1 - e) * right + e * flipped, losses("dpo", pairs_of(a, b), beta=2.0))


def test_robust_dpo_without_smoothing_is_dpo():
    pair = pairs_of([0.5, -30.0], [-1.0, 2.0])
    assert torch.equal(losses("robust_dpo", pair, label_smoothing=0.0), losses("dpo", pair))


def test_exo_is_least_where_the_policy_is_the_smoothed_label():
    best = math.log(0.9 / 0.1) / 2
    loss = losses("exo", pairs_of([best, best + 0.5, best - 0.5], [0.0] * 3), beta=2.0, label_smoothing=0.1)
    assert loss[0].item() == pytest.approx(0, abs=1e-15)
    assert (loss[1:] > 0.01).all()
    assert gradients("exo", [best], [0.0], beta=2.0, label_smoothing=0.1).abs().max() < 1e-15


def test_exo_takes_one_smoothing_a_pair():
    smoothing = torch.tensor([0.001, 0.4], dtype=torch.float64)
    together = losses("exo", pairs_of([0.5, 0.5], [-1.0, -1.0]), label_smoothing=smoothing)
    apart = [losses("exo", pairs_of([0.5], [-1.0]), label_smoothing=e) for e in smoothing.tolist()]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-14, atol=0)


def test_nca_stops_at_two_thirds():
    (slope,), _ = gradients("nca", [math.log(2) / 0.01], [0.0])
    assert abs(slope) < 1e-15


def test_bco_of_a_pair_is_ddo_with_its_scale():
    pair = pairs_of([0.5, -30.0], [-1.0, 2.0])
    torch.testing.assert_close(losses("bco", pair, beta=1.0), losses("ddo", pair), rtol=1e-15, atol=0)


def test_ddo_is_least_at_the_distribution_of_the_data():
    """Over four outcomes: the minimum of the expected loss is policy = data, whatever the reference is."""
    data = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    logits = data.log().requires_grad_()
    ratio = logits.log_softmax(-1) - reference.log()
    # the loss is a sum of a term of chosen and one of rejected, of which the other is left out by its value at 0
    at_zero = math.log(2)
    expected = (data * (losses("ddo", pairs_of(ratio, torch.zeros(4))) - at_zero)).sum()
    expected = expected + (reference * (losses("ddo", pairs_of(torch.zeros(4), ratio)) - at_zero)).sum()
    (slope,) = torch.autograd.grad(expected, logits)
    assert slope.abs().max() < 1e-15


def test_sppo_hard_is_twice_the_form_of_its_authors():
    pair = pairs_of([0.5, -30.0], [-1.0, 2.0])
    torch.testing.assert_close(losses("sppo_hard", pair), 2 * losses("sppo", pair, preference=1.0))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_discopop_is_finite_far_out(temperature):
    margin = [-1e6, -1e4, -710.0, -30.0, 0.0, 30.0, 710.0, 1e4, 1e6]
    options = {"beta": 1.0, "mixing_temperature": temperature}
    assert losses("discopop", pairs_of(margin, [0.0] * 9), **options).isfinite().all()
    assert gradients("discopop", margin, [0.0] * 9, **options).isfinite().all()


def test_bco_with_the_running_mean_of_rewards():
    policy, state = torch.tensor([1.0, 3.0, -1.0, -2.0], dtype=torch.float64), RewardMean(0.5)
    found = preference_loss(policy, torch.zeros(4), objective="bco", beta=0.5, state=state).loss
    # rewards 0.5, 1.5, -0.5, -1 have the mean 1/8
    expected = preference_loss(policy, torch.zeros(4), objective="bco", beta=0.5, baseline=0.125).loss
    torch.testing.assert_close(found, expected)
    preference_loss(policy + 2, torch.zeros(4), objective="bco", beta=0.5, state=state)
    torch.testing.assert_close(state.mean, torch.tensor(1.25, dtype=torch.float64))


# ---- AOT: ranks within the batch


def random_pairs(P: int, seed: int = 0) -> PairLogprob:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(4, P, generator=generator, dtype=torch.float64)
    reference = Pair(values[2], values[3])
    return PairLogprob(Pair(values[0], values[1]), reference, reference)


@pytest.mark.parametrize("P", [1, 2, 17])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_loss_of_two_sorted_lists(name, P):
    pair = random_pairs(P)
    if name == "aot":
        left = (pair.policy.chosen - pair.policy.rejected).tolist()
        right = (pair.reference.chosen - pair.reference.rejected).tolist()
    else:
        left, right = (x.tolist() for x in pair.log_ratio)
    scaled = [0.3 * (x - y) for x, y in zip(sorted(left), sorted(right), strict=True)]
    expected = [0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z)) for z in scaled]
    found = losses(name, pair, beta=0.3, label_smoothing=0.1)
    assert sorted(found.tolist()) == pytest.approx(sorted(expected), rel=1e-12)
    # a pair carries the loss of its own value
    in_order = found[torch.tensor(left).argsort()]
    assert in_order.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_of_reordered_pairs_is_reordered(name):
    pair, order = random_pairs(9), torch.randperm(9)
    reordered = PairLogprob(*(Pair(*(x[order] for x in y)) for y in (pair.policy, pair.reference)))
    assert torch.equal(losses(name, reordered), losses(name, pair)[order])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_leaves_out_what_is_not_present(name):
    pair = random_pairs(7)
    present = torch.tensor([True, False, True, True, False, True, True])
    kept = PairLogprob(*(Pair(*(x[present] for x in y)) for y in (pair.policy, pair.reference)))
    leaves = [x.clone().requires_grad_() for x in pair.policy]
    found = losses(name, PairLogprob(Pair(*leaves), pair.reference, present=present))
    torch.testing.assert_close(found[present], losses(name, kept))
    for gradient in torch.autograd.grad(found[present].sum(), leaves):
        assert (gradient[~present] == 0).all()
        assert (gradient[present] != 0).all()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_of_no_pair_and_of_none_present(name):
    assert losses(name, random_pairs(0)).shape == (0,)
    loss, _ = preference_loss(torch.ones(4), torch.zeros(4), objective=name, lengths=torch.tensor([0, 0, 2, 2]))
    assert loss.item() == 0.0


def test_aot_is_dpo_where_ranks_agree():
    """Margins of the policy that rise with those of the reference."""
    chosen = torch.tensor([0.3, -2.0, 1.0, 7.0], dtype=torch.float64)
    pair = PairLogprob(Pair(2 * chosen + 1, torch.zeros_like(chosen)), Pair(chosen, torch.zeros_like(chosen)))
    torch.testing.assert_close(losses("aot", pair), losses("dpo", pair, beta=0.01), rtol=1e-14, atol=0)


def test_equal_margins_share_their_ranks_in_the_order_of_the_batch():
    value, other = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert same_rank(value, other, None).tolist() == [2.0, 1.0, 3.0, 4.0]


def test_a_nan_makes_no_nan_in_the_gradient_of_other_pairs():
    """A pair that is not a number comes last and takes no rank from another."""
    policy = torch.tensor([3.0, nan, 0.5, 0.0, 0.0, 0.0], requires_grad=True)
    loss, _ = preference_loss(policy, torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 0.0]), objective="aot")
    loss.backward()
    assert loss.isnan()
    assert policy.grad.isnan().tolist() == [False, True, False, False, True, False]


# ---- AOT: ranks over processes


def test_quantile_match_of_one_process_is_the_batch_alone():
    arguments = sample(OBJECTIVES["aot"], items=5)
    arguments["lengths"][3] = 0
    alone = preference_loss(**arguments, objective="aot", beta=0.5)
    for state in (QuantileMatch(), QuantileMatch(pairs_per_rank=5)):
        assert preference_loss(**arguments, objective="aot", beta=0.5, state=state).loss == alone.loss
    assert not QuantileMatch().state_dict()


# pairs of each rank, and their lengths; one value is met on both ranks, one pair is empty, one batch too
BATCHES = {
    "uneven": [
        {"policy": (3.0, -1.0, 0.5, 0.0, 0.0, 1.0), "lengths": (2, 2, 2, 2, 2, 2)},
        {"policy": (3.0, 9.0, 0.0, -9.0), "lengths": (2, 2, 2, 0)},
    ],
    "a rank without pairs": [{"policy": (1.0, -4.0, 2.0, 0.5), "lengths": (2, 2, 2, 2)}, {"policy": (), "lengths": ()}],
}


def tensors_of(policy, lengths) -> dict[str, Tensor]:
    policy = torch.tensor(policy, dtype=torch.float64)
    return {"policy": policy, "reference": policy.flip(0) / 3 + policy.cos(), "lengths": torch.tensor(lengths)}


def joined(batches) -> dict[str, Tensor]:
    """All chosen, then all rejected."""
    parts = [tensors_of(**batch) for batch in batches]
    return {name: torch.cat([part[name].view(2, -1) for part in parts], 1).view(-1) for name in parts[0]}


def train(arguments: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    policy = arguments.pop("policy").requires_grad_()
    loss, _ = preference_loss(policy, **arguments, objective="aot", beta=0.5, denominator=5, **options)
    return loss.detach(), torch.autograd.grad(loss, policy)[0].view(2, -1)


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, batches in BATCHES.items():
        for state in (QuantileMatch(), QuantileMatch(pairs_per_rank=4)):
            found[name, state.pairs_per_rank] = train(tensors_of(**batches[rank]), state=state)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_loss_and_the_gradient_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (name, pairs_per_rank), (loss, gradient) in ranks[0].items():
        other_loss, other_gradient = ranks[1][name, pairs_per_rank]
        expected_loss, expected_gradient = train(joined(BATCHES[name]))
        torch.testing.assert_close(loss + other_loss, expected_loss)
        torch.testing.assert_close(torch.cat([gradient, other_gradient], 1), expected_gradient)
    # and it is not what each rank would find alone
    alone, _ = train(tensors_of(**BATCHES["uneven"][0]))
    assert abs(alone - ranks[0]["uneven", None][0]) > 1e-3


# ---- Options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "robust_dpo",
            {"label_smoothing": 0.5},
            r"robust_dpo: label_smoothing: expected a number in \[0, 0.5\), got 0.5",
        ),
        ("exo", {"label_smoothing": 0.0}, r"exo: label_smoothing: expected a number in \(0, 0.5\], got 0.0"),
        ("bco", {"baseline": inf}, "bco: baseline: expected a finite number, got inf"),
        ("aot", {"partner": 1.0}, "aot: partner: expected a tensor, or None, got 1.0"),
        ("aot", {"partner": torch.zeros(3)}, r"partner: expected \[1\], one value a pair, got \[3\]"),
        ("aot", {"state": RewardMean(0.1)}, "state: expected a QuantileMatch for 'aot', got RewardMean"),
        ("aot_unpaired", {"state": QuantileMatch()}, "state: 'aot_unpaired' would ignore it; expected None"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(2), torch.zeros(2), objective=name, **options)


@pytest.mark.parametrize("value", [0, True, nan, "4"])
def test_quantile_match_refuses_a_bound_that_is_none(value):
    with pytest.raises(
        ValueError, match="QuantileMatch: pairs_per_rank: expected a whole number of at least 1, or None, got"
    ):
        QuantileMatch(pairs_per_rank=value)
