"""Monitors against numbers worked out by hand, and against the metrics of losses that know the same."""

import math

import pytest
import torch

from isdaa_kernels import ImportanceWeight, VocabStats, linear_logprob_stats, monitors, policy_loss, preference_loss

HALF, TWO = -math.log(2), math.log(2)


def fp32(value: torch.Tensor) -> float:
    """A detached fp32 scalar as a number."""
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert not value.requires_grad
    return value.item()


def test_means_of_the_likeliest_tokens():
    """p = (1/8, 1/8, 1/4, 1/2) and uniform over 4, with a token that does not count between them."""
    logits = torch.tensor([[0.0, 0.0, math.log(2), math.log(4)], [9.0, 0, 0, 0], [0.0, 0, 0, 0]])
    stats = ("top_k_mass", "top_k_entropy", "is_top1")
    _, found = linear_logprob_stats(torch.eye(3), logits.T.contiguous(), torch.tensor([3, 0, 1]), stats=stats, top_k=2)
    means = monitors.vocabulary_means(found, torch.tensor([True, False, True]))
    assert means.keys() == {"top_k_mass/mean", "top_k_entropy/mean", "is_top1/mean"}
    assert fp32(means["top_k_mass/mean"]) == pytest.approx((3 / 4 + 1 / 2) / 2, rel=1e-6)
    # -(1/2 log 1/2 + 1/4 log 1/4) and -2 * 1/4 log 1/4
    assert fp32(means["top_k_entropy/mean"]) == pytest.approx(math.log(2), rel=1e-6)
    assert fp32(means["is_top1/mean"]) == 1
    nan = VocabStats(entropy=torch.tensor([[1.0, math.nan], [3.0, 4.0]], requires_grad=True))
    assert fp32(monitors.vocabulary_means(nan, torch.tensor([[1, 0], [1, 1]]).bool())["entropy/mean"]) == pytest.approx(
        8 / 3
    )
    assert fp32(monitors.vocabulary_means(nan, torch.zeros(2, 2, dtype=torch.bool))["entropy/mean"]) == 0
    assert math.isnan(fp32(monitors.vocabulary_means(nan)["entropy/mean"]))


# Of e^d - 1 - d at log 2 and -log 2 the mean is 1/4, whose root is 1/2; at log 2 alone it is 1 - log 2.
def test_the_distance_by_hand():
    policy, reference = torch.tensor([-3.0, -4.0, math.nan]), torch.tensor([-3.0, -4.0, -1.0])
    policy = (policy.double() + torch.tensor([TWO, HALF, 0.0])).requires_grad_()
    present = torch.tensor([True, True, False])
    assert fp32(monitors.sqrt_kl(policy, reference, present=present)) == pytest.approx(0.5, rel=1e-6)
    assert fp32(monitors.sqrt_kl(policy, reference, samples_of="policy", present=present)) == pytest.approx(
        0.5, rel=1e-6
    )
    first = {"present": torch.tensor([True, False, False])}
    assert fp32(monitors.sqrt_kl(policy, reference, **first)) == pytest.approx(math.sqrt(1 - TWO), rel=1e-6)
    assert fp32(monitors.sqrt_kl(policy, reference, samples_of="policy", **first)) == pytest.approx(
        math.sqrt(TWO - 0.5), rel=1e-6
    )
    assert fp32(monitors.sqrt_kl(policy, reference, present=torch.zeros(3, dtype=torch.bool))) == 0
    assert math.isnan(fp32(monitors.sqrt_kl(policy, reference)))
    assert fp32(monitors.sqrt_kl(policy[:0], reference[:0])) == 0


def test_the_distance_is_bounded_where_a_completion_became_likelier():
    reference = torch.zeros(1)
    up, down = torch.tensor([500.0]), torch.tensor([-500.0])
    assert fp32(monitors.sqrt_kl(up, reference)) == pytest.approx(math.sqrt(math.exp(2) - 3), rel=1e-6)
    assert fp32(monitors.sqrt_kl(up, reference, max_log_ratio=1.0)) == pytest.approx(math.sqrt(math.e - 2), rel=1e-6)
    assert fp32(monitors.sqrt_kl(down, reference)) == pytest.approx(math.sqrt(499), rel=1e-6)
    assert fp32(monitors.sqrt_kl(down, reference, samples_of="policy")) == pytest.approx(
        math.sqrt(math.exp(2) - 3), rel=1e-6
    )


@pytest.mark.parametrize("samples_of", ["reference", "policy"])
def test_the_distance_estimates_the_divergence_of_what_was_drawn(samples_of):
    """Two distributions over 3 completions; each completion is there as often as its probability says."""
    p = {"policy": torch.tensor([0.5, 0.3, 0.2]).double(), "reference": torch.tensor([0.3, 0.3, 0.4]).double()}
    drawn = torch.repeat_interleave(torch.arange(3), (p[samples_of] * 10).round().long())
    found = monitors.sqrt_kl(p["policy"].log()[drawn], p["reference"].log()[drawn], samples_of=samples_of)
    other = p["policy" if samples_of == "reference" else "reference"]
    expected = (p[samples_of] * (p[samples_of] / other).log()).sum().sqrt()
    assert fp32(found) == pytest.approx(expected.item(), rel=1e-6)


def test_clip_fractions_by_hand():
    log_ratio = torch.tensor([0.5, 0.9, 1.0, 1.3, 1.5, math.nan]).log()
    bounds = (math.log(0.8), math.log(1.2))
    present = torch.tensor([1, 1, 1, 1, 1, 0]).bool()
    found = monitors.clip_fractions(log_ratio.requires_grad_(), *bounds, present=present)
    assert [fp32(found[f"clip/{side}_frac"]) for side in ("low", "high")] == pytest.approx([0.2, 0.4])
    # below with an advantage above 0, and above without one above 0, the clip takes no gradient away
    found = monitors.clip_fractions(
        log_ratio, *bounds, present=present, advantages=torch.tensor([1.0, -1, -1, 0, 1, 1])
    )
    assert [fp32(found[f"clip/{side}_frac"]) for side in ("low", "high")] == pytest.approx([0, 0.2])
    assert fp32(monitors.clip_fractions(log_ratio, -math.inf, math.log(1.2), present=present)["clip/low_frac"]) == 0


def test_clip_fractions_are_those_of_a_loss_of_tokens():
    generator = torch.Generator().manual_seed(0)
    logprob, old = (-torch.rand(40, generator=generator) for _ in range(2))
    mask, advantages = torch.arange(40) % 5 != 1, torch.tensor([1.0, -1.0, 0.5])
    options = {"mask": mask, "advantages": advantages, "old_logprob": old, "clip_low": 0.2, "clip_high": 0.3}
    metrics = policy_loss(logprob, torch.tensor([0, 13, 27, 40]), objective="grpo", **options).metrics
    of_tokens = advantages.repeat_interleave(torch.tensor([13, 14, 13]))
    found = monitors.clip_fractions(logprob - old, math.log(0.8), math.log(1.3), advantages=of_tokens, present=mask)
    assert 0 < found["clip/low_frac"] < 1
    for name, value in found.items():
        assert torch.equal(value, metrics[name])


# log-ratios of chosen and rejected: sums 3, -4, 1, -0.5 against clips at 2 and at log 0.1 = -2.3
PAIRS = torch.tensor([2.0, -3, 1.5, 0, 1, -1, -0.5, -0.5])


@pytest.mark.parametrize(
    ("importance", "clipped", "floored"),
    [
        (ImportanceWeight(), 1 / 4, 0),
        (ImportanceWeight(floor=0.1, normalize=True), 1 / 4, 1 / 4),
        (ImportanceWeight(floor=0.5, mode="per_completion"), 2 / 4, 1 / 4),
        (ImportanceWeight(floor=0.5, mode="none", power=0.5), 0, 1 / 4),
        (ImportanceWeight(floor=0.5, mode="none", power=0.1), 0, 0),
    ],
)
def test_shares_of_clipped_and_floored_weights(importance, clipped, floored):
    behaviour = torch.linspace(-9, -2, 8)
    found = monitors.importance_fractions((PAIRS + behaviour).requires_grad_(), behaviour, importance)
    assert found.keys() == {"weight/clipped_frac", "weight/floored_frac"}
    assert fp32(found["weight/clipped_frac"]) == clipped
    assert fp32(found["weight/floored_frac"]) == floored


def test_shares_leave_out_a_pair_with_an_empty_completion():
    lengths = torch.tensor([4, 2, 1, 0, 4, 1, 1, 3])
    importance = ImportanceWeight(epsilon=0.4, floor=0.5, length_exponent=1.0)
    # 2/4 + 1/4 = 0.75, -3/2 - 1 = -2.5, 1.5 - 0.5 = 1 of the three that count; clip at 0.8, floor at -0.69
    found = monitors.importance_fractions(PAIRS, torch.zeros(8), importance, lengths=lengths)
    assert fp32(found["weight/clipped_frac"]) == fp32(found["weight/floored_frac"]) == pytest.approx(1 / 3)
    metrics = preference_loss(PAIRS, torch.zeros(8), objective="is_dpo", importance=importance, lengths=lengths).metrics
    assert torch.equal(found["weight/clipped_frac"], metrics["weight/clipped_frac"])
    nothing = monitors.importance_fractions(
        PAIRS, torch.zeros(8), importance, lengths=torch.zeros(8, dtype=torch.int64)
    )
    assert [value.item() for value in nothing.values()] == [0, 0]


def test_effective_sample_size_by_hand():
    """Weights 1, 2, 3 (and 100, which does not count): 36 / 14; whatever the common factor is."""
    weight = torch.tensor([1.0, 2, 3, 100]).double()
    present = torch.tensor([True, True, True, False])
    for shift in (0.0, -2000.0, 2000.0):
        assert fp32(monitors.effective_sample_size(weight.log() + shift, present=present)) == pytest.approx(36 / 14)
    dead = torch.full((3,), -math.inf)
    assert fp32(monitors.effective_sample_size(dead)) == fp32(monitors.effective_sample_size(dead[:0])) == 0
    assert fp32(monitors.effective_sample_size(torch.tensor([[0.0, -math.inf], [0.0, -300.0]]))) == 2
    assert math.isnan(fp32(monitors.effective_sample_size(torch.tensor([0.0, math.nan]))))
    metrics = preference_loss(PAIRS, torch.zeros(8), objective="is_dpo").metrics
    clamped = (PAIRS[:4] + PAIRS[4:]).clamp(max=2)
    assert fp32(monitors.effective_sample_size(clamped)) == pytest.approx(metrics["weight/ess"].item(), rel=1e-6)


def test_nothing_waits_for_a_device():
    """On the meta device there is no number to wait for."""
    with torch.device("meta"):
        x, mask = torch.zeros(8), torch.zeros(8, dtype=torch.bool)
    importance = ImportanceWeight(floor=0.1, length_exponent=0.5)
    found = [
        *monitors.vocabulary_means(VocabStats(top_k_mass=x), mask).values(),
        monitors.sqrt_kl(x, x, present=mask),
        *monitors.clip_fractions(x, -1, 1, advantages=x, present=mask).values(),
        *monitors.importance_fractions(x, x, importance, lengths=x).values(),
        monitors.effective_sample_size(x, present=mask),
    ]
    assert [value.device.type for value in found] == ["meta"] * 7


ONE = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: monitors.vocabulary_means(VocabStats()), "stats: expected at least one statistic, got none"),
        (lambda: monitors.vocabulary_means(VocabStats(lse=ONE), ONE), "scored: expected bool, got torch.float32"),
        (
            lambda: monitors.vocabulary_means(VocabStats(lse=ONE), ONE[:2].bool()),
            r"scored: expected \[4\] on cpu as stats.lse, got \[2\] on cpu",
        ),
        (lambda: monitors.sqrt_kl(ONE, ONE[:3]), r"reference: expected \[4\] on cpu as policy, got \[3\]"),
        (lambda: monitors.sqrt_kl(ONE.long(), ONE), "policy: expected a floating tensor, got torch.int64"),
        (
            lambda: monitors.sqrt_kl(ONE, ONE, samples_of="data"),
            "samples_of: expected one of reference, policy, got 'data'",
        ),
        (
            lambda: monitors.sqrt_kl(ONE, ONE, max_log_ratio=0.0),
            "max_log_ratio: expected a finite number above 0, got 0.0",
        ),
        (lambda: monitors.clip_fractions(ONE, 0.2, 0.2), "low, high: expected low below high, got 0.2 and 0.2"),
        (lambda: monitors.clip_fractions(ONE, -1, 1, advantages=ONE[:1]), r"advantages: expected \[4\] on cpu as log_"),
        (
            lambda: monitors.importance_fractions(ONE[:3], ONE[:3], ImportanceWeight()),
            r"policy: expected \[2P\], chosen then rejected, got \[3\]",
        ),
        (
            lambda: monitors.importance_fractions(ONE, ONE, ImportanceWeight(length_exponent=0.5)),
            r"lengths: expected \[4\] for length_exponent 0.5, got None",
        ),
        (
            lambda: monitors.importance_fractions(ONE, ONE, None),
            "importance: expected an ImportanceWeight, got None",
        ),
        (lambda: monitors.effective_sample_size([0.0]), r"log_weight: expected a floating tensor, got \[0.0\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
