"""What must hold on any device, run on the one that `--device` names (the CPU by default)."""

from contextlib import contextmanager

import pytest
import torch

from isdaa_kernels import check, linear_logprob, linear_preference_loss
from isdaa_kernels.dispatch import PREFERENCE, Problem, refusal
from isdaa_kernels.testing import Sample, assert_error_contract, dense_logprob, make_sample


def to(sample: Sample, device: torch.device) -> Sample:
    return Sample(*(None if x is None else x.to(device) for x in vars(sample).values()))


@pytest.fixture(params=PREFERENCE)
def backend(request, device) -> str:
    reason = refusal(request.param, Problem(device.type, torch.float32, torch.float32, 1, 1, 1))
    if reason is not None:
        pytest.skip(reason)
    return request.param


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.5, "softcap": 5.0, "temperature": 0.8}])
def test_error_contract(backend, device, dtype, head):
    sample = make_sample(300, 48, 5003, dtype, bias=True, ignored=0.3)
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


def test_the_hot_path_does_not_wait_for_the_device(backend, device):
    sample = to(make_sample(64, 16, 300, bias=True, ignored=0.3), device)
    hidden, weight = sample.hidden.requires_grad_(), sample.weight.requires_grad_()
    cu_seqlens = torch.tensor([0, 16, 32, 48, 64], device=device)
    reference = torch.zeros(4, device=device)
    with no_sync(device):
        linear_logprob(hidden, weight, sample.targets, bias=sample.bias, backend=backend).sum().backward()
        loss, _ = linear_preference_loss(
            hidden, weight, sample.targets, cu_seqlens, reference_logprob=reference, backend=backend
        )
        loss.backward()
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
    with pytest.raises(ValueError, match="9 at index 3"):
        check()
    with pytest.raises(ValueError, match="got 9 at index 3"):
        linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend, validate=True)


def test_more_scored_tokens_than_promised(backend, device):
    sample = to(make_sample(10, 4, 9), device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="max_scored: expected at least the 10 targets"):
            linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend, max_scored=8)
        return
    out = linear_logprob(sample.hidden, sample.weight, sample.targets, backend=backend, max_scored=8)
    assert out.isnan().tolist() == [False] * 8 + [True] * 2
