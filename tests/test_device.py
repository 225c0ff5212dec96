"""What must hold on any device, run on the one that `--device` names (the CPU by default)."""

from contextlib import contextmanager

import pytest
import torch

from isdaa_kernels import (
    Routed,
    check,
    linear_logprob,
    linear_logprob_stats,
    linear_preference_loss,
    logprob_from_logits,
    logprob_stats_from_logits,
    make_vocab_order,
)
from isdaa_kernels.dispatch import PREFERENCE, Problem, refusal
from isdaa_kernels.stats import DIFFERENTIABLE, STATS
from isdaa_kernels.testing import (
    Sample,
    assert_error_contract,
    dense_logprob,
    dense_stats,
    dense_stats_from_logits,
    make_sample,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADS = [{}, {"logit_scale": 0.5, "softcap": 5.0, "temperature": 0.8}]


def to(sample: Sample, device: torch.device) -> Sample:
    return Sample(*(None if x is None else x.to(device) for x in vars(sample).values()))


def pytest_generate_tests(metafunc):
    """Every backend that takes the device, with every dtype that it takes where a test has one."""
    if "backend" not in metafunc.fixturenames:
        return
    device = torch.device(metafunc.config.getoption("--device"))
    pairs = [(name, dtype) for name in PREFERENCE for dtype in DTYPES if takes(name, device, dtype)]
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize(("backend", "dtype"), pairs)
    else:
        metafunc.parametrize("backend", list(dict.fromkeys(name for name, _ in pairs)))


def takes(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    tensor = torch.empty(1, 1, dtype=dtype, device=device)
    return refusal(name, Problem.of(tensor, tensor, 1)) is None


@pytest.fixture
def size(backend, device) -> tuple[int, int, int]:
    """(N, D, V) of an ordinary problem; a small one where Triton's interpreter runs it, which takes a second for a few tiles."""
    return (40, 24, 701) if backend == "triton" and device.type == "cpu" else (300, 48, 5003)


@contextmanager
def no_sync(device: torch.device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("head", HEADS)
def test_error_contract(backend, device, size, dtype, head):
    sample = make_sample(*size, dtype, bias=True, ignored=0.3)
    scored = int((sample.targets != -100).sum())
    truth = sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, bias=b, **head), torch.float64)
    dense = sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, bias=b, **head))
    there = to(sample, device)
    ours = there.grads(
        lambda h, w, b: linear_logprob(h, w, there.targets, bias=b, backend=backend, max_scored=scored, **head)
    )
    for name, *tensors in zip(
        ("logprob", "d_hidden", "d_weight", "d_bias"), (x.cpu() for x in ours), dense, truth, strict=True
    ):
        assert_error_contract(name, *tensors)


def numbers(result) -> dict[str, torch.Tensor]:
    return {"logprob": result[0], **{k: v for k, v in vars(result[1]).items() if v is not None}}


def mixed(result) -> torch.Tensor:
    """One number a token with a different coefficient for the log-prob and each statistic that has a gradient."""
    values, random = numbers(result), torch.Generator().manual_seed(7)
    coefficients = {
        name: torch.randn(values["logprob"].shape, generator=random) for name in ("logprob", *DIFFERENTIABLE)
    }
    return sum(values[name] * coefficient.to(values[name]) for name, coefficient in coefficients.items())


def assert_values(ours: dict, dense: dict, truth: dict) -> None:
    assert set(ours) == {"logprob", *STATS}
    for name, value in ours.items():
        if name == "is_top1":  # two logits may be one apart by rounding
            assert value.dtype == torch.bool
            assert (value.cpu() != truth[name]).sum() <= (dense[name] != truth[name]).sum() + 1
        else:
            assert_error_contract(name, value.cpu(), dense[name], truth[name])


@pytest.mark.parametrize("head", HEADS)
def test_statistics(backend, device, size, dtype, head):
    sample = make_sample(*size, dtype, bias=True, ignored=0.3)
    scored = int((sample.targets != -100).sum())
    there = to(sample, device)
    dense = lambda h, w, b: dense_stats(h, w, sample.targets, bias=b, **head)  # noqa: E731
    ours = lambda h, w, b: linear_logprob_stats(  # noqa: E731
        h, w, there.targets, stats=STATS, bias=b, backend=backend, max_scored=scored, **head
    )
    inputs = (sample.hidden, sample.weight, sample.bias)
    truth = numbers(dense(*(x.double() for x in inputs)))
    assert_values(numbers(ours(there.hidden, there.weight, there.bias)), numbers(dense(*inputs)), truth)
    grads = there.grads(lambda h, w, b: mixed(ours(h, w, b)))
    dense_grads = sample.grads(lambda h, w, b: mixed(dense(h, w, b)))
    true_grads = sample.grads(lambda h, w, b: mixed(dense(h, w, b)), torch.float64)
    for name, a, b, c in zip(("value", "d_hidden", "d_weight", "d_bias"), grads, dense_grads, true_grads, strict=True):
        assert_error_contract(name, a.cpu(), b, c)


# Tokens of three sequences, whole or shifted (logits[:, :-1] is no matrix); the vocabulary ragged.
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("shifted", "overwrite"), [(False, False), (True, False), (True, True)])
def test_logits(backend, device, size, dtype, head, shifted, overwrite):
    random, T, V = torch.Generator().manual_seed(3), size[0] // 5, size[2]
    logits = (torch.randn(3, T + 1, V, generator=random) * 3).to(dtype)
    targets = torch.randint(V, (3, T), generator=random)
    targets[:, ::5] = -100
    upstream = torch.randn(3, T, generator=random)
    cut = (lambda z: z[:, :-1]) if shifted else (lambda z: z[:, :-1].contiguous())

    def run(function, z, targets, dtype):
        leaf = z.detach().to(dtype).requires_grad_()
        result = function(cut(leaf * 1.0), targets)
        value = mixed(result)
        value.backward(upstream.to(value))
        return numbers(result), leaf.grad.cpu()

    dense = lambda z, t: dense_stats_from_logits(z, t, **head)  # noqa: E731
    ours = lambda z, t: logprob_stats_from_logits(  # noqa: E731
        z, t, stats=STATS, overwrite_logits=overwrite, backend=backend, **head
    )
    value, grad = run(ours, logits.to(device), targets.to(device), dtype)
    (contender, dense_grad), (truth, true_grad) = (
        run(dense, logits, targets, dtype),
        run(dense, logits, targets, torch.float64),
    )
    rows = lambda values: {name: x.detach().flatten() for name, x in values.items()}  # noqa: E731
    assert_values(rows(value), rows(contender), rows(truth))
    assert_error_contract("d_logits", grad.flatten(0, 1), dense_grad.flatten(0, 1), true_grad.flatten(0, 1))


def test_the_log_probs_do_not_depend_on_the_statistics(backend, device, size):
    sample = to(make_sample(*size, bias=True, ignored=0.3), device)
    inputs = (sample.hidden, sample.weight, sample.targets)
    plain = linear_logprob(*inputs, bias=sample.bias, backend=backend)
    first, again = (
        numbers(linear_logprob_stats(*inputs, stats=STATS, bias=sample.bias, backend=backend)) for _ in range(2)
    )
    assert torch.equal(first["logprob"], plain)
    assert all(torch.equal(first[name], again[name]) for name in first)
    logits = sample.hidden @ sample.weight.T
    from_logits = numbers(logprob_stats_from_logits(logits, sample.targets, stats=STATS, backend=backend))
    assert torch.equal(from_logits["logprob"], logprob_from_logits(logits, sample.targets, backend=backend))


@pytest.mark.parametrize("k", [1, 20, 64])
@pytest.mark.parametrize("V", [3, 61, 4500])
def test_the_largest_probabilities(backend, device, V, k):
    logits = torch.randn(9, V, generator=torch.Generator().manual_seed(V)).round(decimals=1)
    targets = torch.zeros(9, dtype=torch.int64)
    names = ("top_k_mass", "top_k_entropy")
    _, stats = logprob_stats_from_logits(logits.to(device), targets.to(device), stats=names, top_k=k, backend=backend)
    p = logits.double().softmax(-1).sort(dim=1, descending=True).values[:, :k]
    assert stats.top_k_mass.tolist() == pytest.approx(p.sum(1).tolist(), rel=1e-6)
    assert stats.top_k_entropy.tolist() == pytest.approx(torch.special.entr(p).sum(1).tolist(), rel=1e-6)


def test_masked_rows_of_logits(backend, device):
    logits = torch.randn(6, 4200, generator=torch.Generator().manual_seed(0)).to(device)
    logits[:, 100:] = float("-inf")
    logits.requires_grad_()
    targets = torch.arange(6, device=device)
    result = logprob_stats_from_logits(logits, targets, stats=STATS, backend=backend)
    value = numbers(result)
    truth = numbers(dense_stats_from_logits(logits.detach()[:, :100].double().cpu(), targets.cpu()))
    for name in set(STATS) - {"mean_logit", "is_top1"}:
        assert value[name].tolist() == pytest.approx(truth[name].tolist(), rel=1e-6), name
    assert (value["mean_logit"] == float("-inf")).all()
    (result[0] + result[1].entropy + result[1].lse).sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 100:] == 0).all()


def test_logits_that_were_overwritten_are_refused(backend, device):
    made = torch.randn(5, 9, device=device, requires_grad=True) * 1.0
    out = logprob_from_logits(made, torch.arange(5, device=device), overwrite_logits=True, backend=backend)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_hot_path_does_not_wait_for_the_device(backend, device):
    sample = to(make_sample(64, 16, 300, bias=True, ignored=0.3), device)
    hidden, weight = sample.hidden.requires_grad_(), sample.weight.requires_grad_()
    cu_seqlens = torch.tensor([0, 16, 32, 48, 64], device=device)
    reference = torch.zeros(4, device=device)
    order = make_vocab_order(sample.weight.detach(), sample.hidden.detach(), 64)
    with no_sync(device):
        for vocab_order in (None, order):
            routed = {"gradient": Routed(block=64), "vocab_order": vocab_order}
            linear_logprob(hidden, weight, sample.targets, bias=sample.bias, backend=backend, **routed).sum().backward()
        linear_logprob(hidden, weight, sample.targets, bias=sample.bias, backend=backend).sum().backward()
        loss, _ = linear_preference_loss(
            hidden, weight, sample.targets, cu_seqlens, reference_logprob=reference, backend=backend
        )
        loss.backward()
        logprob, stats = linear_logprob_stats(hidden, weight, sample.targets, stats=STATS, backend=backend)
        (logprob + stats.entropy + stats.lse + stats.mean_logit).sum().backward()
        for overwrite in (False, True):
            logprob, stats = logprob_stats_from_logits(
                hidden @ weight.T, sample.targets, stats=STATS, overwrite_logits=overwrite, backend=backend
            )
            (logprob + stats.entropy).sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_target_outside_the_vocabulary(backend, device):
    sample = to(make_sample(10, 4, 9), device)
    sample.targets[3] = 9
    if device.type == "cpu":
        with pytest.raises(ValueError, match="got 9 at index 3"):
            linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend)
        return
    out = linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend)
    assert out.isnan().tolist() == [i == 3 for i in range(10)]
    for _, stats in (
        linear_logprob_stats(sample.hidden, sample.weight, sample.targets, stats=STATS, backend=backend),
        logprob_stats_from_logits(sample.hidden @ sample.weight.T, sample.targets, stats=STATS, backend=backend),
    ):
        for name in STATS:
            assert getattr(stats, name).isnan().tolist() == [i == 3 and name != "is_top1" for i in range(10)]
        assert not stats.is_top1[3]
    with pytest.raises(ValueError, match="9 at index 3"):
        check()
    for call in (
        lambda: linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend, validate=True),
        lambda: logprob_from_logits(torch.zeros(10, 9, device=device), sample.targets, backend=backend, validate=True),
    ):
        with pytest.raises(ValueError, match="got 9 at index 3"):
            call()


def test_more_scored_tokens_than_promised(backend, device):
    sample = to(make_sample(10, 4, 9), device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="max_scored: expected at least the 10 targets"):
            linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend, max_scored=8)
        return
    out = linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend, max_scored=8)
    assert out.isnan().tolist() == [False] * 8 + [True] * 2
