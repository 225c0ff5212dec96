"""`linear_policy_loss` is the composition of `linear_logprob_stats` and `policy_loss`. Letters: N tokens, D hidden size, V vocabulary."""

import math

import pytest
import torch
from objective_cases import sample_tokens

from isdaa_kernels import (
    OBJECTIVES,
    LMHead,
    Routed,
    SamplerCorrection,
    group_advantages,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
    make_vocab_order,
    policy_loss,
)
from isdaa_kernels.stats import VocabStats
from isdaa_kernels.testing import FlopCounter, dense_kl

V, D = 13, 5
OF_TOKENS = [name for name, objective in OBJECTIVES.items() if objective.kind == "token"]


class Batch:
    """Hidden states of the tokens of `sample_tokens`; targets are -100 where its mask is False."""

    def __init__(self, name: str = "grpo", dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.arguments = sample_tokens(OBJECTIVES[name])
        N = self.arguments.pop("logprob").numel()
        self.mask, self.cu_seqlens = self.arguments.pop("mask"), self.arguments.pop("cu_seqlens")
        self.hidden, self.other = (torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in "ab")
        self.weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
        self.targets = torch.where(self.mask, torch.randint(0, V, (N,), generator=generator), -100)
        self.leaves = (self.hidden.requires_grad_(), self.weight.requires_grad_())

    def log_softmax(self) -> torch.Tensor:
        return (self.hidden @ self.weight.T).log_softmax(-1)

    def dense(self, name: str, stats: VocabStats | None = None, **more):
        logprob = self.log_softmax().gather(-1, self.targets.clamp(min=0)[:, None])[:, 0]
        return policy_loss(
            logprob, self.cu_seqlens, mask=self.mask, objective=name, stats=stats, **{**self.arguments, **more}
        )

    def fused(self, name: str, **more):
        return linear_policy_loss(
            self.hidden, self.weight, self.targets, self.cu_seqlens, objective=name, **{**self.arguments, **more}
        )


def assert_same(found, expected, batch: Batch, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=1e-7)
    assert found.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics:
        torch.testing.assert_close(found.metrics[name], expected.metrics[name], rtol=1e-5, atol=1e-6)
    if not expected.loss.requires_grad:
        return
    for mine, dense in zip(
        torch.autograd.grad(found.loss, batch.leaves), torch.autograd.grad(expected.loss, batch.leaves), strict=True
    ):
        torch.testing.assert_close(mine, dense, rtol=0, atol=tolerance * dense.abs().max().item())


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_objective_is_the_composition(name, backend):
    batch = Batch(name)
    if name == "oreo_critic":
        batch.arguments["values"].requires_grad_()
        loss, _ = batch.fused(name, backend=backend)
        expected, _ = batch.dense(name)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, batch.arguments["values"]) for x in (loss, expected)))
        return
    assert_same(batch.fused(name, backend=backend), batch.dense(name), batch)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_reference_entropy_and_monitors(backend):
    """The reference from its hidden states, an entropy bonus, and the largest probabilities for the metrics, in one pass."""
    batch = Batch("dapo")
    log_p = batch.log_softmax()
    p = log_p.exp()
    largest = p.topk(3).values
    top = VocabStats(
        entropy=-(p * log_p).sum(-1), top_k_mass=largest.sum(-1), top_k_entropy=-(largest * largest.log()).sum(-1)
    )
    reference = (batch.other @ batch.weight.T).log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[:, None])[:, 0]
    more = {"kl_weight": 0.3, "entropy_weight": 0.2}
    expected = batch.dense("dapo", top, reference_logprob=reference.detach(), **more)
    found = batch.fused(
        "dapo", reference=(batch.other, LMHead(batch.weight)), monitors=("top_k_mass", "top_k_entropy"), top_k=3,
        backend=backend, **more,
    )  # fmt: skip
    assert_same(found, expected, batch)
    assert {"entropy/mean", "top_k_mass/mean", "top_k_entropy/mean", "kl/sqrt"} <= found.metrics.keys()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("monitors", [False, True])
def test_the_exact_divergence_in_the_same_pass(backend, direction, monitors):
    batch = Batch("dapo")
    log_p, log_q = batch.log_softmax(), (batch.other @ batch.weight.T).log_softmax(-1).detach()
    reference = log_q.gather(-1, batch.targets.clamp(min=0)[:, None])[:, 0]
    heads = batch.hidden, LMHead(batch.weight), batch.other, LMHead(batch.weight)
    stats = VocabStats(entropy=-(log_p.exp() * log_p).sum(-1)) if monitors else None
    more = {"kl_weight": 0.3, "kl_corrected": True} | ({"entropy_weight": 0.2} if monitors else {})
    expected = batch.dense(
        "dapo", stats, reference_logprob=reference, token_kl=dense_kl(*heads, direction=direction), **more
    )
    with FlopCounter() as counter:
        found = batch.fused("dapo", reference=heads[2:], kl_direction=direction, backend=backend, **more)
        torch.autograd.grad(found.loss, batch.leaves, retain_graph=True)
    work = 6 + 4 * monitors  # products of a head: 2 forward and 4 back; the entropy has a pass of its own
    assert counter.flop / (2 * batch.mask.sum().item() * D * V) == work
    assert_same(found, expected, batch)


def test_what_the_exact_divergence_cannot_go_with():
    batch = Batch("dapo")
    reference = (batch.other, batch.weight)

    def bad(match, **arguments):
        with pytest.raises(ValueError, match=match):
            batch.fused("dapo", **{"kl_direction": "reverse", "kl_weight": 0.1, "reference": reference, **arguments})

    bad("kl_direction: would be ignored without a kl_weight above 0", kl_weight=0.0)
    bad("direction: expected one of forward, reverse, jsd, got 'k3'", kl_direction="k3")
    bad(r"reference: expected \(hidden, head\)", reference=None, reference_logprob=torch.zeros(len(batch.targets)))
    bad("kl_direction, token_kl: expected one of the two", token_kl=torch.zeros(len(batch.targets)))
    bad("gradient: expected 'exact' with kl_direction", gradient=Routed())
    bad("vocab_order: would be ignored", vocab_order=make_vocab_order(batch.weight.detach(), batch.hidden.detach()))
    bad(
        "reference: expected a head of 13 rows, the policy's vocabulary, got 12",
        reference=(batch.other, batch.weight[:12]),
    )


def test_monitors_beside_routed_gradients():
    """Metrics have no gradient, so that they may stand beside one that cannot be theirs."""
    batch = Batch("grpo")
    routed = {"gradient": Routed(0.0, block=32), "monitors": ("entropy", "top_k_mass", "mean_logit")}
    found = batch.fused("grpo", **routed)
    assert_same(found, batch.fused("grpo", **{**routed, "gradient": "exact"}), batch)
    assert {"entropy/mean", "top_k_mass/mean", "mean_logit/mean"} <= found.metrics.keys()


def test_shapes_with_a_leading_one():
    batch = Batch()
    expected = batch.fused("grpo")
    old = batch.arguments["old_logprob"][None]
    found = linear_policy_loss(
        batch.hidden[None], LMHead(batch.weight), batch.targets[None], batch.cu_seqlens,
        **{**batch.arguments, "old_logprob": old},
    )  # fmt: skip
    assert_same(found, expected, batch)


def test_routed_gradients_pass_through():
    batch = Batch(dtype=torch.float32)
    exact, routed = batch.fused("grpo"), batch.fused("grpo", gradient=Routed(tolerance=1e-6))
    assert_same(routed, exact, batch, 1e-3)


def test_temperature_is_that_of_the_sampler():
    batch = Batch()
    old = linear_logprob(batch.hidden, batch.weight, batch.targets, temperature=0.7).detach()
    _, metrics = batch.fused("grpo", old_logprob=old, temperature=0.7)
    assert metrics["ratio/max"].item() == pytest.approx(1)


@pytest.mark.parametrize("direction", [None, "reverse"])
def test_nothing_to_score(direction):
    """A mask with no token, beside all that a loss may have: sampler, divergence, entropy, monitors, a denominator of no token."""
    batch = Batch("dapo")
    batch.targets.fill_(-100)
    nan = torch.full_like(batch.arguments["old_logprob"], math.nan)
    loss, metrics = batch.fused(
        "dapo", old_logprob=nan, sampler_logprob=nan, reference=(batch.other, batch.weight.detach()), kl_weight=0.1,
        kl_direction=direction, kl_corrected=True, entropy_weight=0.1, monitors=("top_k_mass",), denominator=torch.tensor(0),
        off_policy_threshold=0.1,
    )  # fmt: skip
    assert loss == 0
    assert metrics["tokens/count"] == 0
    assert metrics["empty_completions/count"] == 4
    assert all(value.isfinite() for value in metrics.values())
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, batch.leaves))


@pytest.mark.parametrize("name", OF_TOKENS)
def test_ratios_that_overflow_leave_the_gradients_of_states_and_head_finite(name):
    """Log-ratios of 1e4 nats to old policy, sampler and reference, on either side, in fp32."""
    batch = Batch(name, dtype=torch.float32)
    by_critic = name == "oreo_critic"
    leaves = (batch.arguments["values"].requires_grad_(),) if by_critic else batch.leaves
    level = "token" if OBJECTIVES[name].own_correction else "sequence"
    for sign in (1.0, -1.0):
        far = {"old_logprob": -1e4, "sampler_logprob": -2e4, "reference_logprob": 1e4}
        far = {n: torch.full((len(batch.targets),), sign * value) for n, value in far.items()}
        loss, metrics = batch.fused(name, **far, kl_weight=0.1, correction=SamplerCorrection(level, "truncate", None))
        assert loss.isfinite()
        assert all(value.isfinite() for value in metrics.values())
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))


def test_groups_of_one_teach_nothing():
    """A completion alone in its group has the advantage 0: loss and gradients are 0, and the metrics say why."""
    batch = Batch("dapo")
    advantages = group_advantages(torch.tensor([1.0, -2.0, 0.5, 3.0]), 1)
    loss, metrics = batch.fused("dapo", advantages=advantages)
    assert loss == 0
    assert metrics["advantage/zero_frac"] == 1
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, batch.leaves))


@pytest.mark.parametrize("loss", [linear_policy_loss, linear_preference_loss])
def test_a_reference_with_another_vocabulary(loss):
    batch = Batch()
    more = {"advantages": torch.zeros(4)} if loss is linear_policy_loss else {}
    with pytest.raises(ValueError, match="reference: expected a head of 13 rows, the policy's vocabulary, got 14"):
        loss(
            batch.hidden, batch.weight, batch.targets, batch.cu_seqlens,
            reference=(batch.other, torch.zeros(14, D, dtype=torch.float64)), **more,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"advantages": torch.zeros(3)},
            r"advantages: expected \[4\], one a completion, or \[\d+\], one a token, got \[3\]",
        ),
        ({"kl_weight": 0.1}, "reference_logprob: expected .* for kl_weight"),
        ({"entropy_weight": math.inf}, "entropy_weight: expected a finite number"),
        ({"monitors": ("perplexity",)}, "stats: expected some of entropy, .*, got 'perplexity'"),
        ({"objective": "dpo"}, "objective: 'dpo' is a loss of a pair"),
        (
            {"gradient": Routed(1e-3), "entropy_weight": 0.1},
            "stats: expected none of entropy, mean_logit with gradient=Routed",
        ),
    ],
)
def test_bad_input(arguments, message):
    batch = Batch()
    given = {"objective": "grpo", **batch.arguments, **arguments}
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitors": ("perplexity",)}, "stats: expected some of entropy"),
        ({"monitors": ("perplexity",), "kl_direction": "reverse"}, "stats: expected some of entropy"),
        ({"monitors": "entropy"}, "monitors: expected a sequence of names, got 'entropy'"),
        ({"monitors": ("top_k_mass",), "top_k": 65}, "top_k: expected a whole number from 1 to 64, got 65"),
        ({"head": torch.zeros(V, D + 1).double()}, r"hidden: expected \[..., 6\] to fit weight \[13, 6\]"),
        ({"temperature": 0.0}, "temperature: expected a positive finite number, got 0.0"),
        (
            {"gradient": Routed(1e-3), "entropy_weight": 0.1},
            "stats: expected none of entropy, mean_logit with gradient=R",
        ),
        (
            {"reference": (torch.zeros(22, D), torch.zeros(V, D + 1))},
            r"reference: expected a head \[13, 5\], got \[13, 6\]",
        ),
        (
            {"reference": (torch.zeros(22, D), torch.zeros(V + 1, D))},
            "reference: expected a head of 13 rows, the policy's",
        ),
        (
            {"reference": (torch.zeros(21, D), torch.zeros(V, D))},
            r"reference: expected hidden \[22, 'D'\], got \[21, 5\]",
        ),
        ({"reference": (None, torch.zeros(V, D))}, r"reference: expected hidden \[22, 'D'\], got None"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, message):
    """No matrix product of the policy or of the reference, where the log-probs of both are to be made."""
    batch = Batch()
    given = {"reference": (batch.other, batch.weight), "head": batch.weight, "backend": "reference", "kl_weight": 0.1}
    with FlopCounter() as counted, pytest.raises(ValueError, match=message):
        linear_policy_loss(
            hidden=batch.hidden,
            targets=batch.targets,
            cu_seqlens=batch.cu_seqlens,
            **batch.arguments,
            **{**given, **arguments},
        )
    assert counted.flop == 0


def test_losses_of_pairs_refuse_those_of_tokens():
    batch = Batch()
    message = "objective: 'grpo' is a loss of tokens; expected policy_loss or linear_policy_loss"
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, objective="grpo")
