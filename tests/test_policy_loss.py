"""`policy_loss`: laws of losses of tokens, what acts beside the objective, metrics, bad input. Letters: N tokens, S completions."""

import math

import pytest
import torch
from objective_cases import sample_tokens

from isdaa_kernels import OBJECTIVES, SamplerCorrection, policy_loss
from isdaa_kernels.objectives import Objective
from isdaa_kernels.objectives.objective import REDUCTIONS
from isdaa_kernels.stats import VocabStats

OF_TOKENS = [name for name, objective in OBJECTIVES.items() if objective.kind == "token"]
WITH_ADVANTAGES = [name for name in OF_TOKENS if "advantages" in OBJECTIVES[name].needs]
# the others hold a weight or what lies ahead constant
DIFFERENTIATED = [
    name for name in OF_TOKENS if name not in {"cispo", "vespo", "dft", "gspo_token", "oreo_actor", "oreo_critic"}
]


def run(name: str, arguments: dict, **options):
    """(loss, gradient by the log-probs, by the values for the critic, metrics)"""
    by = "values" if name == "oreo_critic" else "logprob"
    leaf = arguments[by].clone().requires_grad_()
    loss, metrics = policy_loss(**{**arguments, by: leaf}, objective=name, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, metrics


# ---- Laws


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradcheck(name):
    arguments = sample_tokens(OBJECTIVES[name], items=3)
    leaf = arguments.pop("logprob").requires_grad_()
    # the public loss is fp32
    scale = 2**20

    def loss(logprob):
        found, _ = policy_loss(logprob, **arguments, objective=name, denominator=1 / scale)
        return found.double() / scale

    numeric = torch.zeros_like(leaf)
    with torch.no_grad():
        for n in range(len(leaf)):
            step = torch.zeros_like(leaf)
            step[n] = 1e-3
            numeric[n] = (loss(leaf + step) - loss(leaf - step)) / 2e-3
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad, numeric, rtol=2e-3, atol=2e-3 * grad.abs().max().item())


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("extreme", [1e4, -1e4, 700.0, -700.0])
def test_ratios_that_overflow_leave_loss_and_gradient_finite(name, extreme):
    N = sample_tokens(OBJECTIVES[name])["logprob"].numel()
    for where in (torch.full((N,), extreme), extreme * (torch.arange(N) % 3 == 0), extreme * (-1.0) ** torch.arange(N)):
        arguments = sample_tokens(OBJECTIVES[name], log_ratio=where.double())
        arguments["reference_logprob"] = arguments["old_logprob"] + 0.1
        loss, grad, metrics = run(name, arguments, sampler_logprob=arguments["old_logprob"] - where, kl_weight=0.1)
        assert loss.isfinite()
        assert grad.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("size", [60.0, 79.5, 1e4])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_products_of_large_ratios_leave_loss_and_gradient_finite(name, size):
    """Every one of the ratios to old policy, reference and sampler alone fits in fp32: the products of two do not."""
    level = "token" if OBJECTIVES[name].own_correction else "sequence_mean"
    arguments = sample_tokens(OBJECTIVES[name], log_ratio=torch.zeros(N, dtype=torch.float64))
    old = arguments["old_logprob"] - size
    for reference in (old + 2 * size, old - size):
        more = {"old_logprob": old, "reference_logprob": reference, "sampler_logprob": old - size}
        loss, grad, metrics = run(
            name,
            arguments | more,
            correction=SamplerCorrection(level, "truncate", None),
            kl_weight=0.1,
            kl_corrected=True,
        )
        assert loss.isfinite()
        assert grad.float().isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


def test_a_corrected_divergence_is_held_where_the_product_is_too_large():
    """Ratios e^3 and e^50 to the old policy, e^4 and e^40 to the reference: d/dlogp = e^3 (e^4 - 5) + e^3 (1 - e^4), and e^40 (1 - e^40)
    of the divergence alone."""
    arguments = {
        "cu_seqlens": torch.tensor([0, 1]),
        "advantages": torch.zeros(1),
        "logprob": torch.tensor([-60.0]).double(),
    }
    for old, reference, expected, slope in (
        (-63.0, -56.0, math.exp(3) * (math.exp(4) - 5), -4 * math.exp(3)),
        (-110.0, -20.0, math.exp(80), -math.exp(80)),
    ):
        more = {"old_logprob": torch.tensor([old]), "reference_logprob": torch.tensor([reference])}
        loss, grad, _ = run("reinforce", arguments | more, kl_weight=1.0, kl_corrected=True)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert grad.item() == pytest.approx(slope, rel=1e-6)


def test_a_large_power_of_the_ratio_leaves_loss_and_gradient_finite():
    """Where no rate bounds w^k: w = e^20, k = 5."""
    log_ratio = torch.full((N,), 30.0, dtype=torch.float64)
    powers = {"positive_power": 5.0, "positive_rate": 0.0, "negative_power": 5.0, "negative_rate": 0.0}
    arguments = sample_tokens(OBJECTIVES["vespo"], log_ratio=log_ratio)
    loss, grad, _ = run("vespo", arguments, **powers)
    assert loss.isfinite()
    assert grad.float().isfinite().all()


def test_a_correction_is_held_where_the_ratio_is_large_alone():
    """Ratios e^50 and e^2, each times e^40: the first product is e^80, the second e^42."""
    old = torch.tensor([-51.0, -3.0], dtype=torch.float64)
    arguments = {"cu_seqlens": torch.tensor([0, 2]), "old_logprob": old, "sampler_logprob": old - 40}
    arguments |= {"advantages": torch.tensor([-1.0]), "logprob": torch.full((2,), -1.0, dtype=torch.float64)}
    _, grad, metrics = run("grpo", arguments, correction=SamplerCorrection("token", "truncate", None))
    torch.testing.assert_close(grad.log(), torch.tensor([80.0, 42.0]).double() - math.log(2))
    assert metrics["correction/max"].log().item() == pytest.approx(40)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_what_is_not_scored_is_not_read(name):
    arguments = sample_tokens(OBJECTIVES[name])
    loss, grad, _ = run(name, arguments)
    mask = arguments["mask"]
    assert (grad[~mask] == 0).all()
    for other in ("logprob", "old_logprob", "reference_logprob", "values"):
        if other in arguments:
            arguments[other] = torch.where(mask, arguments[other], torch.nan)
    found, found_grad, metrics = run(name, arguments)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(found_grad, grad)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_nan_stays_in_its_completion(name):
    arguments = sample_tokens(OBJECTIVES[name])
    _, grad, _ = run(name, arguments)
    first, last = arguments["cu_seqlens"][1:3].tolist()
    arguments["logprob"][last - 1] = math.nan
    loss, found, _ = run(name, arguments)
    assert loss.isnan()
    keep = torch.ones_like(grad, dtype=torch.bool)
    keep[first:last] = False
    torch.testing.assert_close(found[keep], grad[keep])


@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_mask_with_no_token_gives_zeros(name):
    arguments = sample_tokens(OBJECTIVES[name])
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    arguments["logprob"].fill_(math.nan)
    loss, grad, metrics = run(name, arguments)
    assert loss == 0
    assert (grad == 0).all()
    assert metrics["tokens/count"] == 0
    assert metrics["empty_completions/count"] == 4
    assert all(value.isfinite() for value in metrics.values())


def test_a_denominator_of_no_token_on_any_rank():
    """A step whose completions are all masked: 0 by 0 tokens; with a token, 0 is a mistake that shows."""
    arguments = sample_tokens(OBJECTIVES["dapo"])
    nothing = arguments | {"mask": torch.zeros_like(arguments["mask"])}
    for denominator in (torch.tensor(0), torch.tensor(0.0), torch.zeros(1, dtype=torch.int64)):
        loss, grad, _ = run("dapo", nothing, denominator=denominator)
        assert loss == 0
        assert (grad == 0).all()
        assert not run("dapo", arguments, denominator=denominator)[0].isfinite()
    found, expected = (run("dapo", arguments, denominator=number) for number in (torch.tensor(7), 7))
    torch.testing.assert_close(found[:2], expected[:2])


@pytest.mark.parametrize("name", OF_TOKENS)
def test_no_tokens_and_no_completions_at_all(name):
    arguments = sample_tokens(OBJECTIVES[name])
    for cu_seqlens in ([0], [0, 0, 0]):
        S = len(cu_seqlens) - 1
        empty = {n: v[:0] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        empty["cu_seqlens"] = torch.tensor(cu_seqlens)
        for one in ("advantages", "rewards"):
            if one in arguments:
                empty[one] = torch.zeros(S)
        loss, grad, _ = run(name, empty)
        assert loss == 0
        assert grad.shape == (0,)


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if OBJECTIVES[name].reduction != "batch_token_mean"])
def test_micro_batches_add_up_to_the_batch(name):
    """With the denominator of the whole; but for the mean over a call's own tokens."""
    arguments = sample_tokens(OBJECTIVES[name])
    whole, grad, _ = run(name, arguments)
    cut = arguments["cu_seqlens"][2].item()
    count = arguments["mask"].sum() if OBJECTIVES[name].reduction == "token_mean" else 4
    parts = []
    for tokens, completions in ((slice(0, cut), slice(0, 2)), (slice(cut, None), slice(2, None))):
        part = {n: v for n, v in arguments.items() if n == "max_length"}
        part |= {
            n: v[tokens] for n, v in arguments.items() if n not in ("max_length", "advantages", "rewards", "cu_seqlens")
        }
        part |= {n: arguments[n][completions] for n in ("advantages", "rewards") if n in arguments}
        part["cu_seqlens"] = arguments["cu_seqlens"][completions.start : completions.start + 3] - tokens.start
        parts.append(run(name, part, denominator=count))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)


@pytest.mark.parametrize("name", WITH_ADVANTAGES)
def test_one_advantage_a_completion_is_that_of_its_tokens(name):
    arguments = sample_tokens(OBJECTIVES[name])
    spread = arguments["advantages"].repeat_interleave(arguments["cu_seqlens"].diff())
    expected, found = run(name, arguments), run(name, arguments | {"advantages": spread})
    torch.testing.assert_close(found[:2], expected[:2])
    torch.testing.assert_close(run(name, arguments | {"advantages": spread[None]})[:2], expected[:2])


@pytest.mark.parametrize("name", [name for name in WITH_ADVANTAGES if name not in {"dr_grpo", "luspo"}])
def test_on_policy_the_gradient_is_that_of_reinforce(name):
    """Where policy and old are one, d/dlogp = -A of each token over what the reduction divides by."""
    arguments = sample_tokens(OBJECTIVES[name]) | {"old_logprob": None}
    _, grad, metrics = run(name, arguments)
    _, expected, _ = run("reinforce", {n: v for n, v in arguments.items()}, reduction=OBJECTIVES[name].reduction)
    factor = 1.0
    if name == "rloo":  # one ratio for all tokens: the completion's length times as much
        factor = (arguments["cu_seqlens"].diff() - 1).repeat_interleave(arguments["cu_seqlens"].diff())
    torch.testing.assert_close(grad, expected * factor)
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction):
    """Log-probs 1 to 6 in completions of 4 tokens, 2 of them scored, of 2, and of none."""
    logprob = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    mask = torch.tensor([False, True, True, False, True, True])
    expected = {
        "token_mean": 16 / 4,
        "batch_token_mean": 16 / 4,
        "sequence_mean": (5 / 2 + 11 / 2) / 3,
        "sequence_sum": 16 / 3,
        "max_length": 16 / 8 / 3,
    }[reduction]
    own = Objective("own", lambda batch: batch.policy, frozenset(), {}, kind="token", reduction="token_mean")
    more = {"max_length": 8} if reduction == "max_length" else {}
    loss, _ = policy_loss(logprob, torch.tensor([0, 4, 6, 6]), mask=mask, objective=own, reduction=reduction, **more)
    assert loss.item() == pytest.approx(expected)
    divided, _ = policy_loss(
        logprob, torch.tensor([0, 4, 6, 6]), mask=mask, objective=own, reduction=reduction, denominator=5, **more
    )
    counts = {"token_mean": 4, "batch_token_mean": 1}
    assert divided.item() == pytest.approx(expected * counts.get(reduction, 3) / 5)


def test_dual_clip_is_the_two_sided_clip():
    for cap in (1.5, 1.2, 2.0):
        arguments = sample_tokens(OBJECTIVES["ppo"], items=12)
        both = [run(name, arguments, ratio_cap=cap) for name in ("grpo_two_sided", "ppo_dual_clip")]
        torch.testing.assert_close(both[0][:2], both[1][:2])


# ---- Beside the objective


def test_divergence_is_added_token_by_token():
    arguments = sample_tokens(OBJECTIVES["dapo"])
    mask, reference = arguments["mask"], arguments["old_logprob"] + 0.3
    alone, grad, _ = run("dapo", arguments)
    found, found_grad, metrics = run("dapo", arguments, reference_logprob=reference, kl_weight=0.5)
    d = (reference - arguments["logprob"])[mask]
    estimate = d.exp() - d - 1
    assert (found - alone).item() == pytest.approx(0.5 * estimate.mean().item(), rel=1e-5)
    torch.testing.assert_close((found_grad - grad)[mask], 0.5 * (1 - d.exp()) / mask.sum())
    assert metrics["kl/mean"].item() == pytest.approx(estimate.mean().item())
    sums = torch.zeros(len(arguments["mask"])).double()
    sums[mask] = estimate
    by_completion = torch.stack([part.sum() for part in sums.split(arguments["cu_seqlens"].diff().tolist())])
    assert metrics["kl/sqrt"].item() == pytest.approx(by_completion.mean().sqrt().item())


def test_the_exact_divergence_takes_the_place_of_the_estimate():
    arguments = sample_tokens(OBJECTIVES["dapo"])
    mask = arguments["mask"]
    token_kl = torch.rand(len(mask), dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(**arguments, objective="dapo", kl_weight=0.5, token_kl=token_kl)
    alone, _ = policy_loss(**arguments, objective="dapo")
    assert (loss - alone).item() == pytest.approx(0.5 * token_kl[mask].mean().item(), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, token_kl)
    torch.testing.assert_close(grad, torch.where(mask, 0.5 / mask.sum(), 0.0).double())


def test_entropy_is_subtracted_and_differentiated():
    arguments = sample_tokens(OBJECTIVES["grpo"])
    mask = arguments["mask"]
    entropy = torch.rand(len(mask), requires_grad=True)
    stats = VocabStats(entropy=entropy, top_k_mass=torch.full((len(mask),), 0.75))
    loss, metrics = policy_loss(**arguments, entropy_weight=0.1, stats=stats)
    (grad,) = torch.autograd.grad(loss, entropy)
    lengths = (arguments["cu_seqlens"].diff() - 1).repeat_interleave(arguments["cu_seqlens"].diff())
    torch.testing.assert_close(grad, torch.where(mask, -0.1 / (4 * lengths), 0.0))
    assert metrics["entropy/mean"].item() == pytest.approx(entropy[mask].mean().item())
    assert metrics["top_k_mass/mean"] == 0.75
    assert not any(value.requires_grad for value in metrics.values())


def test_token_weight_acts_on_the_objective_alone():
    arguments = sample_tokens(OBJECTIVES["dapo"])
    reference = arguments["old_logprob"] + 0.3
    nothing = torch.zeros_like(reference)
    loss, _, _ = run("dapo", arguments, token_weight=nothing, reference_logprob=reference, kl_weight=1.0)
    d = (reference - arguments["logprob"])[arguments["mask"]]
    assert loss.item() == pytest.approx((d.exp() - d - 1).mean().item())
    half = run("dapo", arguments, token_weight=nothing + 0.5)
    torch.testing.assert_close(half[1], run("dapo", arguments)[1] / 2)


def test_corrections_by_hand():
    """Completions with old - sampler = (log 2, log 1.5) and (log 0.5, NaN): ratios 2, 1.5 and 0.5, 1; products 3 and 0.5."""
    logprob = torch.full((4,), -1.0, dtype=torch.float64)
    sampler = torch.tensor([-1 - math.log(2), -1 - math.log(1.5), -1 + math.log(2), math.nan], dtype=torch.float64)
    cases = [
        (SamplerCorrection("token", "truncate", 1.6), (1.6, 1.5, 0.5, 1)),
        (SamplerCorrection("token", "truncate", 1.6, 0.8), (1.6, 1.5, 0.8, 1)),
        (SamplerCorrection("token", "mask", 1.6, 0.8), (0, 1.5, 0, 1)),
        (SamplerCorrection("sequence", "truncate", 2.0), (2, 2, 0.5, 0.5)),
        (SamplerCorrection("sequence", "mask", 2.0), (0, 0, 0.5, 0.5)),
        (SamplerCorrection("sequence_mean", "truncate", None), (math.sqrt(3),) * 2 + (math.sqrt(0.5),) * 2),
        (SamplerCorrection(mode="none"), (1, 1, 1, 1)),
    ]
    arguments = {"logprob": logprob, "cu_seqlens": torch.tensor([0, 2, 4]), "old_logprob": logprob}
    arguments |= {"advantages": torch.tensor([1.0, 2.0]), "sampler_logprob": sampler}
    for correction, weights in cases:
        _, grad, metrics = run("reinforce", arguments, correction=correction)
        expected = -torch.tensor(weights, dtype=torch.float64) * torch.tensor([1, 1, 2, 2]) / 4
        torch.testing.assert_close(grad, expected)
        assert metrics["correction/mean"].item() == pytest.approx(sum(weights) / 4)
        assert metrics["correction/max"].item() == pytest.approx(max(weights))
        ess = sum(weights) ** 2 / sum(w * w for w in weights)
        assert metrics["correction/ess"].item() == pytest.approx(ess)
    found = run("reinforce", arguments)[1]
    torch.testing.assert_close(found, run("reinforce", arguments, correction=SamplerCorrection())[1])


def test_the_threshold_drops_bad_completions_that_the_policy_has_left():
    old = torch.full((6,), -1.0, dtype=torch.float64)
    logprob = old - torch.tensor([0.5, 0.5, 0.5, 0.5, 0.1, 0.1])
    arguments = {"logprob": logprob, "old_logprob": old, "cu_seqlens": torch.tensor([0, 2, 4, 6])}
    arguments["advantages"] = torch.tensor([-1.0, 1.0, -1.0])
    _, grad, metrics = run("reinforce", arguments, off_policy_threshold=0.3)
    torch.testing.assert_close(grad, torch.tensor([0, 0, -1, -1, 1, 1]).double() / 6)
    assert metrics["off_policy/dropped_frac"].item() == pytest.approx(1 / 3)


def test_clip_fractions_and_ratios():
    """The ratios of tests/objective_cases.py: clipped are the second token (above, A = 1) and the fourth (below, A = -2)."""
    from objective_cases import Golden

    tensors = Golden("grpo", 0, ()).tensors()
    metrics = policy_loss(**tensors)[1]
    assert metrics["clip/high_frac"].item() == pytest.approx(1 / 5)
    assert metrics["clip/low_frac"].item() == pytest.approx(1 / 5)
    assert metrics["ratio/max"].item() == pytest.approx(1.5)
    assert metrics["ratio/mean"].item() == pytest.approx(5.25 / 5)
    assert metrics["ratio/ess"].item() == pytest.approx(5.25**2 / (1 + 2.25 + 0.25 + 0.5625 + 2.25))
    assert metrics["advantage/mean"].item() == pytest.approx(-1 / 5)
    metrics = policy_loss(**tensors, objective="cispo", ratio_cap=1.4, rewards=torch.tensor([3.0, 1.0]))[1]
    assert metrics["clip/high_frac"].item() == pytest.approx(1 / 5)
    assert metrics["reward/mean"] == 2
    metrics = policy_loss(**tensors, objective="gmpo", log_clip=0.2)[1]
    assert metrics["clip/high_frac"].item() == metrics["clip/low_frac"].item() == pytest.approx(1 / 5)
    # the products 0.75 and 1.125, of three tokens and of two
    means = {"gmpo": (0.75 ** (1 / 3), 1.125**0.5), "gspo": (0.75 ** (1 / 3), 1.125**0.5), "rloo": (0.75, 1.125)}
    for name, (first, second) in means.items():
        metrics = policy_loss(**tensors, objective=name)[1]
        assert metrics["ratio/max"].item() == pytest.approx(second)
        assert metrics["ratio/mean"].item() == pytest.approx((3 * first + 2 * second) / 5)
        ess = (3 * first + 2 * second) ** 2 / (3 * first**2 + 2 * second**2)
        assert metrics["ratio/ess"].item() == pytest.approx(ess)
    assert "clip/high_frac" not in policy_loss(**tensors, objective="sapo")[1]


def test_metrics_are_detached_numbers():
    arguments = sample_tokens(OBJECTIVES["grpo"])
    _, _, metrics = run("grpo", arguments, reference_logprob=arguments["old_logprob"])
    assert all(v.shape == () and v.dtype == torch.float32 and not v.requires_grad for v in metrics.values())


def test_the_dtype_of_the_gradient_is_that_of_the_log_probs():
    arguments = sample_tokens(OBJECTIVES["grpo"])
    arguments["logprob"] = arguments["logprob"].bfloat16()
    assert run("grpo", arguments)[1].dtype == torch.bfloat16


def test_compiles_whole():
    arguments = sample_tokens(OBJECTIVES["gspo"])
    reference = arguments["old_logprob"] - 0.1
    expected = run("gspo", arguments, reference_logprob=reference, kl_weight=0.1)
    leaf = arguments.pop("logprob").requires_grad_()
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(leaf, **arguments, objective="gspo", reference_logprob=reference, kl_weight=0.1)
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected[1])


# ---- Bad input


def bad(message: str, name: str = "grpo", **arguments):
    return pytest.param(name, arguments, message, id=message[:60])


N = sample_tokens(OBJECTIVES["grpo"])["logprob"].numel()
TOKENS, ENDS = torch.zeros(N), sample_tokens(OBJECTIVES["grpo"])["cu_seqlens"].tolist()
BAD = [
    bad(
        rf"advantages: expected \[4\], one a completion, or \[{N}\], one a token, got \[3\]", advantages=torch.zeros(3)
    ),
    bad(r"advantages: expected \[S\], one number a completion.* for 'grpo', got None", advantages=None),
    bad(rf"old_logprob: expected \[{N}\], got \[4\]", old_logprob=torch.zeros(4)),
    bad(rf"reference_logprob: expected \[{N}\], got \[{N}, 2\]", reference_logprob=torch.zeros(N, 2)),
    bad(rf"sampler_logprob: expected \[{N}\], got 3", sampler_logprob=3),
    bad(r"rewards: expected \[4\], got \[5\]", rewards=torch.zeros(5)),
    bad(
        "old_logprob: expected a floating dtype on cpu, got torch.int64", old_logprob=torch.zeros(N, dtype=torch.int64)
    ),
    bad("old_logprob: .* on meta", old_logprob=torch.zeros(N, device="meta")),
    bad(rf"mask: expected bool \[{N}\] on cpu, got torch.float32", mask=torch.ones(N)),
    bad(rf"mask: expected bool \[{N}\] on cpu, got torch.bool \[{N}, 1\]", mask=torch.ones(N, 1).bool()),
    bad(rf"mask: expected bool \[{N}\] on cpu, got torch.bool \[{N}\] on meta", mask=TOKENS.bool().to("meta")),
    bad("mask: expected bool .*, got 3", mask=3),
    bad(r"logprob: expected a floating tensor \[N\] or \[1, N\], got 3", logprob=3),
    bad(r"cu_seqlens: expected a tensor \[S \+ 1\], got 3", cu_seqlens=3),
    bad("advantages: expected a floating dtype on cpu, got torch.bool", advantages=torch.ones(4).bool()),
    bad(r"cu_seqlens: expected non-decreasing values from 0", cu_seqlens=torch.tensor([0, 3])),
    bad(r"step_cu_seqlens: 'grpo' would ignore it", step_cu_seqlens=torch.tensor([0, N])),
    bad(
        rf"^step_cu_seqlens: expected non-decreasing values from 0 to {N}, got \[0, 3\]",
        "oreo_actor",
        step_cu_seqlens=torch.tensor([0, 3]),
    ),
    bad(
        rf"step_cu_seqlens: expected a step to start where a completion does, at {ENDS[1]}, got one across it",
        "oreo_actor",
        step_cu_seqlens=torch.tensor([0, ENDS[1] - 1, *ENDS[2:]]),
    ),
    bad("values: 'grpo' would ignore it", values=TOKENS),
    bad("reference_logprob: expected .* for kl_weight, got None", kl_weight=0.1),
    bad("kl_weight: expected a finite number of at least 0, got -1", kl_weight=-1),
    bad("entropy_weight: expected a finite number of at least 0, got nan", entropy_weight=math.nan),
    bad("token_kl: would be ignored without a kl_weight", token_kl=TOKENS),
    bad(
        "token_kl: expected one with a gradient, got a detached one",
        logprob=TOKENS.clone().requires_grad_(),
        token_kl=TOKENS,
        kl_weight=0.1,
    ),
    bad("kl_corrected: would be ignored without a kl_weight", kl_corrected=True),
    bad("kl_corrected: expected True or False, got 'no'", kl_corrected="no", kl_weight=0.1, reference_logprob=TOKENS),
    bad("stats: expected a VocabStats, got dict", stats={"entropy": TOKENS}),
    bad(rf"stats.lse: expected \[{N}\] on cpu, got torch.float32 \[1\]", stats=VocabStats(lse=TOKENS[:1])),
    bad(rf"stats.entropy: expected \[{N}\] on cpu, .* on meta", stats=VocabStats(entropy=TOKENS.to("meta"))),
    bad(
        "stats.entropy: expected one with a gradient for entropy_weight, got a detached one",
        logprob=TOKENS.clone().requires_grad_(),
        entropy_weight=0.1,
        stats=VocabStats(entropy=TOKENS),
    ),
    bad("stats: expected the entropy of each token for entropy_weight", entropy_weight=0.1),
    bad("sampler_logprob: expected .* for correction, got None", correction=SamplerCorrection()),
    bad("correction: expected a SamplerCorrection, got 3", correction=3, sampler_logprob=TOKENS),
    bad(
        "correction: expected level='token' for 'vespo'",
        "vespo",
        correction=SamplerCorrection(),
        sampler_logprob=TOKENS,
    ),
    bad("off_policy_threshold: expected a finite number of at least 0, or None, got -1", off_policy_threshold=-1),
    bad("reduction: expected one of token_mean, .*, got 'mean'", reduction="mean"),
    bad("max_length: expected a whole number of at least 1 for 'dr_grpo', got None", "dr_grpo", max_length=None),
    bad("max_length: the reduction 'sequence_mean' would ignore it", max_length=3),
    bad("denominator: expected a number above 0, got 0", denominator=0),
    bad(r"denominator: expected a scalar, got \[2\]", denominator=torch.ones(2)),
    bad("objective: 'dpo' is a loss of a pair; expected one of tokens", "dpo"),
    bad("objective: expected one of dpo, ", "gpro"),
    bad("grpo: unknown option 'epsilon', expected one of clip_high, clip_low", epsilon=0.2),
    bad("grpo: clip_high: expected a finite number of at least 0, got -0.1", clip_high=-0.1),
    bad(r"grpo: clip_low: expected a number in \[0, 1\], got 1.5", clip_low=1.5),
    bad(r"grpo: clip_low: expected a number, got a tensor \[\]", clip_low=torch.tensor(0.1)),
    bad("grpo: ratio_cap: expected a finite number above 0, or None, got 0", ratio_cap=0),
    bad("advantages: 'dft' would ignore it", "dft", advantages=torch.zeros(4)),
    bad(r"values: expected \[N\], what a critic expects .* for 'oreo_actor', got None", "oreo_actor", values=None),
    bad(r"rewards: expected \[S\], one number .* for 'oreo_critic', got None", "oreo_critic", rewards=None),
    bad("reference_logprob: expected .* for 'oreo_actor', got None", "oreo_actor", reference_logprob=None),
]


@pytest.mark.parametrize(("name", "arguments", "message"), BAD)
def test_bad_input(name, arguments, message):
    sampled = (
        sample_tokens(OBJECTIVES.get(name, OBJECTIVES["grpo"])) if name != "dpo" else sample_tokens(OBJECTIVES["grpo"])
    )
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**sampled, **arguments}, objective=name)


def test_one_number_for_tokens_or_completions_is_asked_about():
    logprob = -torch.ones(3)
    with pytest.raises(
        ValueError,
        match=r"advantages: \[3\] could be per token or per completion here; expected \[1, 3\] per token or \[3, 1\]",
    ):
        policy_loss(logprob, torch.tensor([0, 1, 2, 3]), advantages=torch.ones(3))


def test_advantages_where_there_are_as_many_tokens_as_completions():
    """Completions of two tokens, none and one: [1, N] is one a token, [S, 1] one a completion, each with its own number."""
    arguments = {"logprob": -torch.ones(3), "cu_seqlens": torch.tensor([0, 2, 2, 3])}
    numbers = torch.tensor([1.0, 5.0, -2.0])
    for advantages, weights in ((numbers[None], numbers), (numbers[:, None], numbers[[0, 0, 2]])):
        _, grad, metrics = run("reinforce", arguments | {"advantages": advantages})
        torch.testing.assert_close(grad, -weights / 3)
        assert metrics["advantage/mean"].item() == pytest.approx(weights.mean().item())
    # elsewhere both mean what they say, too, and one token of one completion is both
    four = arguments | {"logprob": -torch.ones(4), "cu_seqlens": torch.tensor([0, 2, 2, 4])}
    torch.testing.assert_close(
        run("reinforce", four | {"advantages": numbers[:, None]})[1], -torch.tensor([1.0, 1.0, -2.0, -2.0]) / 4
    )
    one = {"logprob": -torch.ones(1), "cu_seqlens": torch.tensor([0, 1]), "advantages": torch.full((1,), 3.0)}
    assert run("reinforce", one)[1].item() == -3


def test_log_probs_of_a_padded_batch_are_refused():
    with pytest.raises(ValueError, match=r"logprob: expected a floating tensor \[N\] or \[1, N\]"):
        policy_loss(torch.zeros(2, 3), torch.tensor([0, 3, 6]), advantages=torch.ones(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "group"}, "SamplerCorrection: level: expected one of token, sequence_mean, sequence, got 'group'"),
        ({"mode": "clip"}, "mode: expected one of truncate, mask, none, got 'clip'"),
        ({"largest": 0}, "largest: expected a finite number above 0, or None, got 0"),
        ({"least": -1.0}, "least: expected a finite number above 0"),
        ({"least": 4.0}, "least: expected a number below largest = 3.0, got 4.0"),
    ],
)
def test_bad_correction(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerCorrection(**settings)
