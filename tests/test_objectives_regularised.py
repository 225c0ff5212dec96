"""Objectives that add a term, a margin or a scale to each pair: their laws, and those that begin at tokens against dense fp64 PyTorch.

Letters: N tokens, V vocabulary, S sequences, P pairs.
"""

import math

import pytest
import torch
from objective_cases import sample
from test_linear_preference_loss import (
    BACKENDS,
    CU_SEQLENS,
    assert_near,
    dense_logprob,
    dense_sums,
    grads,
    lengths,
    make_batch,
)
from torch.nn.functional import logsigmoid

from isdaa_kernels.linear_preference_loss import linear_preference_loss
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.objectives import OBJECTIVES, SelfWeight
from isdaa_kernels.objectives.regularised import OBJECTIVES as REGULARISED
from isdaa_kernels.preference_loss import preference_loss

IN_SUMS = [x for x in REGULARISED if x.token_weight is None and "token_weight" not in x.needs and not x.state_required]


def run(arguments: dict, objective: str, **options):
    """(loss, gradient of the policy)"""
    arguments = dict(arguments)
    policy = arguments.pop("policy").clone().requires_grad_()
    loss, _ = preference_loss(policy, **arguments, objective=objective, **options)
    return loss.detach(), *grads(loss, policy)


# ---- What an option switches off leaves another objective

SPECIAL_CASES = [
    ("dpop", {"drop_weight": 0.0}, "dpo", {"beta": 0.3}),
    ("r_dpo", {"length_weight": 0.0}, "dpo", {}),
    ("cal_dpo", {"calibration_weight": 0.0}, "dpo", {"beta": 1.0}),
    ("flex_dpo", {"rejected_beta": 0.1}, "dpo", {}),
    ("odpo", {}, "dpo", {}),
    ("modpo", {"objective_weight": 1.0, "margin": 0.3}, "odpo", {"margin": 0.3}),
    ("modpo_hinge", {"objective_weight": 1.0}, "slic", {}),
    ("gdpo", {}, "dpo", {}),
    ("madpo", {}, "dpo", {}),
]


@pytest.mark.parametrize(("name", "options", "other", "other_options"), SPECIAL_CASES)
def test_special_cases(name, options, other, other_options):
    arguments = sample(OBJECTIVES["r_dpo"])
    torch.testing.assert_close(run(arguments, name, **options), run(arguments, other, **other_options))


def test_the_length_term_of_r_dpo_is_an_offset():
    arguments = sample(OBJECTIVES["r_dpo"])
    chosen, rejected = arguments["lengths"].chunk(2)
    expected = run(arguments, "odpo", margin=0.25 * (rejected - chosen))
    torch.testing.assert_close(run(arguments, "r_dpo", length_weight=0.25), expected)


def test_minor_dpo_is_dpo_while_the_rejected_completion_is_above_the_reference():
    arguments = sample(OBJECTIVES["dpo"], log_ratio=torch.linspace(0.1, 3.0, 12, dtype=torch.float64))
    torch.testing.assert_close(run(arguments, "minor_dpo"), run(arguments, "dpo"))


OPTIONS = [(x.name, option) for x in IN_SUMS for option in x.defaults]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_may_hold_one_value_a_pair(name, option):
    arguments = sample(OBJECTIVES[name], items=2)
    values = {"scale_floor": (0.1, 0.4), "scale_ceiling": (0.5, 4.0), "largest_factor": (1.5, 3.0)}
    values |= {"preference": (0.3, 0.9), "least_factor": (0.3, 0.9), "label_smoothing": (0.1, 0.3)}
    pair = values.get(option, (0.2, 0.7))
    more = {"reward_gap": 0.4} if name == "madpo" and option != "reward_gap" else {}
    together, _ = run(arguments, name, **more, **{option: torch.tensor(pair, dtype=torch.float64)})
    apart = [
        run({n: v[item::2] for n, v in arguments.items()}, name, **more, **{option: pair[item]})[0] for item in (0, 1)
    ]
    torch.testing.assert_close(together, torch.stack(apart).mean())


# ---- Adaptive scale


def least_scale(scaled: float, penalty: float) -> float:
    """The t in [0.1, 5] where -t LS(z / t) + (penalty - log 2) t is least: the entropy of S(z / t) is log 2 - penalty there."""
    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        p = 1 / (1 + math.exp(middle))
        entropy = -p * math.log(p) - (1 - p) * math.log1p(-p)
        low, high = (middle, high) if entropy > math.log(2) - penalty else (low, middle)
    return min(max(abs(scaled) / low, 0.1), 5.0)


def test_the_scale_of_ada_dpo_makes_the_loss_least():
    margins = torch.linspace(-60.0, 60.0, 97, dtype=torch.float64)
    scale = torch.tensor([least_scale(0.1 * margin, 0.1) for margin in margins.tolist()])
    arguments = {"policy": torch.cat([margins, torch.zeros(97)]), "reference": torch.zeros(194, dtype=torch.float64)}
    loss, gradient = run(arguments, "ada_dpo", denominator=1)
    # five Newton steps stop within 1e-3 of it
    expected = -0.1 * torch.sigmoid(-0.1 * margins / scale)
    torch.testing.assert_close(gradient[:97], expected, rtol=2e-3, atol=0)
    losses = -scale * logsigmoid(0.1 * margins / scale) + (0.1 - math.log(2)) * scale
    torch.testing.assert_close(loss, losses.sum().float(), rtol=1e-6, atol=0)


# ---- The weight of margin-adaptive DPO


def weight_of_madpo(gap: float, **options) -> float:
    """Of a pair with Delta = 0, whose loss under dpo is log 2."""
    loss, _ = run({"policy": torch.zeros(2), "reference": torch.zeros(2)}, "madpo", reward_gap=gap, **options)
    return loss.item() / math.log(2)


def test_madpo_weighs_hard_pairs_up_and_easy_and_misjudged_ones_down():
    options = {"gap_threshold": 2.0}
    assert weight_of_madpo(1.0, **options) > 1 > weight_of_madpo(3.0, **options)
    assert weight_of_madpo(-1.0, **options) < 1
    assert weight_of_madpo(-2.5, **options) == pytest.approx(1)
    # continuous where it changes
    for gap in (2.0, -2.0, 0.0):
        assert weight_of_madpo(gap - 1e-7, **options) == pytest.approx(1, abs=1e-6)
        assert weight_of_madpo(gap + 1e-7, **options) == pytest.approx(1, abs=1e-6)


def test_madpo_is_finite_at_any_reward_gap():
    gaps = torch.tensor([1e4, -1e4, 700.0, -700.0, -1.9e3], dtype=torch.float64)
    for threshold in (1.0, 2e3):
        loss, gradient = run(sample(OBJECTIVES["madpo"], items=5), "madpo", reward_gap=gaps, gap_threshold=threshold)
        assert loss.isfinite()
        assert gradient.isfinite().all()


# ---- Weights of tokens: one case by hand, and dense PyTorch on a ragged batch with prompts and an empty completion


def logits_of(logprobs: list[float]) -> torch.Tensor:
    """Rows of two logits whose softmax gives the first word exp(logprob)."""
    p = torch.tensor(logprobs, dtype=torch.float64).exp()
    return torch.stack([p.log(), (1 - p).log()], 1)


# Chosen has three scored tokens after one of its prompt, rejected two: the third is the tail.
BY_HAND = [
    # (-1 - 2 - 3 / 2) - (-0.5 - 0.5 - 0.5 / 2) = -3.25; rejected -2 + 1 = -1
    ("ld_dpo", {}, -2.25),
    # without its tail: -3 + 1 = -2; with all of it -6 + 1.5 = -4.5
    ("ld_dpo", {"tail_weight": 0.0}, -1.0),
    ("ld_dpo", {"tail_weight": 1.0}, -3.5),
    # the reference whole: -4.5 + 1.5 = -3; -3 + 1.5 = -1.5
    ("ld_dpo_policy", {}, -2.0),
    ("ld_dpo_policy", {"tail_weight": 0.0}, -0.5),
]


@pytest.mark.parametrize(("name", "options", "margin"), BY_HAND)
def test_tail_weights_by_hand(name, options, margin):
    logits = logits_of([-9.0, -1.0, -2.0, -3.0, -1.5, -0.5]).requires_grad_()
    loss, metrics = linear_preference_loss(
        logits,
        torch.eye(2, dtype=torch.float64),
        torch.tensor([-100, 0, 0, 0, 0, 0]),
        torch.tensor([0, 4, 6]),
        reference_logprob=torch.tensor([[-9.0, -0.5, -0.5, -0.5, -0.5, -0.5]], dtype=torch.float64),
        objective=name,
        beta=2.0,
        backend="reference",
        **options,
    )
    assert metrics["margin/mean"].item() == pytest.approx(margin, rel=1e-6)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2 * margin)), rel=1e-6)
    (gradient,) = grads(loss, logits)
    slope = 2 / (1 + math.exp(2 * margin))
    weight = torch.tensor([0, 1, 1, options.get("tail_weight", 0.5), -1, -1], dtype=torch.float64)
    expected = -slope * weight * (1 - logits.detach()[:, 0].exp())
    torch.testing.assert_close(gradient[:, 0], expected, rtol=1e-12, atol=1e-15)


def tails(targets, pairs: list[tuple[int, int]], tail_weight: float):
    """1 and, beyond the length of the other completion, tail_weight, token by token; 0 where nothing is scored."""
    weight = torch.zeros(len(targets), dtype=torch.float64)
    counts = lengths(targets).long().tolist()
    for pair in pairs:
        for sequence, other in (pair, pair[::-1]):
            start, end = CU_SEQLENS[sequence : sequence + 2].tolist()
            scored = [n for n in range(start, end) if targets[n] >= 0]
            for position, n in enumerate(scored):
                weight[n] = 1.0 if position < min(counts[sequence], counts[other]) else tail_weight
    return weight


# Given pairs leave out sequence 1 and turn one pair round.
PAIRS = [None, [(0, 3), (5, 2)]]


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("name", ["ld_dpo", "ld_dpo_policy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tail_weights_equal_dense(backend, dtype, name, pairs):
    batch = make_batch(dtype)
    rows = pairs or [(0, 3), (1, 4), (2, 5)]
    weight_N = tails(batch.targets, rows, 0.3)
    policy_N = dense_logprob(batch.hidden, batch.weight, batch.targets)
    reference_N = dense_logprob(*batch.reference, batch.targets)
    policy = dense_sums(policy_N * weight_N)
    reference = dense_sums(reference_N * weight_N if name == "ld_dpo" else reference_N)
    ratio = policy - reference
    full = [(chosen, rejected) for chosen, rejected in rows if (chosen, rejected) != (1, 4)]
    expected = -sum(logsigmoid(0.7 * (ratio[chosen] - ratio[rejected])) for chosen, rejected in full) / len(rows)
    leaves = (batch.hidden, batch.weight)
    expected_grads = grads(expected, *leaves)
    by_sequence = {"reference_logprob": reference_N[None] if name == "ld_dpo" else reference}
    for how in (by_sequence, {"reference": batch.reference}):
        loss, metrics = linear_preference_loss(
            batch.hidden,
            batch.weight,
            batch.targets,
            CU_SEQLENS,
            **how,
            objective=name,
            pairs=None if pairs is None else torch.tensor(pairs),
            beta=0.7,
            tail_weight=0.3,
            backend=backend,
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["empty_pairs/count"].item() == len(rows) - len(full)
        found = grads(loss, *leaves)
        for actual, dense in zip(found, expected_grads, strict=True):
            assert_near(actual, dense, dtype)
        assert (found[0][[0, 1, 2, 9]] == 0).all()  # a prompt, and the partner of the empty completion


def test_a_tail_weight_of_one_is_dpo():
    batch = make_batch()
    reference_logprob = dense_logprob(*batch.reference, batch.targets)[None]
    common = {"reference_logprob": reference_logprob, "backend": "reference"}
    arguments = (batch.hidden, batch.weight, batch.targets, CU_SEQLENS)
    expected = linear_preference_loss(*arguments, **common, objective="dpo")
    for name in ("ld_dpo", "ld_dpo_policy"):
        actual = linear_preference_loss(*arguments, **common, objective=name, tail_weight=torch.tensor(1.0))
        torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"ld_dpo: tail_weight: expected a number, got a tensor \[3\]"):
        linear_preference_loss(*arguments, **common, objective="ld_dpo", tail_weight=torch.ones(3))


@pytest.mark.parametrize("name", ["ld_dpo", "ld_dpo_policy", "is_ld_dpo"])
def test_sums_alone_cannot_weigh_tails(name):
    with pytest.raises(ValueError, match=f"objective: '{name}' weighs tokens; expected linear_preference_loss"):
        preference_loss(torch.zeros(2), torch.zeros(2), objective=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segment_labels_equal_dense(backend):
    """+1 for the segments where chosen is better and -1 where it is worse, on the tokens of both completions."""
    batch = make_batch()
    label_N = torch.where(torch.arange(len(batch.targets)) % 5 < 2, -1.0, 1.0).double()
    reference_N = dense_logprob(*batch.reference, batch.targets)
    ratio_N = dense_logprob(batch.hidden, batch.weight, batch.targets) - reference_N
    a, b = dense_sums(label_N * ratio_N)[[0, 2, 3, 5]].chunk(2)
    expected = -logsigmoid(0.1 * (a - b)).sum() / 3
    arguments = (batch.hidden, batch.weight, batch.targets, CU_SEQLENS)
    common = {"reference_logprob": reference_N[None], "objective": "segment_dpo", "backend": backend}
    loss, _ = linear_preference_loss(*arguments, **common, token_weight=label_N)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    leaves = (batch.hidden, batch.weight)
    for actual, dense in zip(grads(loss, *leaves), grads(expected, *leaves), strict=True):
        assert_near(actual, dense, torch.float64)
    with pytest.raises(ValueError, match=r"token_weight: expected .* for 'segment_dpo', got None"):
        linear_preference_loss(*arguments, **common)


# ---- WPO: its weight from the same pass over the logits


@pytest.mark.parametrize("weight", [None, SelfWeight(cap=0.02), SelfWeight(cap=None)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wpo_equals_dense(backend, dtype, weight):
    batch = make_batch(dtype)
    batch.targets[22:30] = (batch.hidden @ batch.weight.T).argmax(-1)[22:30]  # one pair's weight is above the caps
    batch.targets[0:9] = (batch.hidden @ batch.weight.T).argmax(-1)[0:9]
    scored_N = batch.targets >= 0
    log_p_NV = ((batch.hidden.double() @ batch.weight.double().T + batch.bias.double()) / 0.8).log_softmax(-1)
    policy_N = log_p_NV.gather(-1, batch.targets.clamp(min=0)[:, None])[:, 0].where(scored_N, 0)
    reference_N = dense_logprob(*batch.reference, batch.targets, temperature=0.8)
    over_N = (policy_N - log_p_NV.exp().square().sum(-1).log()).where(scored_N, 0).detach()
    mean_S = dense_sums(over_N) / lengths(batch.targets).clamp(min=1)
    cap = 1.0 if weight is None else weight.cap
    raw_P = (mean_S[:3] + mean_S[3:]).exp()
    weight_P = raw_P if cap is None else raw_P.clamp(max=cap)
    assert cap is None or 0 < (raw_P[[0, 2]] > cap).sum() < 2  # both sides of the cap
    ratio = dense_sums(policy_N - reference_N)
    losses_P = -weight_P * logsigmoid(0.1 * (ratio[:3] - ratio[3:]))
    expected = losses_P[[0, 2]].sum() / 3
    loss, metrics = linear_preference_loss(
        batch.hidden,
        LMHead(batch.weight, bias=batch.bias),
        batch.targets,
        CU_SEQLENS,
        reference=batch.reference,
        objective="wpo",
        importance=weight,
        temperature=0.8,
        backend=backend,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["weight/mean"].item() == pytest.approx(weight_P[[0, 2]].mean().item(), rel=1e-5)
    assert metrics["weight/clipped_frac"].item() == (0.0 if cap is None else 0.5)
    leaves = (batch.hidden, batch.weight, batch.bias)
    for actual, dense in zip(grads(loss, *leaves), grads(expected, *leaves), strict=True):
        assert_near(actual, dense, dtype)
