"""The operators as PyTorch sees them: opcheck, fullgraph compilation, autocast, activation checkpointing, second derivatives."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from isdaa_kernels import (
    Routed,
    linear_logprob,
    linear_logprob_stats,
    logprob_from_logits,
    logprob_stats_from_logits,
    ops,
)
from isdaa_kernels.stats import STATS
from isdaa_kernels.testing import make_sample, relative_error


def _forward_args(sample, backend, **changes):
    args = {
        "hidden": sample.hidden, "weight": sample.weight, "targets": sample.targets, "bias": sample.bias, "temperature": None,
        "constant_temperature": 0.9, "logit_scale": 1.1, "softcap": 4.0, "ignore_index": -100, "max_scored": len(sample.targets),
        "max_workspace_mb": None, "keep": [True, True], "stats": "", "top_k": 20, "backend": backend,
    }  # fmt: skip
    return tuple({**args, **changes}.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("stats", ["", "lse"])
def test_opcheck_of_detached_statistics(backend, stats):
    sample = make_sample(50, 6, 40, bias=True, ignored=0.3)
    for leaf in (sample.hidden, sample.weight, sample.bias):
        leaf.requires_grad_()
    more = {"order": None, "routed": None, "hidden_in_forward": False, "detached": "entropy,is_top1,mean_logit"}
    args = _forward_args(sample, backend, stats=stats, **more)
    torch.library.opcheck(ops.linear_logprob_forward, args)
    values = ops.linear_logprob_forward(*args)[1]
    assert values.shape == (3 + bool(stats), 50)
    assert values.requires_grad == bool(stats)
    logits = (sample.hidden @ sample.weight.T).detach().requires_grad_()
    logits_args = (logits, sample.targets, None, 0.9, 1.1, 4.0, -100, False, stats, 5, backend, "is_top1,entropy")
    torch.library.opcheck(ops.logprob_from_logits_forward, logits_args)
    assert ops.logprob_from_logits_forward(*logits_args)[1].shape == (2 + bool(stats), 50)


# Nothing asked for; all seven; only what has no gradient; only what has one.
STATS_ARGUMENTS = ["", ",".join(STATS), "is_top1,top_k_mass", "entropy,lse"]


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("workspace", [None, 16.0])
@pytest.mark.parametrize("stats", STATS_ARGUMENTS)
def test_opcheck(backend, workspace, stats):
    # With ignored tokens the kept logits end in rows that nobody reads or writes, which opcheck would compare.
    sample = make_sample(150, 6, 40, bias=True, ignored=0.0 if workspace else 0.3)
    for leaf in (sample.hidden, sample.weight, sample.bias):
        leaf.requires_grad_()
    args = _forward_args(sample, backend, max_workspace_mb=workspace, stats=stats)
    torch.library.opcheck(ops.linear_logprob_forward, args)
    logprob, values, lse, kept = (x.detach() for x in ops.linear_logprob_forward(*args))
    assert values.shape == (len(stats.split(",")) if stats else 0, 150)
    assert kept.shape == ((150, 40) if workspace and backend != "reference" else (0, 40))
    saved = (*(x.detach() for x in args[:3]), sample.bias.detach(), None, logprob, values, lse, kept)
    ones, by_row = torch.ones_like(logprob), torch.ones_like(values) if stats else None
    whole, some = [True, True, True], [([True, False, False], "both"), ([False, True, True], "both")]
    for need, given in [(whole, "both"), *([(whole, "logprob"), (whole, "stats")] if stats else some)]:
        grads = (ones if given != "stats" else None, by_row if given != "logprob" else None)
        rest = (0.9, 1.1, 4.0, -100, 150, workspace, need, stats, backend)
        torch.library.opcheck(ops.linear_logprob_backward, (*grads, *saved, *rest))


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stats", STATS_ARGUMENTS)
def test_opcheck_of_logits(backend, overwrite, stats):
    sample = make_sample(6, 4, 30, ignored=0.3)
    logits = (sample.hidden @ sample.weight.T).view(2, 3, 30)
    head = (1.1, 4.0, -100)  # scale, softcap, ignore_index
    args = (logits, sample.targets, None, 0.9, *head, overwrite, stats, 5, backend)
    torch.library.opcheck(ops.logprob_from_logits_forward, args)
    if not overwrite:
        torch.library.opcheck(ops.logprob_from_logits_forward, (logits.clone().requires_grad_(), *args[1:]))
    logprob, values, lse = ops.logprob_from_logits_forward(*args)
    grads = torch.ones_like(logprob), torch.ones_like(values) if stats else None
    backward = ops.logprob_from_logits_backward_ if overwrite else ops.logprob_from_logits_backward
    saved = (sample.targets, None, logprob, values, lse, 0.9)
    torch.library.opcheck(backward, (*grads, logits, *saved, *head, stats, backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck_of_routed_gradients(backend):
    sample = make_sample(50, 6, 300, bias=True)
    for leaf in (sample.hidden, sample.weight, sample.bias):
        leaf.requires_grad_()
    args = _forward_args(sample, backend, softcap=None, order=torch.randperm(300), routed=Routed().pack())
    torch.library.opcheck(ops.linear_logprob_forward, args)
    assert ops.linear_logprob_forward(*args)[3].shape == (3, 50)


def test_opcheck_of_segments():
    values, cu_seqlens = torch.randn(9, requires_grad=True), torch.tensor([0, 3, 3, 9])
    torch.library.opcheck(ops.segment_sum, (values, cu_seqlens))
    torch.library.opcheck(ops.segment_spread, (torch.randn(3, dtype=torch.float64), cu_seqlens, values.detach()))


def test_segment_sum_values_and_gradients():
    values = torch.tensor([1.0, 2.0, 4.0, float("nan"), 16.0], requires_grad=True)
    sums = ops.segment_sum(values, torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32))
    assert sums.dtype == torch.float64
    assert sums[[0, 1, 3]].tolist() == [3.0, 0.0, 16.0]
    assert sums[2].isnan()  # a NaN stays in its segment
    sums.backward(torch.tensor([1.0, 5.0, 2.0, 3.0], dtype=torch.float64))
    assert values.grad.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0]
    double = torch.randn(6, dtype=torch.float64, requires_grad=True)
    call = lambda v: ops.segment_sum(v, torch.tensor([0, 4, 6]))  # noqa: E731
    assert torch.autograd.gradcheck(call, (double,))
    assert torch.autograd.gradgradcheck(call, (double,))


def test_segment_sum_is_fp64():
    values = torch.full((32768,), -1.1)
    exact = float(values[0].double()) * 32768
    assert float(ops.segment_sum(values, torch.tensor([0, 32768]))[0]) == pytest.approx(exact, abs=1e-9)
    assert ops.segment_sum(values[:0], torch.tensor([0])).shape == (0,)
    assert ops.segment_sum(values[:0], torch.tensor([0, 0])).tolist() == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize("workspace", [None, 16.0])
def test_fullgraph_compile(workspace):
    sample = make_sample(40, 8, 60, bias=True, ignored=0.3)

    def loss(hidden, weight, bias):
        out = linear_logprob(
            hidden, weight, sample.targets, bias=bias, softcap=5.0, temperature=0.8, max_workspace_mb=workspace
        )
        return out * 2 + 1

    eager = sample.grads(loss)
    compiled = sample.grads(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_fullgraph_compile_with_a_changing_number_of_tokens():
    compiled = torch.compile(
        lambda h, w, t: linear_logprob(h, w, t).sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for N in (5, 9, 33):
        sample = make_sample(N, 8, 20)
        hidden = sample.hidden.requires_grad_()
        value = compiled(hidden, sample.weight, sample.targets)
        value.backward()
        assert torch.allclose(value, linear_logprob(hidden, sample.weight, sample.targets).sum())


def test_autocast_touches_hidden_and_weight_only():
    sample = make_sample(50, 8, 90, bias=True)
    temperature = torch.rand(50) + 0.5

    def call(hidden, weight, bias):
        return linear_logprob(hidden, weight, sample.targets, bias=bias, temperature=temperature)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, *grads = sample.grads(call)
    assert value.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.float32] * 3
    rounded = [sample.hidden.bfloat16(), sample.weight.bfloat16()]
    assert torch.equal(value, call(*rounded, sample.bias))  # the bias keeps its digits
    assert not torch.equal(value, call(*rounded, sample.bias.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = linear_logprob(sample.hidden.double(), sample.weight.double(), sample.targets)
    assert double.dtype == torch.float64
    assert torch.equal(double, linear_logprob(sample.hidden.double(), sample.weight.double(), sample.targets))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_under_autocast_the_logits_stay_fp32(backend):
    sample = make_sample(64, 64, 500, torch.bfloat16, sharpness=8.0)
    call = lambda h, w, b: linear_logprob(h, w, sample.targets, backend=backend)  # noqa: E731
    plain = sample.grads(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sample.grads(call)  # forward and backward
    for a, b in zip(inside, plain, strict=True):
        assert torch.equal(a, b)


def test_the_backward_allocates_nothing_as_large_as_the_kept_logits():
    sample = make_sample(1024, 8, 4000)
    hidden = sample.hidden.requires_grad_()
    out = linear_logprob(hidden, sample.weight, sample.targets, max_workspace_mb=64.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        out.backward(sample.upstream)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::"))
    assert largest < 1024 * 4000 * 4


def test_segments_outside_the_values_raise_even_when_compiled():
    values = torch.randn(5)
    for ends in ([0, 2, 50], [0, 4, 2], [-1, 5]):
        with pytest.raises(ValueError, match="cu_seqlens: expected ascending numbers from 0 to 5"):
            ops.segment_sum(values, torch.tensor(ends))
    compiled = torch.compile(ops.segment_sum, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens"):
        compiled(values, torch.tensor([0, 2, 10**9]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_second_derivative_is_refused_by_name(backend):
    sample = make_sample(5, 4, 9)
    hidden = sample.hidden.requires_grad_()
    out = linear_logprob(hidden, sample.weight, sample.targets, backend=backend)
    (d_hidden,) = torch.autograd.grad(out.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="isdaa_kernels: linear_logprob has no second derivative"):
        d_hidden.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    sample = make_sample(30, 8, 50)
    plain = sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets))
    call = lambda h, w, b: checkpoint(linear_logprob, h, w, sample.targets, use_reentrant=reentrant)  # noqa: E731
    for a, b in zip(sample.grads(call), plain, strict=True):
        assert torch.equal(a, b)


def test_gradients_accumulate():
    sample = make_sample(64, 8, 50)
    whole = sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets))[2]
    weight = sample.weight.requires_grad_()
    for part in (slice(0, 20), slice(20, 64)):
        linear_logprob(sample.hidden[part], weight, sample.targets[part]).backward(sample.upstream[part])
    assert relative_error(weight.grad, whole) < 1e-6


def test_inference_mode():
    sample = make_sample(6, 4, 9)
    with torch.inference_mode():
        out = linear_logprob(sample.hidden, sample.weight, sample.targets)
    assert torch.equal(out, linear_logprob(sample.hidden, sample.weight, sample.targets))


@pytest.mark.slow
@pytest.mark.parametrize("workspace", [None, 16.0])
def test_fullgraph_compile_with_statistics(workspace):
    sample = make_sample(40, 8, 60, bias=True, ignored=0.3)

    def loss(hidden, weight, bias):
        logprob, stats = linear_logprob_stats(
            hidden, weight, sample.targets, stats=STATS, top_k=5, bias=bias, softcap=5.0, max_workspace_mb=workspace
        )
        return logprob * 2 + stats.entropy - 3 * stats.lse + stats.mean_logit + stats.is_top1 * stats.top_k_mass

    eager = sample.grads(loss)
    compiled = sample.grads(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_fullgraph_compile_of_logits(overwrite):
    sample = make_sample(40, 8, 60, bias=True, ignored=0.3)

    def loss(hidden, weight, bias):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logprob, stats = logprob_stats_from_logits(
            logits, sample.targets, stats=("entropy", "is_top1"), temperature=0.8, overwrite_logits=overwrite
        )
        return logprob * 2 + stats.entropy

    eager = sample.grads(loss)
    compiled = sample.grads(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_fullgraph_compile_of_logits_with_a_changing_number_of_tokens():
    compiled = torch.compile(
        lambda z, t: logprob_from_logits(z[:, :-1], t).sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for T in (5, 9, 33):
        logits, targets = torch.randn(2, T, 20, requires_grad=True), torch.randint(20, (2, T - 1))
        value = compiled(logits, targets)
        (grad,) = torch.autograd.grad(value, logits)
        plain = logprob_from_logits(logits[:, :-1], targets).sum()
        assert torch.equal(value, plain)
        assert torch.equal(grad, torch.autograd.grad(plain, logits)[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_statistics_under_autocast_stay_fp32(backend):
    sample = make_sample(64, 64, 500, torch.bfloat16, sharpness=8.0)

    def call(hidden, weight, bias):
        logprob, stats = linear_logprob_stats(hidden, weight, sample.targets, stats=STATS, backend=backend)
        assert stats.entropy.dtype == torch.float32
        return logprob + stats.entropy + stats.lse + stats.mean_logit + stats.top_k_entropy

    def call_logits(hidden, weight, bias):
        logits = hidden.float() + hidden.float().flip(0)  # [64, 64], and no product that autocast would round
        logprob, stats = logprob_stats_from_logits(logits, sample.targets % 64, backend=backend)
        return logprob + stats.entropy + 0 * weight.sum()

    for function in (call, call_logits):
        plain = sample.grads(function)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = sample.grads(function)  # forward and backward
        for a, b in zip(inside, plain, strict=True):
            assert torch.equal(a, b)


def test_a_second_derivative_of_a_statistic_is_refused_by_name():
    sample = make_sample(5, 4, 9)
    hidden = sample.hidden.requires_grad_()
    _, stats = linear_logprob_stats(hidden, sample.weight, sample.targets)
    (d_hidden,) = torch.autograd.grad(stats.entropy.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="isdaa_kernels: linear_logprob_stats has no second derivative"):
        d_hidden.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("overwrite", [False, True])
def test_activation_checkpointing_with_statistics(reentrant, overwrite):
    sample = make_sample(30, 8, 50)

    def linear(hidden, weight):
        logprob, stats = linear_logprob_stats(hidden, weight, sample.targets, stats=("entropy", "is_top1"))
        return logprob + stats.entropy * stats.is_top1

    def from_logits(hidden, weight):
        logprob, stats = logprob_stats_from_logits(hidden @ weight.T, sample.targets, overwrite_logits=overwrite)
        return logprob + stats.entropy

    for function in (linear, from_logits):
        plain = sample.grads(lambda h, w, b, f=function: f(h, w))
        call = lambda h, w, b, f=function: checkpoint(f, h, w, use_reentrant=reentrant)  # noqa: E731
        for a, b in zip(sample.grads(call), plain, strict=True):
            assert torch.equal(a, b)


def test_the_backward_of_statistics_allocates_nothing_as_large_as_the_kept_logits():
    sample = make_sample(1024, 8, 4000)
    hidden = sample.hidden.requires_grad_()
    _, stats = linear_logprob_stats(hidden, sample.weight, sample.targets, max_workspace_mb=64.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        stats.entropy.backward(sample.upstream)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::"))
    assert largest < 1024 * 4000 * 4
