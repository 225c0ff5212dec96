"""Losses of tokens on the device that `--device` names: equal to the CPU's, the same from run to run, and nothing waits for the device."""

import pytest
import torch
from objective_cases import sample_tokens
from test_device import no_sync

from isdaa_kernels import OBJECTIVES, group_advantages, policy_loss

OF_TOKENS = [name for name, objective in OBJECTIVES.items() if objective.kind == "token"]


def on(device: torch.device, name: str, items: int = 40) -> dict:
    arguments = sample_tokens(OBJECTIVES[name], items=items)
    arguments["reference_logprob"] = arguments["old_logprob"] - 0.1
    arguments |= {"sampler_logprob": arguments["old_logprob"] + 0.05, "kl_weight": 0.1, "kl_corrected": True}
    arguments["denominator"] = torch.tensor(57)
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def run(name: str, arguments: dict) -> tuple[torch.Tensor, ...]:
    """(loss, gradient, metrics)"""
    by = "values" if name == "oreo_critic" else "logprob"
    leaf = arguments[by].detach().requires_grad_()
    loss, metrics = policy_loss(**{**arguments, by: leaf}, objective=name)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), leaf.grad, *metrics.values()


@pytest.mark.parametrize("name", OF_TOKENS)
def test_equals_the_cpu_and_waits_for_nothing(device, name):
    arguments = on(device, name)
    expected = run(name, on(torch.device("cpu"), name))
    run(name, arguments)
    with no_sync(device):
        found = run(name, arguments)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)
    if name.startswith("oreo"):  # sums along a completion are a scan, whose order a GPU chooses
        return
    for _ in range(5):
        assert all(torch.equal(mine, again) for mine, again in zip(found, run(name, arguments), strict=True))


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_advantages_wait_for_nothing(device, scale):
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(24).view(4, 6).flip(0)
    expected = group_advantages(rewards, rows, scale=scale)
    rewards, rows = rewards.to(device), rows.to(device)
    group_advantages(rewards, rows, scale=scale)
    with no_sync(device):
        found = group_advantages(rewards, rows, scale=scale)
    torch.testing.assert_close(found.cpu(), expected)
