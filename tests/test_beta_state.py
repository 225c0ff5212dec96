"""The state of beta-DPO: running mean and deviation, draws, beta; over batches, checkpoints and ranks. Letters: P pairs."""

import math
import os
from itertools import combinations

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from isdaa_kernels.objectives import OBJECTIVES, Pair, PairLogprob
from isdaa_kernels.objectives.beta_state import BetaState
from isdaa_kernels.preference_loss import preference_loss


def batch_of(margins, present=None) -> PairLogprob:
    """Pairs with the given Delta, all in the chosen completion."""
    margin_P = torch.as_tensor(margins, dtype=torch.float64)
    zeros_P = torch.zeros_like(margin_P)
    present = torch.ones_like(margin_P, dtype=torch.bool) if present is None else torch.as_tensor(present)
    return PairLogprob(Pair(margin_P, zeros_P), Pair(zeros_P, zeros_P), present=present)


def random_margins(pairs: int, seed: int) -> torch.Tensor:
    return 2 + 3 * torch.randn(pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(state: BetaState) -> list[float]:
    return [state.mean.item(), state.std.item()]


# ---- Running mean and standard deviation


def test_running_mean_and_deviation_over_three_batches_by_hand():
    state = BetaState()
    state(batch_of([1.0, 2.0, 3.0]))  # mean 2, std 1
    assert numbers(state) == pytest.approx([0.2, 0.1], rel=1e-14)
    state(batch_of([4.0, 8.0]))  # mean 6, std sqrt(8)
    assert numbers(state) == pytest.approx([0.78, 0.09 + 0.1 * math.sqrt(8)], rel=1e-14)
    # what is empty or not finite is not in the batch: 0 and 4 are left
    state(batch_of([0.0, 4.0, 99.0, math.nan, math.inf], [True, True, False, True, True]))
    std = 0.9 * (0.09 + 0.1 * math.sqrt(8)) + 0.1 * math.sqrt(8)
    assert numbers(state) == pytest.approx([0.9 * 0.78 + 0.2, std], rel=1e-14)


def test_a_decay_of_zero_takes_the_batch_alone():
    state = BetaState(decay=0.0)
    margins = random_margins(9, 0)
    for _ in range(2):
        state(batch_of(margins))
        assert numbers(state) == pytest.approx([margins.mean().item(), margins.std().item()], rel=1e-14)


def test_evaluation_moves_nothing():
    state = BetaState(seed=3)
    state(batch_of(random_margins(8, 0)))
    before = {name: value.clone() for name, value in state.state_dict().items()}
    state.eval()
    first, second = (state(batch_of(random_margins(8, 1))) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(state.train()(batch_of(random_margins(8, 1)))["beta"], first["beta"])


# ---- Draws


def test_as_many_pairs_are_kept_as_the_authors_code_draws():
    for share in (0.0, 0.2, 0.5, 0.9):
        state = BetaState(filtered_share=share)
        for pairs in (2, 5, 10, 13):
            keep = state(batch_of(random_margins(pairs, pairs)))["keep"]
            drawn = max(int(pairs * (1 - share)), 1)
            assert keep.count_nonzero() == drawn
            torch.testing.assert_close(keep.unique()[-1].item(), pairs / drawn)


def test_draws_have_the_probabilities_of_weights_without_replacement():
    """Two of three pairs: P(i, then j) = w_i / (sum w) * w_j / (sum w - w_i)."""
    margins, trials = [0.0, 1.0, 2.0], 1500
    state = BetaState(filtered_share=1 / 3, decay=0.0).eval()
    state.std.fill_(1.0)
    weights = [math.exp(-(margin**2) / 2) for margin in margins]
    counts = dict.fromkeys(combinations(range(3), 2), 0)
    for trial in range(trials):
        state.batches.fill_(trial)
        counts[tuple(state(batch_of(margins))["keep"].nonzero()[:, 0].tolist())] += 1
    total = sum(weights)
    for (i, j), count in counts.items():
        p = weights[i] * weights[j] / total * (1 / (total - weights[i]) + 1 / (total - weights[j]))
        assert abs(count / trials - p) < 4 * math.sqrt(p * (1 - p) / trials)


def test_no_pair_is_preferred_where_weights_are_equal():
    state, kept = BetaState(filtered_share=0.5, seed=5), torch.zeros(10, dtype=torch.float64)
    for _ in range(600):
        kept += state(batch_of(torch.full((10,), 2.0)))["keep"] / 2
    assert (kept / 600 - 0.5).abs().max() < 4 * 0.5 / math.sqrt(600)


def test_without_a_deviation_the_nearest_pairs_are_kept():
    state = BetaState(filtered_share=0.5).eval()  # M = sigma = 0, as before the first batch
    assert state(batch_of([3.0, -0.5, 1e4, 0.1]))["keep"].tolist() == [0, 2, 0, 2]


def test_seeds_differ_and_repeat():
    def drawn(seed):
        state = BetaState(filtered_share=0.5, seed=seed)
        return torch.stack([state(batch_of(torch.ones(20)))["keep"] for _ in range(3)])

    assert torch.equal(drawn(7), drawn(7))
    assert not torch.equal(drawn(7), drawn(8))
    assert not torch.equal(*drawn(7)[:2])


# ---- beta, and the loss


def test_beta_follows_the_pairs_that_are_kept():
    state = BetaState(beta=0.2, strength=0.5, filtered_share=0.0, decay=0.5)
    made = state(batch_of([1.0, 3.0]))  # M = 1: beta = 0.2 (1 + 0.5 (2 - 1))
    assert made["beta"].item() == pytest.approx(0.3, rel=1e-14)
    state = BetaState(filtered_share=0.4)
    margins = random_margins(10, 0)
    made = state(batch_of(margins))
    kept = margins[made["keep"] > 0]
    assert made["beta"].item() == pytest.approx(0.1 * (1 + 0.6 * (kept.mean() - 0.1 * margins.mean()).item()))
    # the floor
    assert BetaState()(batch_of([-100.0, -101.0]))["beta"].item() == 1e-3


def test_the_loss_is_the_mean_over_the_kept_pairs_and_the_state_is_a_constant():
    margins = random_margins(10, 4)
    policy = torch.cat([margins, torch.zeros(10)]).requires_grad_()
    made = BetaState(seed=1)(batch_of(margins))
    loss, metrics = preference_loss(policy, torch.zeros(20), objective="beta_dpo", state=BetaState(seed=1))
    kept = made["keep"] > 0
    assert kept.sum() == 8
    expected = -logsigmoid(made["beta"] * margins[kept]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss/mean"].item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    slope = torch.where(kept, -made["beta"] * torch.sigmoid(-made["beta"] * margins) / 8, 0)
    torch.testing.assert_close(policy.grad, torch.cat([slope, -slope]), rtol=1e-12, atol=0)


def test_empty_pairs_take_no_part():
    margins = [2.0, math.nan, 1.0, 5.0]
    policy = torch.tensor([*margins, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    lengths = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1])
    state, whole = BetaState(filtered_share=0.0), BetaState(filtered_share=0.0)
    loss, _ = preference_loss(policy, torch.zeros(8), lengths=lengths, objective="beta_dpo", state=state)
    full = policy[[0, 2, 3, 4, 6, 7]]
    expected, _ = preference_loss(full, torch.zeros(6), objective="beta_dpo", state=whole)
    # keep = 4 / 3 makes up for the denominator 4
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(state.state_dict(), whole.state_dict())


@pytest.mark.parametrize("margins", [[], [1.0, 2.0]])
def test_without_a_pair_beta_stays(margins):
    state = BetaState()
    state(batch_of([3.0, 4.0, 8.0]))
    before = numbers(state)
    made = state(batch_of(margins, torch.zeros(len(margins), dtype=torch.bool)))
    assert made["beta"].item() == 0.1
    assert made["keep"].tolist() == [0.0] * len(margins)
    assert numbers(state) == before


def test_one_pair_is_kept_and_has_no_deviation():
    state = BetaState()
    made = state(batch_of([5.0]))
    assert made["keep"].tolist() == [1.0]
    assert numbers(state) == pytest.approx([0.5, 0.0])
    assert made["beta"].item() == pytest.approx(0.1 * (1 + 0.6 * 4.5))


def test_empty_batch_gives_a_loss_of_zero():
    policy = torch.zeros(0, requires_grad=True)
    loss, _ = preference_loss(policy, torch.zeros(0), objective="beta_dpo", state=BetaState())
    loss.backward()
    assert loss.item() == 0


def test_importance_weights_multiply_what_is_kept():
    policy = torch.tensor([0.5, 0.0, -1.0, 0.0], dtype=torch.float64)
    common = {"objective": OBJECTIVES["is_beta_dpo"], "reference": torch.zeros(4)}
    loss, metrics = preference_loss(policy, state=BetaState(filtered_share=0.0), **common)
    beta = 0.1 * (1 + 0.6 * 0.75 * 0.9)
    expected = (math.exp(-0.5) * math.log1p(math.exp(-1.5 * beta)) + math.log(2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert metrics["weight/mean"].item() == pytest.approx((math.exp(-0.5) + 1) / 2)


# ---- Checkpoints


def test_a_saved_state_goes_on_as_if_it_had_not_stopped(tmp_path):
    straight = BetaState(filtered_share=0.5, seed=11)
    for step in range(3):
        straight(batch_of(random_margins(12, step)))
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed = BetaState(filtered_share=0.5, seed=11)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for step in range(3, 6):
        batch = batch_of(random_margins(12, step))
        torch.testing.assert_close(resumed(batch), straight(batch), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


# ---- Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "BetaState: beta: expected a finite number above 0, got 0.0"),
        ({"strength": -1.0}, "BetaState: strength: expected a finite number of at least 0, got -1.0"),
        ({"filtered_share": 1.0}, r"BetaState: filtered_share: expected a number in \[0, 1\), got 1.0"),
        ({"decay": math.nan}, r"BetaState: decay: expected a number in \[0, 1\), got nan"),
        ({"seed": -1}, "BetaState: seed: expected a whole number .*, got -1"),
        ({"seed": 0.5}, "BetaState: seed: expected a whole number .*, got 0.5"),
        ({"pairs_per_rank": 0}, "BetaState: pairs_per_rank: expected a whole number of at least 1, or None, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        BetaState(**options)


@pytest.mark.parametrize("option", [{"beta": 0.2}, {"beta": torch.tensor(0.2)}, {"keep": torch.ones(1)}])
def test_an_option_that_the_state_would_overrule_is_refused(option):
    with pytest.raises(ValueError, match=f"beta_dpo: .*{next(iter(option))}"):
        preference_loss(torch.zeros(2), torch.zeros(2), objective="beta_dpo", state=BetaState(), **option)


def test_a_state_is_required():
    with pytest.raises(ValueError, match="state: expected a BetaState for 'beta_dpo', got None"):
        preference_loss(torch.zeros(2), torch.zeros(2), objective="beta_dpo")


# ---- No waits, compiled graphs


class Forbid(TorchDispatchMode):
    """Raises where the host would wait for a value of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split("::")[1].split(".")[0] not in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


def test_one_rank_never_waits():
    state, batch = BetaState(), batch_of(random_margins(6, 0))
    with Forbid():
        state(batch)


@pytest.mark.slow
def test_fullgraph_compile():
    state, eager = BetaState(), BetaState()

    def step(policy):
        return preference_loss(policy, torch.zeros_like(policy), objective="beta_dpo", state=state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        policy = random_margins(12, seed)
        expected = preference_loss(policy, torch.zeros_like(policy), objective="beta_dpo", state=eager)
        torch.testing.assert_close(tuple(compiled(policy)), tuple(expected))
    torch.testing.assert_close(state.state_dict(), eager.state_dict())


# ---- Ranks

# pairs of rank 0 and of rank 1, batch by batch; the third rank-0 batch has an empty pair, the fourth is none
SPLITS = [(3, 5), (4, 4), (6, 1), (0, 7)]


def rank_batches(rank: int) -> list[PairLogprob]:
    found = []
    for step, (first, second) in enumerate(SPLITS):
        margins = random_margins(first + second, step)
        present = torch.arange(first + second) != (2 if step == 2 else -1)
        span = slice(0, first) if rank == 0 else slice(first, None)
        found.append(batch_of(margins[span], present[span]))
    return found


def joined_batches() -> list[PairLogprob]:
    return [
        batch_of(torch.cat([x.policy.chosen, y.policy.chosen]), torch.cat([x.present, y.present]))
        for x, y in zip(rank_batches(0), rank_batches(1), strict=True)
    ]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    out = {}
    for name, options in (("asked", {}), ("told", {"pairs_per_rank": 9})):
        state = BetaState(filtered_share=0.3, seed=2, **options)
        made = [state(batch) for batch in rank_batches(rank)]
        out[name] = (made, state.state_dict())
    with pytest.raises(ValueError, match=r"pairs_per_rank: expected at least the [34567] pairs of this rank, got 2"):
        BetaState(pairs_per_rank=2)(rank_batches(rank)[1])
    torch.save(out, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_on_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    joined = BetaState(filtered_share=0.3, seed=2)
    expected = [joined(batch) for batch in joined_batches()]
    for name in ("asked", "told"):
        for step, one in enumerate(expected):
            first, second = (ranks[rank][name][0][step] for rank in (0, 1))
            for made in (first, second):
                torch.testing.assert_close(made["beta"], one["beta"], rtol=1e-13, atol=0)
            torch.testing.assert_close(torch.cat([first["keep"], second["keep"]]), one["keep"], rtol=1e-14, atol=0)
        for rank in (0, 1):
            torch.testing.assert_close(ranks[rank][name][1], dict(joined.state_dict()), rtol=1e-13, atol=0)
