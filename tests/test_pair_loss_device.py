"""The loss stage on the GPU that `--device` names: equal to PyTorch's arithmetic there, no wait for the device, in a CUDA graph."""

import pytest
import torch
from pair_loss_cases import (
    FUSED,
    SETTINGS,
    Settings,
    assert_equal_to_dense,
    extreme_sums,
    fused,
    in_sums,
    make_batch,
    on,
)
from test_device import no_sync

from isdaa_kernels import preference_loss
from isdaa_kernels.dispatch import Problem, refusal


@pytest.fixture(params=["cuda", "triton"])
def backend(device, request) -> str:
    tensor = torch.empty(1, 1, device=device)
    reason = refusal(request.param, Problem.of(tensor, tensor, 1))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("level", ["tokens", "sums"])
def test_equals_pytorch(device, backend, level, settings):
    batch = make_batch(behaviour="is_" in settings.objective)
    assert_equal_to_dense((batch if level == "tokens" else in_sums(batch)).to(device), on(device, settings), backend)


@pytest.mark.parametrize("objective", FUSED)
def test_extreme_log_ratios_equal_pytorch(device, backend, objective):
    assert_equal_to_dense(extreme_sums().to(device), Settings(objective), backend)


def test_long_sequences(device, backend):
    batch = make_batch(lengths=(9001, 4500, 7777, 40003), dtype=torch.float32, spread=1e-3).to(device)
    assert_equal_to_dense(batch, Settings(), backend)
    first = fused(batch, Settings(), backend)
    for _ in range(10):
        again = fused(batch, Settings(), backend)
        assert torch.equal(first.loss, again.loss)
        assert torch.equal(first.grad, again.grad)


@pytest.mark.parametrize(
    "more", [{}, {"sample_weight": torch.ones(64), "beta": torch.full((64,), 0.2)}], ids=["plain", "by_pair"]
)
def test_nothing_waits_for_the_device(device, backend, more):
    batch, settings = make_batch(lengths=(300,) * 128, dtype=torch.float32).to(device), on(device, Settings(more=more))
    fused(batch, settings, backend)
    policy = in_sums(batch).policy.requires_grad_()
    with no_sync(device):
        fused(batch, settings, backend)
        preference_loss(policy, policy.detach(), **settings.more).loss.sum().backward(torch.ones((), device=device))


def test_in_a_cuda_graph(device, backend):
    batch = make_batch(lengths=(2048,) * 8, dtype=torch.float32, spread=1e-2).to(device)

    def step():
        found = fused(batch, Settings(), backend)
        return found.loss, found.grad

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    batch.policy.add_(0.01)
    for _ in range(3):
        graph.replay()
    expected = step()
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
