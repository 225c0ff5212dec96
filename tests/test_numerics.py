"""The numerics contract: error against fp64, determinism, independence of the batch, non-finite rows, denormals, 64-bit indices."""

import pytest
import torch

from isdaa_kernels import linear_logprob, linear_logprob_stats, logprob_stats_from_logits
from isdaa_kernels.backends.cpu import extension
from isdaa_kernels.stats import STATS
from isdaa_kernels.testing import (
    assert_error_contract,
    denormal_numbers_in_products,
    dense_logprob,
    dense_stats,
    dense_stats_from_logits,
    make_sample,
    poisoned_empty,
    relative_error,
    row_errors,
)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def _truth_and_dense(sample):
    return (
        sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, bias=b), torch.float64),
        sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, bias=b)),
    )


def _ours(sample, **options):
    return sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets, bias=b, **options))


# sharpness is the standard deviation of the logits: 0.3 a flat softmax, 3 ordinary, 30 targets with p = 1 or p = 0 to all digits.
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_contract_at_every_sharpness(dtype, sharpness):
    sample = make_sample(257, 64, 8000, dtype, sharpness=sharpness)
    truth, dense = _truth_and_dense(sample)
    for name, *tensors in zip(("logprob", "d_hidden", "d_weight"), _ours(sample), dense, truth, strict=True):
        assert_error_contract(name, *tensors)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("V", "dtype"), [(131072, torch.float32), (262144, torch.bfloat16)])
def test_error_contract_at_large_vocabularies(V, dtype, backend):
    sample = make_sample(24, 32, V, dtype, sharpness=4.0)
    truth, dense = _truth_and_dense(sample)
    for name, *tensors in zip(
        ("logprob", "d_hidden", "d_weight"), _ours(sample, backend=backend), dense, truth, strict=True
    ):
        assert_error_contract(name, *tensors)


def test_a_large_common_offset_costs_no_digits():
    sample = make_sample(64, 16, 500, bias=True)
    shifted = make_sample(64, 16, 500, bias=True)
    shifted.bias += 4096.0  # exact in fp32 to 2 ** -11; the softmax is the same
    shifted.bias = (shifted.bias * 4).round() / 4
    sample.bias = shifted.bias - 4096.0
    truth, _ = _truth_and_dense(sample)
    for name, ours, true in zip(("logprob", "d_hidden", "d_weight"), _ours(shifted), truth, strict=False):
        # The sum with the bias rounds each logit to 2 ** -12; the log-sum-exp must add nothing to that.
        assert relative_error(ours, true) < 4e-4, name


def test_confident_targets_keep_the_digits_of_one_minus_p():
    hidden = torch.eye(4).repeat(8, 1)
    weight = torch.zeros(50, 4)
    weight[:4] = torch.eye(4) * 14.0  # p of the target is 1 - 4e-5
    targets = torch.arange(4).repeat(8)
    sample = make_sample(32, 4, 50)
    sample.hidden, sample.weight, sample.targets = hidden, weight, targets
    truth, _ = _truth_and_dense(sample)
    for ours, true in zip(_ours(sample), truth, strict=True):
        assert relative_error(ours, true) < 3e-6


# Few tokens, saturated: the gradient is no more than the difference between the forward's and the backward's logit.
@pytest.mark.parametrize("N", [1, 2, 3, 5, 7, 11, 27, 127])
def test_few_saturated_tokens(N):
    """The backward sees the forward's logits to the bit, so a lone token gets what it gets among 128 others."""
    sample = make_sample(140, 16, 1000, sharpness=30.0, seed=N)
    sample.upstream[N:] = 0
    whole = _ours(sample)
    few = make_sample(140, 16, 1000, sharpness=30.0, seed=N)
    few.hidden, few.targets, few.upstream = few.hidden[:N], few.targets[:N], few.upstream[:N]
    kept = _ours(few, max_workspace_mb=64)  # reads the forward's own logits
    for other in (_ours(few), whole):
        assert torch.equal(other[1][:N], kept[1])
        assert torch.equal(other[2], kept[2])


def test_subnormal_coefficients():
    sample = make_sample(20, 8, 90, torch.float64)
    plain = _ours(sample)
    sample.upstream *= 1e-310
    for ours, base in zip(_ours(sample)[1:], plain[1:], strict=True):
        assert (ours - base * 1e-310).abs().max() <= torch.finfo(torch.float64).smallest_normal


# N = 1 alone, every size up to 300 (the forward tile is 128), a permutation, two workspaces. D odd, and a multiple of 16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("D", [19, 64])
def test_a_token_does_not_see_its_batch(dtype, D):
    sample = make_sample(300, D, 2500, dtype)
    call = lambda rows, **k: linear_logprob(sample.hidden[rows], sample.weight, sample.targets[rows], **k)  # noqa: E731
    whole = call(slice(None))
    for N in (*range(1, 17), 127, 128, 129, 255, 256, 257, 299):
        assert torch.equal(call(slice(0, N)), whole[:N])
    for i in range(0, 300, 23):
        assert torch.equal(call(slice(i, i + 1)), whole[i : i + 1])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(order), whole[order])
    hidden = sample.hidden.clone().requires_grad_()
    for workspace in (4.0 if dtype != torch.float64 else 8.0, 200.0):
        kept = linear_logprob(hidden, sample.weight, sample.targets, max_workspace_mb=workspace)
        assert torch.equal(kept, whole)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bit_equal(backend, dtype):
    sample = make_sample(700, 48, 5000, dtype, ignored=0.3)
    for a, b in zip(_ours(sample, backend=backend), _ours(sample, backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["hidden", "upstream", "ignored hidden"])
def test_a_non_finite_row_stays_in_its_row(backend, bad, where):
    sample = make_sample(140, 8, 300)
    clean = _ours(sample, backend=backend)
    if where == "upstream":
        sample.upstream[5] = bad
    else:
        sample.hidden[5, 3] = bad
    if where == "ignored hidden":
        sample.targets[5] = -100
    value, d_hidden, d_weight = _ours(sample, backend=backend)
    others = torch.arange(140) != 5
    assert torch.equal(value[others], clean[0][others])
    assert relative_error(d_hidden[others], clean[1][others]) < 1e-6
    if where == "ignored hidden":
        assert value[5] == 0
        assert (d_hidden[5] == 0).all()
        assert d_weight.isfinite().all()
    else:
        assert not d_hidden[5].isfinite().all()
        assert not d_weight.isfinite().all()
        assert value[5].isfinite() == (where == "upstream")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_vocabulary_rows(backend):
    sample = make_sample(20, 8, 2100, bias=True)
    sample.bias[100:] = float("-inf")  # padding rows of a head: whole tiles without probability
    sample.targets %= 100
    small = make_sample(20, 8, 2100, bias=True)
    small.weight, small.bias, small.targets = small.weight[:100], small.bias[:100], sample.targets
    truth, ours = _truth_and_dense(small)[0], _ours(sample, backend=backend)
    assert relative_error(ours[0], truth[0]) < 1e-6
    assert relative_error(ours[1], truth[1]) < 1e-6
    assert relative_error(ours[2][:100], truth[2]) < 1e-6
    assert (ours[2][100:] == 0).all()
    impossible = make_sample(20, 8, 2100, bias=True)
    impossible.bias[100:] = float("-inf")
    impossible.targets[:] = 2000
    assert (
        linear_logprob(impossible.hidden, impossible.weight, impossible.targets, bias=impossible.bias, backend=backend)
        == float("-inf")
    ).all()


# 2 ** -100 is 8e-31, the coefficient of a saturated pair; the smallest normal fp32 number is 1.2e-38.
@pytest.mark.parametrize("power", [-100, -60, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_scale_exactly_with_the_coefficients(power, dtype):
    sample = make_sample(300, 32, 3000, dtype)
    plain = _ours(sample)
    sample.upstream *= 2.0**power
    for ours, base in zip(_ours(sample)[1:], plain[1:], strict=True):
        expected = base.double() * 2.0**power
        tiny = torch.finfo(dtype).smallest_normal
        seen = expected.abs() >= tiny
        assert torch.equal(ours.double()[seen], expected[seen])
        assert ours.double()[~seen].abs().max() <= tiny if (~seen).any() else True


def test_mixed_magnitudes_keep_each_tokens_direction():
    sample = make_sample(256, 32, 3000)
    sample.upstream = torch.randn(256) * 10.0 ** torch.linspace(-33, 3, 256)
    truth, _ = _truth_and_dense(sample)
    _, d_hidden, d_weight = _ours(sample)
    assert row_errors(d_hidden, truth[1]).max() < 3e-6
    assert relative_error(d_weight, truth[2]) < 1e-6


def test_tiny_coefficients_do_not_slow_the_backward_down():
    """No clock: no product of the library sees a denormal number, neither as a factor nor as a result."""
    sample = make_sample(200, 32, 3000, sharpness=12.0)
    sample.upstream = torch.cat([torch.full((100,), 1e-30), torch.full((100,), 1e-3)])
    with denormal_numbers_in_products() as seen:
        _ours(sample)
    assert len(seen) > 6
    assert not any(seen)


@pytest.mark.slow
def test_more_than_2_to_31_logits():
    N, D, V = 8400, 16, 262144
    assert N * V > 2**31
    sample = make_sample(N, D, V)
    value, d_hidden, d_weight = _ours(sample)
    rows = torch.cat([torch.arange(8), torch.arange(N - 8, N)])
    part = make_sample(N, D, V)
    part.hidden, part.targets, part.upstream = part.hidden[rows], part.targets[rows], part.upstream[rows]
    truth, _ = _truth_and_dense(part)
    assert relative_error(value[rows], truth[0]) < 1e-6
    assert relative_error(d_hidden[rows], truth[1]) < 3e-6
    # The gradient of z sums to 0 over the vocabulary, and so do the rows of d_weight.
    assert (d_weight.double().sum(0).abs() < 1e-4 * d_weight.double().abs().sum(0)).all()


def _check_statistics(sample, head):
    """Values and gradients of all, and the log-probs of the plain call to the bit."""
    plain = linear_logprob(sample.hidden, sample.weight, sample.targets, bias=sample.bias, **head)
    ours = lambda h, w, b: linear_logprob_stats(h, w, sample.targets, bias=b, stats=STATS, **head)  # noqa: E731
    true = lambda h, w, b: dense_stats(h, w, sample.targets, bias=b, **head)  # noqa: E731
    logprob, stats = ours(sample.hidden, sample.weight, sample.bias)
    _, truth = true(*(x.double() for x in (sample.hidden, sample.weight, sample.bias)))
    assert torch.equal(logprob, plain)
    for name in STATS:
        assert relative_error(getattr(stats, name), getattr(truth, name)) < 2e-6, name
    whole = lambda result: result[0] + result[1].entropy - result[1].lse + 5 * result[1].mean_logit  # noqa: E731
    for a, b in zip(sample.grads(lambda h, w, b: whole(ours(h, w, b))),
                    sample.grads(lambda h, w, b: whole(true(h, w, b)), torch.float64), strict=True):  # fmt: skip
        assert relative_error(a, b) < 2e-6
    logits = sample.hidden @ sample.weight.T
    _, from_logits = logprob_stats_from_logits(logits, sample.targets, stats=STATS)
    _, truth = dense_stats_from_logits(logits.double(), sample.targets)
    for name in STATS:
        assert relative_error(getattr(from_logits, name), getattr(truth, name)) < 2e-6, name


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.5, "softcap": 4.0, "temperature": 0.8}])
def test_every_instruction_set(name, head):
    """Those that this processor has; one that it lacks refuses by name."""
    best = extension.native.instruction_set()
    try:
        extension.native.use_instruction_set(name)
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
        assert extension.native.instruction_set() == best
        return
    try:
        assert extension.native.instruction_set() == name
        sample = make_sample(130, 16, 2077, bias=True)
        truth = sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, bias=b, **head), torch.float64)
        for ours, true in zip(_ours(sample, **head), truth, strict=True):
            assert relative_error(ours, true) < 1e-6
        _check_statistics(sample, head)
    finally:
        extension.native.use_instruction_set(best)
