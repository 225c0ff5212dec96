"""Pairwise objectives that look at tokens: divergences, weights and masks of tokens, steps. Letters: N tokens, S completions."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from isdaa_kernels import (
    Routed,
    chosen_tokens,
    divergent_tokens,
    guidance_weight,
    linear_kl,
    linear_preference_loss,
    policy_loss,
    preference_loss,
    step_cu_seqlens,
)
from isdaa_kernels.objectives import OBJECTIVES
from isdaa_kernels.testing import FlopCounter

# Chosen of 4 and 3 tokens, rejected of 5 and 2; hidden states are logits.
CU_SEQLENS, V = torch.tensor([0, 4, 7, 12, 14]), 6
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, REFERENCE = (torch.randn(14, V, generator=GENERATOR, dtype=torch.float64) for _ in "ab")
TARGETS = torch.randint(0, V, (14,), generator=GENERATOR)
TARGETS[[0, 4, 7, 12]] = -100


def log_ratio(logits: torch.Tensor) -> torch.Tensor:
    """Of each token, 0 where it is not scored."""
    index = TARGETS.clamp(min=0)[:, None]
    ratio = logits.log_softmax(-1).gather(-1, index) - REFERENCE.log_softmax(-1).gather(-1, index)
    return torch.where(TARGETS == -100, 0, ratio[:, 0])


def by_completion(value: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.sum() for part in value.split(CU_SEQLENS.diff().tolist())])


def fused(logits: torch.Tensor, **arguments):
    reference = REFERENCE.log_softmax(-1).gather(-1, TARGETS.clamp(min=0)[:, None])[:, 0]
    loss, _ = linear_preference_loss(
        logits, torch.eye(V, dtype=torch.float64), TARGETS, CU_SEQLENS, reference_logprob=reference[None],
        backend="reference", **arguments,
    )  # fmt: skip
    return loss


def assert_same(loss: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor) -> None:
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("summed", [False, True])
def test_tdpo_from_logits(name, summed):
    """The authors' lines: values are log-ratios and divergences, which count against the margin."""
    logits = LOGITS.clone().requires_grad_()
    q, log_p = REFERENCE.softmax(-1), logits.log_softmax(-1)
    kl_N = (q * (REFERENCE.log_softmax(-1) - log_p)).sum(-1)
    scored_N = torch.where(TARGETS == -100, 0, kl_N)
    chosen, rejected = by_completion(log_ratio(logits)).chunk(2)
    kl_chosen, kl_rejected = by_completion(scored_N).chunk(2)
    if name == "tdpo1":
        margin = (chosen - rejected) - (kl_rejected - kl_chosen)
    else:
        margin = (chosen - rejected) - 0.5 * (kl_rejected - kl_chosen.detach())
    expected = -logsigmoid(0.3 * margin).mean()
    # what lies at ignored tokens is not read
    given = by_completion(scored_N) if summed else kl_N.where(TARGETS != -100, math.nan)[None]
    assert_same(fused(logits, objective=name, beta=0.3, reference_kl=given), expected, logits)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_from_both_models(name):
    """Log-probs of both and their divergence come from one pass: 2 products forward, 4 back."""
    eye, logits = torch.eye(V, dtype=torch.float64), LOGITS.clone().requires_grad_()
    kl_N = (REFERENCE.softmax(-1) * (REFERENCE.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    expected = fused(logits, objective=name, beta=0.3, reference_kl=kl_N[None])
    arguments = {"reference": (REFERENCE, eye), "objective": name, "beta": 0.3, "backend": "reference"}
    with FlopCounter() as counter:
        loss, _ = linear_preference_loss(logits, eye.requires_grad_(), TARGETS, CU_SEQLENS, **arguments)
        torch.autograd.grad(loss, (logits, eye), retain_graph=True)
    assert counter.flop == 6 * 2 * 10 * V * V
    assert_same(loss, expected.double(), logits)
    with pytest.raises(ValueError, match="gradient: expected 'exact' for 'tdpo"):
        linear_preference_loss(logits, eye, TARGETS, CU_SEQLENS, gradient=Routed(), **arguments)


def test_tdpo_needs_the_divergence():
    with pytest.raises(
        ValueError, match=r"reference_kl: expected .*KL\(reference \|\| policy\).* for 'tdpo1', got None"
    ):
        preference_loss(torch.zeros(2), torch.zeros(2), objective="tdpo1")
    with pytest.raises(ValueError, match="reference_kl: 'dpo' would ignore it"):
        preference_loss(torch.zeros(2), torch.zeros(2), objective="dpo", reference_kl=torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"reference_kl: expected \[14\] or \[1, 14\] per token, or \[4\] per sequence"
    ):
        fused(LOGITS, objective="tdpo1", reference_kl=torch.zeros(3))


def test_tgdpo_from_tokens():
    logits, reward = LOGITS.clone().requires_grad_(), torch.linspace(-2, 3, 14, dtype=torch.float64)
    ratio_N = log_ratio(logits)
    factor_N = torch.cat([1 + 0.5 * 0.3 * reward[:7], 1 - 0.5 * 0.3 * reward[7:]])
    chosen, rejected = by_completion(factor_N * ratio_N).chunk(2)
    expected = -logsigmoid(0.3 * (chosen - rejected)).mean()
    weight = guidance_weight(reward, chosen_tokens(CU_SEQLENS, 14), beta=0.3)
    torch.testing.assert_close(weight, factor_N)
    assert_same(fused(logits, objective="tgdpo", beta=0.3, token_weight=weight), expected, logits)
    with pytest.raises(ValueError, match=r"token_weight: expected .* for 'tgdpo', got None"):
        fused(LOGITS, objective="tgdpo")


def test_guidance_leaves_alone_what_is_not_scored():
    reward = torch.tensor([1.0, math.nan])
    found = guidance_weight(reward, torch.tensor([True, True]), mask=torch.tensor([True, False]))
    assert found.tolist() == pytest.approx([1.05, 1.0])
    with pytest.raises(ValueError, match=r"chosen: expected bool \[2\], got torch.bool \[3\]"):
        guidance_weight(reward, torch.ones(3, dtype=torch.bool))


def test_chosen_tokens_of_pairs():
    pairs = torch.tensor([[3, 0], [2, 0]])
    assert chosen_tokens(CU_SEQLENS, 14, pairs).tolist() == [False] * 7 + [True] * 7
    assert chosen_tokens(CU_SEQLENS, 14).tolist() == [True] * 7 + [False] * 7


def test_mcts_dpo_from_the_first_divergent_token():
    """The first pair parts at its third token, the second at its second: sums from there, and a smoothing of its own for each pair."""
    targets = torch.tensor([-100, 3, 1, 2, -100, 4, 4, -100, 3, 2, 2, 0, -100, 5])
    mask = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.float64)
    weight = divergent_tokens(targets, CU_SEQLENS)
    assert torch.equal(weight, mask)
    logits = LOGITS.clone().requires_grad_()
    confidence = torch.tensor([0.9, 0.3], dtype=torch.float64)
    smoothing = (1 - confidence).clamp(max=0.5)
    chosen, rejected = by_completion(mask * log_ratio(logits)).chunk(2)
    z = 0.3 * (chosen - rejected)
    expected = (-(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)).mean()
    found = fused(logits, objective="mcts_dpo", beta=0.3, token_weight=weight, label_smoothing=smoothing)
    assert_same(found, expected, logits)


@pytest.mark.parametrize(
    ("tokens", "ends", "pairs", "expected"),
    [
        # the one begins as the other does
        ([1, 2, 1, 2, 3], [2, 5], None, [0, 0, 0, 0, 1]),
        ([1, 2, 1, 2], [2, 4], None, [0, 0, 0, 0]),
        ([], [0, 0], None, []),
        ([7, 8], [0, 2], None, [1, 1]),
        # three completions in two pairs: the second parts from the first at place 1, from the third at once
        ([1, 2, 3, 1, 5, 6, 2, 2], [3, 6, 8], [[0, 1], [1, 2]], [0, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_divergent_tokens(tokens, ends, pairs, expected):
    pairs = None if pairs is None else torch.tensor(pairs)
    found = divergent_tokens(torch.tensor(tokens, dtype=torch.int64), torch.tensor([0, *ends]), pairs)
    assert found.tolist() == expected


def test_divergent_tokens_refuse():
    with pytest.raises(ValueError, match=r"tokens: expected int32 or int64 \[N\], got torch.float32"):
        divergent_tokens(torch.zeros(3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="cu_seqlens: expected an even number of sequences"):
        divergent_tokens(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected non-decreasing values from 0 to 3, got \[0, 1, 2\]"):
        divergent_tokens(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2]))


def test_guidance_weights_refuse_numbers():
    with pytest.raises(ValueError, match="beta: expected a finite number, got nan"):
        guidance_weight(torch.zeros(3), torch.zeros(3, dtype=torch.bool), beta=float("nan"))
    with pytest.raises(ValueError, match="guidance: expected a finite number, got '1'"):
        guidance_weight(torch.zeros(3), torch.zeros(3, dtype=torch.bool), guidance="1")


def test_steps_are_completions_of_their_own():
    """Two completions in steps of 2, 2 tokens and 1, 3, 1: the direct advantage of each."""
    cu_seqlens = step_cu_seqlens(torch.tensor([0, 4, 9]), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 5]))
    assert cu_seqlens.tolist() == [0, 2, 4, 5, 8, 9]
    logits = LOGITS[:9].clone().requires_grad_()
    targets, advantage = torch.tensor([1, 2, 3, 4, 5, 0, 1, 2, 3]), torch.tensor([0.5, -0.2, 0.1, 0.0, -0.7]).double()
    logprob, reference = (x.log_softmax(-1).gather(-1, targets[:, None])[:, 0] for x in (logits, REFERENCE[:9]))
    sums = torch.stack([part.sum() for part in (logprob - reference).split([2, 2, 1, 3, 1])])
    expected = ((advantage / 0.5 - 0.3 * sums) ** 2 / 2).mean()
    loss, _ = linear_preference_loss(
        logits, torch.eye(V, dtype=torch.float64), targets, cu_seqlens, reference_logprob=reference, backend="reference",
        objective="dapo_direct", beta=0.3, advantage=advantage, advantage_scale=0.5,
    )  # fmt: skip
    assert_same(loss, expected, logits)
    with pytest.raises(ValueError, match=r"steps: expected integers \[N\], got torch.float32"):
        step_cu_seqlens(torch.tensor([0, 4]), torch.zeros(4))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected non-decreasing values from 0 to 3, got \[0, 4\]"):
        step_cu_seqlens(torch.tensor([0, 4]), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected int32 or int64 \[S \+ 1\], got \[0, 4\]"):
        step_cu_seqlens([0, 4], torch.zeros(4, dtype=torch.int64))


def test_oreo_of_steps_is_oreo_of_tokens_where_each_token_is_one():
    logprob = torch.linspace(-3, -1, 6, dtype=torch.float64).requires_grad_()
    arguments = {
        "cu_seqlens": torch.tensor([0, 2, 6]), "reference_logprob": torch.full((6,), -2.0, dtype=torch.float64),
        "values": torch.linspace(0, 1, 6), "rewards": torch.tensor([1.0, 0.0]), "objective": "oreo_actor", "beta": 0.5,
    }  # fmt: skip
    expected, _ = policy_loss(logprob, **arguments)
    found, _ = policy_loss(logprob, **arguments, step_cu_seqlens=torch.arange(7))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logprob)[0] for x in (found, expected)))


def test_they_are_dpo_with_weights():
    for name in ("tgdpo", "mcts_dpo"):
        assert OBJECTIVES[name].function is OBJECTIVES["dpo"].function
        assert "token_weight" in OBJECTIVES[name].needs


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_with_the_divergence_of_linear_kl(name):
    """From hidden states to the loss without logits: both paths of the gradient, through log-probs and divergence, are those of logits."""
    eye, logits = torch.eye(V, dtype=torch.float64), LOGITS.clone().requires_grad_()
    kl_N = linear_kl(logits, eye, REFERENCE, eye, direction="forward", targets=TARGETS, backend="reference")
    dense_N = (REFERENCE.softmax(-1) * (REFERENCE.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    expected = fused(logits, objective=name, beta=0.3, reference_kl=dense_N[None])
    assert_same(fused(logits, objective=name, beta=0.3, reference_kl=kl_N[None]), expected.double(), logits)
