"""A frozen head: the forward prepares d_hidden, 2 units of work in all, as exact as the other way."""

import pytest
import torch

from isdaa_kernels import linear_logprob, linear_logprob_stats
from isdaa_kernels.stats import STATS
from isdaa_kernels.testing import FlopCounter, dense_logprob, make_sample, poisoned_empty, relative_error


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def d_hidden(sample, call, upstream=None):
    hidden = sample.hidden.detach().clone().requires_grad_()
    value = call(hidden)
    value.backward(sample.upstream if upstream is None else upstream)
    return value.detach(), hidden.grad


def ours(sample, upstream=None, **options):
    options = {"backend": "cpu", "bias": sample.bias, **options}
    return d_hidden(sample, lambda h: linear_logprob(h, sample.weight, sample.targets, **options), upstream)


def recomputed(sample, upstream=None, **options):
    """The other way: the head's gradient is wanted too."""
    weight = sample.weight.detach().requires_grad_()
    call = lambda h: linear_logprob(h, weight, sample.targets, backend="cpu", bias=sample.bias, **options)  # noqa: E731
    return d_hidden(sample, call, upstream)


def dense(sample, **options):
    """In fp64."""
    wide = lambda x: None if x is None else x.double()  # noqa: E731
    head = {"bias": wide(sample.bias), **options}
    hidden = sample.hidden.double().requires_grad_()
    value = dense_logprob(hidden, sample.weight.double(), sample.targets, **head)
    value.backward(sample.upstream.double())
    return value.detach(), hidden.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [{}, {"logit_scale": -0.5, "temperature": 0.7}, {"temperature": "per token"}])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_dense_pytorchs(dtype, head, bias):
    sample = make_sample(601, 24, 2777, dtype, bias=bias, ignored=0.3)
    if head.get("temperature") == "per token":
        head = {"temperature": torch.linspace(0.5, 2.0, 601)}
    value, grad = ours(sample, **head)
    expected_value, expected = dense(sample, **head)
    bar = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert grad.dtype == dtype
    assert relative_error(value, expected_value) < min(bar, 2e-6)
    assert relative_error(grad, expected) < bar
    assert (grad[sample.targets == -100] == 0).all()


def test_two_units_of_work():
    sample = make_sample(512, 16, 4096)
    with FlopCounter() as counter:
        ours(sample)
    assert counter.flop == 2 * 2 * 512 * 16 * 4096
    with FlopCounter() as small:  # no room: the logits are recomputed
        ours(make_sample(2048, 2048, 600), max_workspace_mb=19)
    assert small.flop > 2.1 * 2 * 2048 * 2048 * 600


@pytest.mark.parametrize("gap", [20.0, 200.0])
def test_confident_targets_keep_the_digits_of_one_minus_p(gap):
    """The mean leaves the target out, so that 1 - p is not the difference of two numbers near 1."""
    sample = make_sample(40, 8, 300)
    sample.weight[:, 0] = 0
    sample.hidden[:, 0] = 1
    sample.targets[:] = 7
    sample.weight[7, 0] = gap
    _, grad = ours(sample)
    _, expected = dense(sample)
    if gap == 20:
        for row, wanted in zip(grad, expected, strict=True):
            assert relative_error(row, wanted) < 1e-5
    else:
        assert (grad.abs() < 1e-30).all()


def test_a_running_maximum_that_grows_with_every_tile():
    sample = make_sample(130, 8, 9000, sharpness=0.5)
    sample.weight[:, 0] = torch.linspace(-60, 60, 9000)
    sample.hidden[:, 0] = torch.linspace(-1, 1, 130)
    expected = dense(sample)[1]
    assert relative_error(ours(sample)[1], expected) < 1.2 * relative_error(recomputed(sample)[1], expected) < 1e-5


def test_the_gradient_of_lse_and_of_both():
    sample = make_sample(60, 16, 2777, torch.float64, ignored=0.2)

    def value(h, weight, wanted):
        logprob, stats = linear_logprob_stats(h, weight, sample.targets, stats=("lse", "is_top1"), backend="cpu")
        return {"lse": stats.lse, "both": logprob - 0.3 * stats.lse}[wanted]

    for wanted in ("lse", "both"):
        _, grad = d_hidden(sample, lambda h, w=wanted: value(h, sample.weight, w))
        _, expected = d_hidden(sample, lambda h, w=wanted: value(h, sample.weight.clone().requires_grad_(), w))
        assert relative_error(grad, expected) < 1e-13


@pytest.mark.parametrize("power", [-100, 60])
def test_coefficients_of_any_size(power):
    sample = make_sample(60, 16, 2777)
    _, plain = ours(sample)
    _, scaled = ours(sample, sample.upstream * 2.0**power)
    assert torch.equal(scaled, plain * 2.0**power)


@pytest.mark.parametrize("where", ["upstream", "hidden"])
def test_a_non_finite_number_stays_in_its_row(where):
    sample = make_sample(60, 16, 2777)
    _, before = ours(sample)
    if where == "upstream":
        sample.upstream[7] = float("inf")
    else:
        sample.hidden[7, 3] = float("nan")
    _, grad = ours(sample)
    others = torch.arange(60) != 7
    assert torch.equal(grad[others], before[others])
    assert not grad[7].isfinite().all()


def test_masked_rows_strides_and_fewer_scored_than_promised():
    sample = make_sample(300, 16, 2777, bias=True, ignored=0.5)
    sample.bias[:2048] = float("-inf")  # the whole first tile
    sample.targets[sample.targets >= 0] = 2500
    strided = torch.randn(16, 600).T[::2]
    strided.copy_(sample.hidden)
    leaf = strided.detach().requires_grad_()
    linear_logprob(leaf, sample.weight.T.contiguous().T, sample.targets, bias=sample.bias, max_scored=290).backward(
        sample.upstream
    )
    _, expected = dense(sample)
    assert relative_error(leaf.grad, expected) < 2e-6


def test_softcap_and_entropy_take_the_other_way():
    sample = make_sample(60, 16, 2777)
    _, grad = ours(sample, softcap=3.0)
    assert torch.equal(grad, recomputed(sample, softcap=3.0)[1])
    leaf = sample.hidden.clone().requires_grad_()
    logprob, stats = linear_logprob_stats(leaf, sample.weight, sample.targets, stats=("entropy",), backend="cpu")
    (logprob + stats.entropy).backward(sample.upstream)
    other = sample.hidden.clone().requires_grad_()
    weight = sample.weight.clone().requires_grad_()
    logprob, stats = linear_logprob_stats(other, weight, sample.targets, stats=("entropy",), backend="cpu")
    (logprob + stats.entropy).backward(sample.upstream)
    assert torch.equal(leaf.grad, other.grad)


def test_beside_detached_statistics():
    """Values, gradient and work of the call without them: entropy and mean logit do not bar the way if they have no gradient."""
    sample = make_sample(512, 16, 4096, bias=True, ignored=0.2)
    value, grad = ours(sample)
    seen = []

    def call(h):
        options = {"stats": STATS, "detached": ("entropy", "mean_logit"), "bias": sample.bias, "backend": "cpu"}
        logprob, stats = linear_logprob_stats(h, sample.weight, sample.targets, **options)
        return seen.append(stats) or logprob

    with FlopCounter() as counter:
        found, found_grad = d_hidden(sample, call)
    assert counter.flop == 2 * 2 * int((sample.targets >= 0).sum()) * 16 * 4096
    assert torch.equal(found, value)
    assert torch.equal(found_grad, grad)
    expected = linear_logprob_stats(
        sample.hidden, sample.weight, sample.targets, stats=STATS, bias=sample.bias, backend="cpu"
    )[1]
    for name in STATS:
        assert torch.equal(getattr(seen[0], name), getattr(expected, name)), name
        assert getattr(seen[0], name).requires_grad == (name == "lse")


def test_nothing_to_score():
    for sample in (make_sample(0, 16, 300), make_sample(5, 16, 300, ignored=2.0)):
        value, grad = ours(sample)
        assert (value == 0).all()
        assert (grad == 0).all()
