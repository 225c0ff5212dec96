"""Statistics of the vocabulary, values and gradients, on each backend, against fp64 autograd over dense logits."""

import math
from functools import lru_cache

import pytest
import torch

from isdaa_kernels import (
    linear_logprob,
    linear_logprob_stats,
    logprob_from_logits,
    logprob_stats_from_logits,
    plan,
)
from isdaa_kernels.dispatch import Problem, refusal
from isdaa_kernels.stats import DIFFERENTIABLE, STATS, StatsRequest, TokenGradient, VocabStats, check_stats
from isdaa_kernels.testing import (
    FlopCounter,
    Sample,
    assert_error_contract,
    denormal_numbers_in_products,
    dense_stats,
    make_sample,
    poisoned_empty,
    relative_error,
    row_errors,
)

CPU_PROBLEM = Problem("cpu", torch.float32, torch.float32, 1, 1, 1)
BACKENDS = ["cpu", "reference"]  # those of the CPU; tests/test_device.py has the cases for all
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "temperature": {"temperature": 0.7},
    "all": {"logit_scale": -1.5, "softcap": 6.0, "temperature": 1.3},
}
NAMES = ("logprob", *DIFFERENTIABLE)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def test_both_backends_are_here():
    assert [refusal(name, CPU_PROBLEM) for name in BACKENDS] == [None, None]


def numbers(result: tuple[torch.Tensor, VocabStats]) -> dict[str, torch.Tensor]:
    return {"logprob": result[0], **{k: v for k, v in vars(result[1]).items() if v is not None}}


def mixed(result, names=NAMES) -> torch.Tensor:
    """One number a token with a different coefficient for each of `names`, so that one backward carries them all."""
    values, random = numbers(result), torch.Generator().manual_seed(7)
    coefficients = {name: torch.randn(values["logprob"].shape, generator=random) for name in NAMES}
    return sum(values[name] * coefficients[name].to(values[name]) for name in names)


def values_of(sample: Sample, function, dtype=None) -> dict[str, torch.Tensor]:
    cast = lambda x: x if x is None or dtype is None else x.to(dtype)  # noqa: E731
    return numbers(function(cast(sample.hidden), cast(sample.weight), cast(sample.bias)))


@lru_cache(maxsize=1)
def shared_sample(*sizes, **options) -> Sample:
    """For tests that go through the backends one after the other: the same problem for each, so that one truth serves them."""
    return make_sample(*sizes, **options)


_known: dict[str, tuple] = {}


def dense_results(sample: Sample, key: tuple, make) -> tuple:
    """`make()`, or what it was for the call before if that had the same sample and key."""
    if "call" not in _known or _known["call"][0] is not sample or _known["call"][1] != key:
        _known["call"] = (sample, key, make())
    return _known["call"][2]


def compare(sample: Sample, backend, names=NAMES, truth_head=None, floor=2e-7, **head) -> None:
    """Values of all statistics and the gradients of `names` together, by the error contract."""
    ours = lambda h, w, b: linear_logprob_stats(h, w, sample.targets, stats=STATS, bias=b, backend=backend, **head)  # noqa: E731
    dense = lambda h, w, b: dense_stats(h, w, sample.targets, bias=b, **head)  # noqa: E731
    true = lambda h, w, b: dense_stats(h, w, sample.targets, bias=b, **(truth_head or head))  # noqa: E731
    value = values_of(sample, ours)

    def make():
        grads = sample.grads(lambda h, w, b: mixed(dense(h, w, b), names))[1:]
        true_grads = sample.grads(lambda h, w, b: mixed(true(h, w, b), names), torch.float64)[1:]
        return values_of(sample, dense), values_of(sample, true, torch.float64), grads, true_grads

    contender, truth, *expected = dense_results(sample, (names, repr(head)), make)
    assert set(value) == {"logprob", *STATS}
    compute = torch.promote_types(torch.promote_types(sample.hidden.dtype, sample.weight.dtype), torch.float32)
    for name in value:
        assert value[name].dtype == (torch.bool if name == "is_top1" else compute)
        if name == "is_top1":  # two logits may be one apart by rounding
            assert (value[name] != truth[name]).sum() <= (contender[name] != truth[name]).sum() + 1
        else:
            assert_error_contract(name, value[name], contender[name], truth[name], floor)
    grads = sample.grads(lambda h, w, b: mixed(ours(h, w, b), names))[1:]
    for name, *tensors in zip(("d_hidden", "d_weight", "d_bias"), grads, *expected, strict=False):
        assert_error_contract(name, *tensors, floor)


# N: 1, below and above the forward tile of 128 and the backward tile of 512. V: below top_k and one vector of any instruction set, ragged,
# one whole tile, two tiles and a ragged third. D: odd, 1, a multiple of 16.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "D", "V"), [(1, 7, 3), (129, 1, 53), (200, 16, 2048), (600, 33, 4499)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(backend, dtype, N, D, V):
    compare(shared_sample(N, D, V, DTYPES[dtype], bias=True, ignored=0.3 if N > 1 else 0.0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_head_transforms(backend, dtype, head):
    compare(shared_sample(150, 24, 2100, DTYPES[dtype], bias=True, ignored=0.2), backend, **HEADS[head])


# sharpness is the standard deviation of the logits: 0.3 a flat softmax (the entropy's gradient is a small difference), 3 ordinary,
# 30 distributions of one row.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("names", [("entropy",), ("lse",), ("mean_logit",), NAMES], ids=" ".join)
def test_each_alone_and_all_together_at_every_sharpness(backend, names, sharpness):
    compare(shared_sample(257, 64, 8000, sharpness=sharpness), backend, names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_of_each_token(backend):
    temperature = torch.rand(70, generator=torch.Generator().manual_seed(0)) + 0.5
    compare(
        make_sample(70, 8, 300, ignored=0.2, bias=True),
        backend,
        temperature=temperature,
        truth_head={"temperature": temperature.double()},
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.8, "softcap": 3.0}])
def test_gradcheck(backend, head):
    sample = make_sample(9, 4, 11, torch.float64, bias=True, ignored=0.3)
    leaves = [x.requires_grad_() for x in (sample.hidden, sample.weight, sample.bias)]
    temperature = torch.rand(9, dtype=torch.float64) + 0.5
    for max_workspace_mb in (None, 1.0):

        def call(h, w, b, mb=max_workspace_mb):
            result = linear_logprob_stats(
                h, w, sample.targets, bias=b, stats=DIFFERENTIABLE, temperature=temperature, backend=backend,
                max_workspace_mb=mb, **head
            )  # fmt: skip
            return tuple(numbers(result).values())

        assert torch.autograd.gradcheck(call, leaves)


def logits_sample(rows, targets, dtype=torch.float32) -> Sample:
    """A sample whose product is the given logits [N, V] to the bit: the hidden states pick columns of the weight."""
    logits = torch.tensor(rows, dtype=dtype)
    eye = torch.eye(len(rows), dtype=dtype)
    return Sample(eye, logits.T.contiguous(), torch.tensor(targets), torch.ones(len(rows)))


def stats_of(sample, backend, stats=STATS, **options):
    return linear_logprob_stats(sample.hidden, sample.weight, sample.targets, stats=stats, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_by_hand(backend, dtype):
    """p = (1/8, 1/8, 1/4, 1/2): entropy 2 * 3/8 + 2/4 + 1/2 bits; two largest 1/4 and 1/2."""
    sample = logits_sample([[0.0, 0.0, math.log(2), math.log(4)]], [2], dtype)
    logprob, stats = stats_of(sample, backend, top_k=2)
    expected = {
        "entropy": 1.75 * math.log(2),
        "lse": math.log(8),
        "mean_logit": 0.75 * math.log(2),
        "log_sum_sq_prob": math.log(1 / 64 + 1 / 64 + 1 / 16 + 1 / 4),
        "top_k_mass": 0.75,
        "top_k_entropy": (0.5 + 0.5) * math.log(2),
    }
    assert logprob.item() == pytest.approx(-2 * math.log(2), rel=1e-6)
    assert stats.is_top1.tolist() == [False]
    for name, value in expected.items():
        assert getattr(stats, name).item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_worked_by_hand(backend):
    """p = (1/4, 3/4): d entropy / d z_0 = -p_0 (log p_0 + H) = -p_0 p_1 log(p_0 / p_1); d lse = p; d mean = 1 / V."""
    expected = {"entropy": 3 / 16 * math.log(3), "lse": 0.25, "mean_logit": 0.5}
    for name, value in expected.items():
        sample = logits_sample([[0.0, math.log(3)]], [1])
        sample.weight.requires_grad_()
        getattr(stats_of(sample, backend, (name,))[1], name).backward()
        other = -value if name == "entropy" else 1 - value
        assert sample.weight.grad[:, 0].tolist() == pytest.approx([value, other], rel=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [0.0, 50.0, -3000.0])
def test_uniform_logits(backend, level):
    V = 3001
    sample = make_sample(40, 8, V, bias=True)
    sample.weight = torch.zeros(V, 8, requires_grad=True)
    bias = torch.full((V,), level, requires_grad=True)
    _, stats = stats_of(sample, backend, bias=bias, top_k=7)
    for value, true in ((stats.entropy, math.log(V)), (stats.log_sum_sq_prob, -math.log(V)), (stats.mean_logit, level),
                        (stats.lse, level + math.log(V)), (stats.top_k_mass, 7 / V),
                        (stats.top_k_entropy, 7 / V * math.log(V))):  # fmt: skip
        assert value.tolist() == pytest.approx([true] * 40, rel=3e-7, abs=1e-30)
    assert stats.is_top1.all()  # every row holds the largest logit
    stats.entropy.sum().backward()
    assert bias.grad.abs().max() < 40 / V * 2e-6  # of a gradient whose terms are log V / V


# The top row is 5, 15, 30 or 80 above 2999 equal ones: from an entropy of 3 down to 1e-29, which keeps its digits in fp32.
@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0, 80.0])
@pytest.mark.parametrize("offset", [0.0, 1024.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_distributions_keep_relative_digits(backend, gap, offset):
    V = 3000
    row = [offset] * V
    row[1234] = offset + gap
    sample = logits_sample([row], [1234])
    sample.weight.requires_grad_()
    logprob, stats = stats_of(sample, backend, top_k=3)
    rest = (V - 1) * math.exp(-gap)  # odds against the top row
    entropy = math.log1p(rest) + gap * rest / (1 + rest)
    pairs = {
        "logprob": (logprob, -math.log1p(rest)),
        "entropy": (stats.entropy, entropy),
        "log_sum_sq_prob": (stats.log_sum_sq_prob, math.log1p(rest * math.exp(-gap)) - 2 * math.log1p(rest)),
    }
    for name, (value, true) in pairs.items():
        assert value.item() == pytest.approx(true, rel=3e-6, abs=1e-15), name
    others = 2 * math.exp(-gap) / (1 + rest) * (gap + math.log1p(rest))
    assert stats.top_k_entropy.item() == pytest.approx(math.log1p(rest) / (1 + rest) + others, rel=3e-6, abs=1e-15)
    stats.entropy.backward()
    p_top, p = 1 / (1 + rest), math.exp(-gap) / (1 + rest)
    assert sample.weight.grad[1234, 0].item() == pytest.approx(
        p_top * (math.log1p(rest) - entropy), rel=1e-5, abs=1e-15
    )
    assert sample.weight.grad[0, 0].item() == pytest.approx(p * (gap + math.log1p(rest) - entropy), rel=1e-5, abs=1e-20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_vocabulary_rows(backend, softcap):
    sample = make_sample(20, 8, 4200, bias=True)
    sample.bias[100:4150] = float("-inf")  # whole tiles without probability, between others
    sample.targets %= 100
    kept = torch.cat([torch.arange(100), torch.arange(4150, 4200)])
    small = Sample(sample.hidden, sample.weight[kept], sample.targets, sample.upstream, sample.bias[kept])
    if softcap is not None:  # a capped -inf is a logit of -softcap, not a mask
        compare(sample, backend, softcap=softcap)
        return
    names = ("logprob", "entropy", "lse")
    ours = lambda h, w, b: linear_logprob_stats(h, w, sample.targets, stats=STATS, bias=b, backend=backend)  # noqa: E731
    true = lambda h, w, b: dense_stats(h, w, sample.targets, bias=b)  # noqa: E731
    value, truth = values_of(sample, ours), values_of(small, true, torch.float64)
    assert (value.pop("mean_logit") == float("-inf")).all()
    assert torch.equal(value.pop("is_top1"), truth["is_top1"])
    for name in value:
        assert relative_error(value[name], truth[name]) < 1e-6, name
    grads = sample.grads(lambda h, w, b: mixed(ours(h, w, b), names))
    small_grads = small.grads(lambda h, w, b: mixed(true(h, w, b), names), torch.float64)
    assert relative_error(grads[1], small_grads[1]) < 1e-6
    for mine, theirs in zip(grads[2:], small_grads[2:], strict=True):
        assert relative_error(mine[kept], theirs) < 1e-6
        assert (mine[100:4150] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_for_the_first_place(backend):
    rows = [[1.0, 2.0, 2.0, -1.0], [1.0, 2.0, 2.0, -1.0], [1.0, 2.0, 2.0, -1.0], [3.0, 3.0, 3.0, 3.0]]
    _, stats = stats_of(logits_sample(rows, [1, 2, 0, 3]), backend)
    assert stats.is_top1.tolist() == [True, True, False, True]


# k below and above V, 1 and the largest; V below a vector, ragged, and several tiles with a ragged last. Ascending logits displace the
# whole list at every element, descending ones never; "ties" has few distinct values.
@pytest.mark.parametrize("k", [1, 2, 20, 64])
@pytest.mark.parametrize("V", [3, 61, 4500])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "ties"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_top_k(backend, order, V, k):
    logits = torch.randn(9, V, generator=torch.Generator().manual_seed(V + k))
    if order in ("ascending", "descending"):
        logits = logits.sort(dim=1, descending=order == "descending").values
    elif order == "ties":
        logits = logits.round()
    sample = logits_sample(logits.tolist(), [0] * 9)
    _, stats = stats_of(sample, backend, ("top_k_mass", "top_k_entropy", "entropy"), top_k=k)
    p = logits.double().softmax(-1).sort(dim=1, descending=True).values[:, :k]
    assert stats.top_k_mass.tolist() == pytest.approx(p.sum(1).tolist(), rel=1e-6)
    assert stats.top_k_entropy.tolist() == pytest.approx(torch.special.entr(p).sum(1).tolist(), rel=1e-6)
    if k >= V:
        assert stats.top_k_mass.tolist() == pytest.approx([1.0] * 9, rel=1e-6)
        assert stats.top_k_entropy.tolist() == pytest.approx(stats.entropy.tolist(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_probs_do_not_depend_on_the_statistics(backend, dtype):
    sample = make_sample(200, 24, 4500, DTYPES[dtype], bias=True, ignored=0.2)
    call = lambda stats: linear_logprob_stats(  # noqa: E731
        sample.hidden, sample.weight, sample.targets, bias=sample.bias, stats=stats, backend=backend
    )
    plain = linear_logprob(sample.hidden, sample.weight, sample.targets, bias=sample.bias, backend=backend)
    everything = numbers(call(STATS))
    assert torch.equal(everything["logprob"], plain)
    for pair in (*((name,) for name in STATS), ("lse", "entropy"), ("mean_logit", "log_sum_sq_prob", "top_k_mass")):
        some = numbers(call(pair))
        assert set(some) == {"logprob", *pair}
        for name, value in some.items():  # nor do the statistics on each other
            assert torch.equal(value, everything[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_equal(backend):
    sample = make_sample(700, 48, 5000, ignored=0.3, bias=True)
    call = lambda h, w, b: mixed(linear_logprob_stats(h, w, sample.targets, stats=STATS, bias=b, backend=backend))  # noqa: E731
    for a, b in zip(sample.grads(call), sample.grads(call), strict=True):
        assert torch.equal(a, b)
    values = [numbers(stats_of(sample, backend)) for _ in range(2)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_does_not_see_its_batch(dtype):
    sample = make_sample(300, 19, 2500, dtype)
    call = lambda rows, **k: numbers(  # noqa: E731
        linear_logprob_stats(sample.hidden[rows], sample.weight, sample.targets[rows], stats=STATS, **k)
    )
    whole = call(slice(None))
    parts = [slice(0, N) for N in (1, 2, 15, 16, 127, 128, 129, 257)] + [slice(i, i + 1) for i in (7, 140, 299)]
    for rows in (*parts, torch.randperm(300, generator=torch.Generator().manual_seed(0))):
        for name, value in call(rows).items():
            assert torch.equal(value, whole[name][rows]), name
    sample.hidden.requires_grad_()
    for workspace in (4.0 if dtype != torch.float64 else 8.0, 200.0):
        for name, value in call(slice(None), max_workspace_mb=workspace).items():
            assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants", ["hidden", "weight", "bias", "hidden weight"])
def test_partial_requires_grad(backend, wants):
    sample = make_sample(50, 8, 200, torch.bfloat16, bias=True, ignored=0.2)
    options = {"stats": DIFFERENTIABLE, "backend": backend}
    call = lambda h, w, b: mixed(linear_logprob_stats(h, w, sample.targets, bias=b, **options))  # noqa: E731
    whole = dict(zip(("value", "hidden", "weight", "bias"), sample.grads(call), strict=True))
    leaves = {n: getattr(sample, n).detach().requires_grad_(n in wants.split()) for n in ("hidden", "weight", "bias")}
    call(*leaves.values()).backward(sample.upstream)
    for name, leaf in leaves.items():
        if name in wants.split():
            assert torch.equal(leaf.grad, whole[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_a_gradient(backend):
    sample = make_sample(20, 8, 90)
    sample.hidden.requires_grad_()
    _, stats = stats_of(sample, backend)
    assert {name for name in STATS if getattr(stats, name).requires_grad} == set(DIFFERENTIABLE)
    _, fixed = stats_of(sample, backend, ("is_top1", "top_k_mass"))
    assert not fixed.top_k_mass.requires_grad
    assert fixed.entropy is None
    with torch.no_grad():
        assert not stats_of(sample, backend)[1].entropy.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_returned_may_be_written_to(backend):
    sample = make_sample(30, 8, 90)
    call = lambda h, w, b: linear_logprob_stats(h, w, sample.targets, backend=backend)  # noqa: E731

    def in_place(h, w, b):
        logprob, stats = call(h, w, b)
        return logprob.mul_(2).add_(stats.entropy.mul_(3))

    def out_of_place(h, w, b):
        logprob, stats = call(h, w, b)
        return logprob * 2 + stats.entropy * 3

    for a, b in zip(sample.grads(in_place), sample.grads(out_of_place), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_and_leading_shapes(backend):
    sample = make_sample(24, 6, 40, ignored=0.4)
    hidden, targets = sample.hidden.view(2, 3, 4, 6), sample.targets.view(2, 3, 4)
    logprob, stats = linear_logprob_stats(hidden, sample.weight, targets, stats=STATS, backend=backend)
    flat = numbers(stats_of(sample, backend))
    assert logprob.shape == targets.shape
    for name in STATS:
        value = getattr(stats, name)
        assert value.shape == targets.shape
        assert torch.equal(value.flatten(), flat[name])
        assert (value[targets == -100] == 0).all()
    for nothing in (make_sample(0, 5, 7), make_sample(6, 5, 7, ignored=2.0)):
        hidden = nothing.hidden.requires_grad_()
        logprob, stats = stats_of(nothing, backend)
        (logprob + stats.entropy + stats.mean_logit).sum().backward()
        assert all((value == 0).all() for value in (logprob, stats.entropy, stats.is_top1, hidden.grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_strides(backend):
    sample = make_sample(60, 12, 500, bias=True)
    hidden, bias = sample.hidden.bfloat16(), sample.bias.half()
    weight = sample.weight.T.contiguous().T.requires_grad_()
    result = linear_logprob_stats(hidden, weight, sample.targets.int(), stats=STATS, bias=bias, backend=backend)
    mixed(result).backward(sample.upstream)
    sample.hidden, sample.bias = hidden.float(), bias.float()
    true = lambda h, w, b: mixed(dense_stats(h, w, sample.targets, bias=b))  # noqa: E731
    assert weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, sample.grads(true, torch.float64)[2]) < 1e-6


# Keeping all, some or none of the logits; two passes over them where a 16-bit d_hidden has no room for its fp32 sum.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_workspace_gives_the_same(backend, dtype):
    sample = make_sample(700, 16, 3000, DTYPES[dtype], bias=True, ignored=0.2)
    call = lambda h, w, b, mb=None: mixed(  # noqa: E731
        linear_logprob_stats(h, w, sample.targets, stats=STATS, bias=b, max_workspace_mb=mb, backend=backend)
    )
    plain = sample.grads(call)
    for workspace in (9.5, 11.0, 64.0):
        for a, b in zip(sample.grads(lambda h, w, b, mb=workspace: call(h, w, b, mb)), plain, strict=True):
            assert relative_error(a, b) < (1e-6 if dtype == "fp32" else 2e-3)


# Matrix work in units of 2 N V D: statistics add none, whether the log-prob is used beside them or not.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [NAMES, ("entropy",), ("logprob",)], ids=" ".join)
def test_matrix_work(backend, names):
    N, D, V = 1280, 8, 5000
    sample = make_sample(N, D, V)
    with FlopCounter() as counter:
        sample.grads(
            lambda h, w, b: mixed(linear_logprob_stats(h, w, sample.targets, stats=STATS, backend=backend), names)
        )
    assert counter.flop / (2 * N * D * V) == pytest.approx(4.0, rel=0.02)
    with FlopCounter() as counter, torch.no_grad():
        stats_of(sample, backend)
    assert counter.flop == 2 * N * D * V


def _with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone().requires_grad_()


def _of_hidden(sample: Sample, backend):
    """(call, what is saved and returned by it, its leaves) of statistics from hidden states."""
    leaves = _with_gradient(sample.hidden), _with_gradient(sample.weight), _with_gradient(sample.bias)
    hidden, weight, bias = leaves
    plain = lambda: linear_logprob(hidden, weight, sample.targets, bias=bias, backend=backend)  # noqa: E731
    stats = lambda **o: linear_logprob_stats(hidden, weight, sample.targets, bias=bias, backend=backend, **o)  # noqa: E731
    return leaves, plain, stats


def _of_logits(sample: Sample, backend):
    logits = _with_gradient(sample.hidden @ sample.weight.T)
    plain = lambda: logprob_from_logits(logits, sample.targets, backend=backend)  # noqa: E731
    stats = lambda **o: logprob_stats_from_logits(logits, sample.targets, backend=backend, **o)  # noqa: E731
    return (logits,), plain, stats


def _saved(call) -> tuple[object, list[int]]:
    """(what a call returns, how many numbers each tensor has that it saves for the backward)."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        result = call()
    return result, sizes


@pytest.mark.parametrize("call", [_of_hidden, _of_logits])
@pytest.mark.parametrize("backend", BACKENDS)
def test_detached_statistics_are_numbers_and_nothing_else(backend, call):
    """All detached: the log-prob, its gradient, the matrix work and what is saved are those of a call without statistics."""
    sample = make_sample(300, 12, 701, bias=True, ignored=0.3)
    leaves, plain, stats = call(sample, backend)
    with FlopCounter() as counter:
        logprob, sizes = _saved(plain)
        grads = torch.autograd.grad(logprob, leaves, sample.upstream)
    with FlopCounter() as with_stats:
        (found, values), more = _saved(lambda: stats(stats=STATS, detached=STATS))
        found_grads = torch.autograd.grad(found, leaves, sample.upstream)
    assert torch.equal(found, logprob)
    assert more == sizes
    assert with_stats.flop == counter.flop
    for a, b in zip(found_grads, grads, strict=True):
        assert torch.equal(a, b)
    expected = stats(stats=STATS)[1]
    for name in STATS:
        value = getattr(values, name)
        assert torch.equal(value, getattr(expected, name)), name
        assert value.grad_fn is None
        assert not value.requires_grad
    assert expected.entropy.requires_grad


@pytest.mark.parametrize("call", [_of_hidden, _of_logits])
@pytest.mark.parametrize("backend", BACKENDS)
def test_some_with_a_gradient_and_some_without(backend, call):
    """In an order in which no name stands where its row does; the backward gets the rows of those with a gradient alone."""
    sample = make_sample(140, 12, 701, bias=True, ignored=0.3)
    leaves, _, stats = call(sample, backend)
    names, detached = ("is_top1", "mean_logit", "entropy", "top_k_mass", "lse"), ("mean_logit", "lse", "is_top1")
    logprob, found = stats(stats=names, detached=detached)
    alone = stats(stats=("entropy",))
    for name in names:
        assert torch.equal(getattr(found, name), getattr(stats(stats=names)[1], name)), name
        assert getattr(found, name).requires_grad == (name == "entropy")
    values = lambda result: result[0] * 0.3 + result[1].entropy.square()  # noqa: E731
    for a, b in zip(
        *(torch.autograd.grad(values(x), leaves, sample.upstream) for x in ((logprob, found), alone)), strict=True
    ):
        assert torch.equal(a, b)


def test_detached_statistics_of_a_compiled_function():
    sample = make_sample(40, 8, 60, ignored=0.3)
    seen = []

    def loss(hidden, weight, _):
        names = {"stats": ("entropy", "lse", "mean_logit"), "detached": ("mean_logit", "entropy")}
        logprob, stats = linear_logprob_stats(hidden, weight, sample.targets, **names)
        return logprob + 0.1 * stats.lse, stats.entropy, stats.mean_logit

    def keep(function):
        return lambda *leaves: seen.append(function(*leaves)) or seen[-1][0]

    torch.compiler.reset()
    compiled = sample.grads(keep(torch.compile(loss, fullgraph=True, backend="aot_eager")))
    eager = sample.grads(keep(loss))
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad
    assert [x.requires_grad for x in seen[0]] == [True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_any_gradient_costs_nothing(backend):
    sample = make_sample(1024, 8, 3000)
    hidden = sample.hidden.requires_grad_()
    _, stats = stats_of(sample, backend, ("entropy", "lse"))
    upstream = (torch.arange(1024) < 256).float()
    with FlopCounter() as counter:
        torch.autograd.backward((stats.entropy, stats.lse), (upstream, upstream.roll(256)))
    assert counter.flop == 2 * 2 * 512 * 8 * 3000
    assert (hidden.grad[512:] == 0).all()
    assert (hidden.grad[:512] != 0).any(dim=1).all()


def test_nothing_is_kept_for_what_was_not_asked():
    """Peak memory of a call with one statistic: no more than a few numbers a token above the call without."""
    sample = make_sample(2048, 16, 3000)
    peaks = {}
    for stats in ((), ("entropy",), ("top_k_mass",)):
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            stats_of(sample, "cpu", stats) if stats else linear_logprob(sample.hidden, sample.weight, sample.targets)
        alive = peaks[stats] = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peaks[stats] = max(peaks[stats], alive)
    assert peaks[("entropy",)] - peaks[()] <= 2048 * 48
    assert peaks[("top_k_mass",)] - peaks[()] <= 2048 * (48 + 3 * 8 * 20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["hidden", "upstream", "ignored hidden"])
def test_a_non_finite_row_stays_in_its_row(backend, bad, where):
    sample = make_sample(140, 8, 300)
    call = lambda h, w, b: linear_logprob_stats(h, w, sample.targets, stats=STATS, backend=backend)  # noqa: E731
    grads = lambda: sample.grads(lambda h, w, b: mixed(call(h, w, b)))  # noqa: E731
    clean, clean_values = grads(), values_of(sample, call)
    if where == "upstream":
        sample.upstream[5] = bad
    else:
        sample.hidden[5, 3] = bad
    if where == "ignored hidden":
        sample.targets[5] = -100
    _, d_hidden, d_weight = grads()
    others = torch.arange(140) != 5
    assert relative_error(d_hidden[others], clean[1][others]) < 1e-6
    for name, value in values_of(sample, call).items():
        assert torch.equal(value[others], clean_values[name][others])
        if where == "ignored hidden":
            assert value[5] == 0
        elif where == "hidden" and name in ("logprob", "entropy", "lse", "top_k_mass"):
            assert not value[5].isfinite()
        elif where == "hidden" and name == "is_top1":
            assert not value[5]
    assert d_weight.isfinite().all() == (where == "ignored hidden")
    assert d_hidden[5].isfinite().all() == (where == "ignored hidden")


# 2 ** -100 is 8e-31; the smallest normal fp32 number is 1.2e-38.
@pytest.mark.parametrize("power", [-100, -60, 60])
@pytest.mark.parametrize("names", [NAMES, ("entropy",)], ids=" ".join)
def test_gradients_scale_exactly_with_the_coefficients(power, names):
    sample = make_sample(300, 32, 3000)
    call = lambda h, w, b: mixed(linear_logprob_stats(h, w, sample.targets, stats=STATS), names)  # noqa: E731
    plain = sample.grads(call)
    sample.upstream *= 2.0**power
    for ours, base in zip(sample.grads(call)[1:], plain[1:], strict=True):
        expected = base.double() * 2.0**power
        seen = expected.abs() >= torch.finfo(torch.float32).smallest_normal
        assert torch.equal(ours.double()[seen], expected[seen])


def test_mixed_magnitudes_keep_each_tokens_direction():
    """Between tokens, and between the coefficients of one token."""
    sample = make_sample(256, 32, 3000)
    sample.upstream = torch.randn(256) * 10.0 ** torch.linspace(-33, 3, 256)
    ratio = 10.0 ** torch.linspace(-38, 6, 256).roll(100)
    whole = lambda result: result[0] + result[1].entropy * ratio.to(result[0])  # noqa: E731
    ours = sample.grads(lambda h, w, b: whole(linear_logprob_stats(h, w, sample.targets)))
    truth = sample.grads(lambda h, w, b: whole(dense_stats(h, w, sample.targets)), torch.float64)
    assert row_errors(ours[1], truth[1]).max() < 3e-6
    assert relative_error(ours[2], truth[2]) < 1e-6


def test_tiny_coefficients_meet_no_denormal_number():
    """No clock: no product of the library sees a denormal number, neither as a factor nor as a result."""
    sample = make_sample(200, 32, 3000, sharpness=12.0)
    sample.upstream = torch.cat([torch.full((100,), 1e-30), torch.full((100,), 1e-3)])
    with denormal_numbers_in_products() as seen:
        for names in (NAMES, ("entropy",), ("logprob", "lse")):
            sample.grads(lambda h, w, b, n=names: mixed(linear_logprob_stats(h, w, sample.targets, stats=STATS), n))
    assert len(seen) > 18
    assert not any(seen)


def test_the_statistics_in_a_loss():
    """A policy gradient with an entropy bonus and a z-loss, as callers write it: one backward, against dense autograd."""
    sample = make_sample(96, 16, 700, ignored=0.25)
    advantage = torch.randn(96)

    def loss(function):
        def call(h, w, b):
            logprob, stats = function(h, w, sample.targets, stats=("entropy", "lse"))
            return -(advantage.to(logprob) * logprob) - 0.01 * stats.entropy + 1e-4 * stats.lse.square()

        return call

    sample.upstream = torch.ones(96)
    truth, ours = sample.grads(loss(dense_stats), torch.float64), sample.grads(loss(linear_logprob_stats))
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b) < 1e-6


def test_a_target_outside_the_vocabulary_where_nothing_can_raise(monkeypatch):
    """As on a device: that token becomes NaN, and False where the answer is yes or no."""
    for module in (
        "isdaa_kernels.targets",
        "isdaa_kernels.ops.logprob_from_logits",
    ):
        monkeypatch.setattr(f"{module}.raise_bad_targets", lambda *_: None)
    sample = make_sample(10, 4, 9)
    sample.targets[3], sample.targets[4] = 9, -100
    logits = sample.hidden @ sample.weight.T
    for result in (
        stats_of(sample, "reference"),
        logprob_stats_from_logits(logits, sample.targets, stats=STATS, backend="reference"),
    ):
        for name, value in numbers(result).items():
            assert value.isnan().tolist() == [i == 3 and name != "is_top1" for i in range(10)]
            assert value[4] == 0
        assert not result[1].is_top1[3]


def test_the_token_gradient_is_made_of_what_is_there():
    grad, rows = torch.randn(3), torch.randn(2, 3)
    values = torch.randn(2, 3)
    only = TokenGradient.of(grad, None, values, ("entropy", "lse"), 10)
    assert only.terms() == (grad,)
    assert only.prob_N is only.log_prob_N is only.flat_N is None
    both = TokenGradient.of(None, rows, values, ("entropy", "lse"), 10)
    assert torch.equal(both.logprob_N, torch.zeros(3))
    assert torch.equal(both.prob_N, rows[1] - rows[0] * values[0])
    assert torch.equal(both.log_prob_N, -rows[0])
    assert both.flat_N is None
    mean = TokenGradient.of(grad, rows[:1], values[:1], ("mean_logit",), 10)
    assert torch.equal(mean.flat_N, rows[0] / 10)
    assert mean.prob_N is None
    zero = TokenGradient.of(
        torch.tensor([0.0, 0.0, float("nan")]), torch.tensor([[0.0, 1.0, 0.0]]), values[:1], ("lse",), 10
    )
    assert zero.active().tolist() == [False, True, True]
    assert StatsRequest(("is_top1",)).differentiable == ()
    request = check_stats(("is_top1", "entropy", "lse", "top_k_mass"), ("lse",), 3)
    assert request == StatsRequest(("entropy", "is_top1", "lse", "top_k_mass"), 3, ("is_top1", "lse", "top_k_mass"))
    assert request.differentiable == ("entropy",)


BAD = {
    "unknown": ({"stats": ("entropy", "varentropy")}, "stats: expected some of entropy, lse, .*, top_k_entropy, got 'varentropy'"),
    "empty": ({"stats": ()}, r"stats: expected a sequence of some of entropy, .* got \(\)"),
    "a string": ({"stats": "entropy"}, "stats: expected a sequence of some of entropy, .* got 'entropy'"),
    "doubled": ({"stats": ("lse", "entropy", "lse")}, r"stats: expected each name once, got \('lse', 'entropy', 'lse'\)"),
    "detached, not asked for": ({"detached": ("lse",)}, "detached: expected some of stats = entropy, got 'lse'"),
    "detached, unknown": ({"detached": ("varentropy",)}, "detached: expected some of stats = entropy, got 'varentropy'"),
    "detached, doubled": ({"detached": ("entropy", "entropy")}, r"detached: expected each name once, got \('entropy', 'entropy'\)"),
    "detached, a string": ({"detached": "entropy"}, "detached: expected a sequence of names, got 'entropy'"),
    "k 0": ({"top_k": 0}, "top_k: expected a whole number from 1 to 64, got 0"),
    "k 65": ({"top_k": 65}, "top_k: expected a whole number from 1 to 64, got 65"),
    "k float": ({"top_k": 2.0}, "top_k: expected a whole number from 1 to 64, got 2.0"),
    "k bool": ({"top_k": True}, "top_k: expected a whole number from 1 to 64, got True"),
    "what linear_logprob refuses": ({"temperature": 0.0}, "temperature: expected a positive finite number, got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        linear_logprob_stats(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1]), **options)


def test_the_plan_is_that_of_the_log_probs():
    """Statistics change no tile and no matrix work, so a plan needs no word about them."""
    sample = make_sample(256, 32, 3000)
    with FlopCounter() as counter:
        sample.grads(
            lambda h, w, b: mixed(linear_logprob_stats(h, w, sample.targets, stats=STATS, max_workspace_mb=40))
        )
    assert counter.flop / (2 * 256 * 32 * 3000) == pytest.approx(
        plan(256, 3000, 32, max_workspace_mb=40).units, rel=0.01
    )
