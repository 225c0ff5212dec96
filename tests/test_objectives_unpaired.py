"""Objectives of single completions and their states: KTO's divergence, BCO's baseline, what the ranks share.

Letters: S completions, P pairs.
"""

import math

import pytest
import torch
from objective_cases import sample
from torch import Tensor

from isdaa_kernels.objectives import OBJECTIVES, CompletionLogprob, Pair, PairLogprob
from isdaa_kernels.objectives.unpaired_state import MismatchedMean, RewardMean
from isdaa_kernels.preference_loss import preference_loss


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(name: str, arguments: dict, **options) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of the policy."""
    policy = arguments["policy"].clone().requires_grad_()
    loss, _ = preference_loss(
        policy, **{n: v for n, v in arguments.items() if n != "policy"}, objective=name, **options
    )
    return loss.detach(), torch.autograd.grad(loss, policy)[0]


COMPLETIONS = sample(OBJECTIVES["kto"], items=6)


# ---- Losses


def test_kto_without_divergence_is_apo_zero():
    fewer = {name: value for name, value in COMPLETIONS.items() if name != "mismatched"}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.4, "beta": 0.7}
    found = run("kto", COMPLETIONS, kl=0.0, **weights)
    assert all(map(torch.equal, found, run("apo_zero_unpaired", fewer, **weights)))


@pytest.mark.parametrize(("unpaired", "paired"), [("apo_zero_unpaired", "apo_zero"), ("bco_unpaired", "bco")])
def test_the_unpaired_losses_of_a_pair_are_the_paired_one(unpaired, paired):
    pairs = sample(OBJECTIVES[paired], items=3)
    completions = pairs | {"desirable": torch.arange(6) < 3}
    found, expected = run(unpaired, completions, beta=0.3, denominator=3), run(paired, pairs, beta=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_kto_estimates_the_divergence_from_what_is_there():
    mean = COMPLETIONS["mismatched"].mean().item()
    assert mean > 0
    found, expected = run("kto", COMPLETIONS), run("kto", COMPLETIONS, kl=mean)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-15)
    lengths = COMPLETIONS["lengths"] * (torch.arange(6) != 2)
    marred = COMPLETIONS | {
        "lengths": lengths,
        "mismatched": COMPLETIONS["mismatched"].index_fill(0, torch.tensor(2), math.nan),
    }
    mean = COMPLETIONS["mismatched"][lengths > 0].mean().item()
    found, expected = run("kto", marred), run("kto", COMPLETIONS | {"lengths": lengths}, kl=mean)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-15)


def test_nothing_present_gives_the_loss_zero():
    for name in ("kto", "apo_zero_unpaired", "bco_unpaired", "kto_pair"):
        arguments = sample(OBJECTIVES[name], items=2)
        arguments["lengths"] = torch.zeros_like(arguments["lengths"])
        loss, gradient = run(name, arguments)
        assert loss == 0
        assert (gradient == 0).all()


def test_weights_are_those_of_a_label():
    desirable = COMPLETIONS["desirable"]
    for name in ("kto", "apo_zero_unpaired"):
        arguments = {n: v for n, v in COMPLETIONS.items() if n != "mismatched" or name == "kto"}
        _, plain = run(name, arguments)
        _, weighted = run(name, arguments, desirable_weight=3.0, undesirable_weight=0.5)
        torch.testing.assert_close(weighted, plain * torch.where(desirable, 3.0, 0.5), rtol=1e-12, atol=0)


def test_kto_pair_differentiates_its_divergence():
    """Against differences of the loss, either side of where a mean is 0."""
    for a, b in (((0.5, 1.5), (0.4, 0.2)), ((-0.5, -1.5), (-0.4, -0.2)), ((0.5, 1.5), (-0.4, 0.2))):
        policy = double(*a, *b)
        arguments = {"policy": policy, "reference": torch.zeros_like(policy)}
        _, gradient = run("kto_pair", arguments, beta=0.8)

        def loss(policy: Tensor) -> Tensor:
            pair = PairLogprob(Pair(*policy.view(2, 2)), present=torch.tensor([True, True]))
            return OBJECTIVES["kto_pair"].function(pair, beta=0.8).mean()

        steps = 1e-6 * torch.eye(4, dtype=torch.float64)
        differences = torch.stack([(loss(policy + step) - loss(policy - step)) / 2e-6 for step in steps])
        torch.testing.assert_close(gradient, differences, rtol=1e-7, atol=1e-9)


def test_kto_pair_leaves_an_empty_pair_out_of_both_means():
    arguments = sample(OBJECTIVES["kto_pair"], items=3) | {"lengths": torch.tensor([5, 4, 3, 2, 0, 6])}
    arguments["policy"] = arguments["policy"].index_fill(0, torch.tensor(4), math.nan)
    kept = {name: value[[0, 2, 3, 5]] for name, value in arguments.items()}
    loss, gradient = run("kto_pair", arguments, denominator=2)
    expected_loss, expected_gradient = run("kto_pair", kept)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient[[0, 2, 3, 5]], expected_gradient)
    assert (gradient[[1, 4]] == 0).all()


# ---- States


def batch(*log_ratio: float, present: tuple | None = None) -> CompletionLogprob:
    ratio = double(*log_ratio)
    present = None if present is None else torch.tensor(present)
    return CompletionLogprob(ratio - 3, torch.full_like(ratio, -3.0), mismatched=ratio, present=present)


def test_the_reward_mean_is_that_of_all_completions_so_far():
    state = RewardMean(0.1)
    assert state(batch(1.0, 3.0))["baseline"].item() == pytest.approx(0.2)
    assert state(batch(5.0, 0.0, 1.0, 2.0))["baseline"].item() == pytest.approx(0.2)
    assert state(batch(-11.0, 20.0, present=(True, False)))["baseline"].item() == pytest.approx(0.1 / 7)
    assert state.count == 7


def test_the_reward_mean_takes_both_completions_of_a_pair():
    zeros = torch.zeros(3, dtype=torch.float64)
    chosen, rejected, present = double(1.0, 2.0, 50.0), double(-1.0, 4.0, 50.0), torch.tensor([True, True, False])
    state = RewardMean(2.0)
    pair = PairLogprob(Pair(chosen, rejected), Pair(zeros, zeros), present=present)
    assert state(pair)["baseline"].item() == pytest.approx(2 * 6 / 4)
    assert state.count == 4


def test_the_reward_mean_of_equal_batches_is_the_mean_of_their_means():
    """TRL and LLaMA-Factory count every batch once."""
    state, means = RewardMean(1.0), []
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        ratios = torch.randn(8, generator=generator, dtype=torch.float64)
        means.append(ratios.mean())
        baseline = state(batch(*ratios.tolist()))["baseline"]
        torch.testing.assert_close(baseline, torch.stack(means).mean(), rtol=1e-12, atol=1e-15)


def test_evaluation_reads_the_reward_mean_and_a_checkpoint_keeps_it():
    state = RewardMean(0.5)
    assert state.eval()(batch(7.0))["baseline"] == 0
    state.train()(batch(1.0, 2.0))
    assert state.eval()(batch(7.0))["baseline"] == 0.75
    other = RewardMean(0.5)
    other.load_state_dict(state.state_dict())
    assert other(batch(4.5))["baseline"].item() == pytest.approx(0.5 * 2.5)
    other.beta = 1.0  # holds for the past too
    assert other.eval()(batch(7.0))["baseline"].item() == pytest.approx(2.5)


def test_what_is_not_finite_leaves_the_reward_mean_alone():
    state = RewardMean(1.0)
    assert state(batch(math.nan, 2.0, math.inf, 4.0))["baseline"] == 3
    assert state(batch())["baseline"] == 3


def test_states_do_not_carry_gradients():
    ratio = double(1.0, 2.0).requires_grad_()
    for state in (RewardMean(1.0), MismatchedMean()):
        (option,) = state(CompletionLogprob(ratio, mismatched=ratio)).values()
        assert not option.requires_grad


def test_bco_with_its_state_is_bco_with_the_baseline():
    arguments = sample(OBJECTIVES["bco_unpaired"])
    baseline = 0.2 * (arguments["policy"] - arguments["reference"]).mean().item()
    found = run("bco_unpaired", arguments, beta=0.2, state=RewardMean(0.2))
    torch.testing.assert_close(found, run("bco_unpaired", arguments, beta=0.2, baseline=baseline), rtol=1e-6, atol=0)


def test_kto_with_its_state_on_one_process_is_kto():
    negative = COMPLETIONS | {"mismatched": COMPLETIONS["mismatched"] - 5}
    for arguments in (COMPLETIONS, negative):
        found = run("kto", arguments, state=MismatchedMean())
        assert all(map(torch.equal, found, run("kto", arguments)))
    assert not MismatchedMean().state_dict()
    assert MismatchedMean()(batch(1.0, -9.0, 4.0, present=(True, False, True)))["kl"] == 2.5
    assert MismatchedMean()(batch(1.0, -9.0))["kl"] == 0
    assert MismatchedMean()(batch())["kl"] == 0


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, "0.1", True])
def test_reward_mean_refuses_a_beta_that_is_none(beta):
    with pytest.raises(ValueError, match="RewardMean: beta: expected a finite number above 0, got"):
        RewardMean(beta)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kto", {"kl": -0.1}, "kto: kl: expected a finite number of at least 0, or None, got -0.1"),
        ("kto", {"desirable_weight": -1.0}, "kto: desirable_weight: expected a finite number of at least 0, got -1.0"),
        ("bco_unpaired", {"baseline": math.inf}, "bco_unpaired: baseline: expected a finite number, got inf"),
        ("kto", {"state": RewardMean(0.1)}, "state: expected a MismatchedMean for 'kto', got RewardMean"),
        (
            "bco_unpaired",
            {"state": MismatchedMean()},
            "state: expected a RewardMean for 'bco_unpaired', got Mismatched",
        ),
        ("apo_zero_unpaired", {"state": RewardMean(0.1)}, "state: 'apo_zero_unpaired' would ignore it; expected None"),
    ],
)
def test_bad_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(**sample(OBJECTIVES[name]), objective=name, **options)


# ---- Ranks

# log-ratios of each rank, in two steps; a rank may have none
STEPS = [((1.0, 2.0, 6.0), (-1.0,)), ((4.0,), ())]


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    reward, mismatched = RewardMean(0.5), MismatchedMean()
    found = [(reward(batch(*step[rank])), mismatched(batch(*step[rank]))) for step in STEPS]
    torch.save([(a["baseline"], b["kl"]) for a, b in found], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_their_means(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        (baseline, kl), (next_baseline, next_kl) = torch.load(tmp_path / f"{rank}.pt")
        assert (kl, next_kl) == (2.0, 4.0)
        assert (baseline.item(), next_baseline.item()) == pytest.approx((0.5 * 2, 0.5 * 2.4))
