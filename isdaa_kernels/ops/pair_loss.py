"""Operators of the loss stage: `isdaa_kernels.pair_loss` says what it covers."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from isdaa_kernels.dispatch import ACCELERATED, NoBackend, Problem, device_arch, on, refusal
from isdaa_kernels.ops.common import no_second_derivative
from isdaa_kernels.pair_loss import METRICS, Packing, PairLossCall, PairLossNumbers

# backend -> what it cannot do without, and the module with its loss stage
_PAIR_LOSS = {
    "cuda": ("isdaa_kernels._cuda", "isdaa_kernels.backends.cuda.pair_loss"),
    "triton": ("triton", "isdaa_kernels.backends.triton.kernels.pair_loss"),
    "cpu": ("isdaa_kernels._cpu", "isdaa_kernels.backends.cpu.pair_loss"),
}
_PAIR_LOSS_HERE = tuple(name for name, (needs, _) in _PAIR_LOSS.items() if find_spec(needs) is not None)
_PAIR_LOSS_FOR = {
    device: tuple(name for name in made_for_it if name in _PAIR_LOSS_HERE)
    for device, made_for_it in ACCELERATED.items()
}
_FIRST = "first"  # of those made for the device, the first that takes it


def pair_loss_backend(device_type: str, backend: str | None) -> str | None:
    """What the operator is called with: the backend asked for, or `_FIRST`; None where PyTorch computes the loss, which has no kernel
    for it. Nothing is imported, so that a compiled graph can ask."""
    if backend is None:
        return _FIRST if _PAIR_LOSS_FOR.get(device_type) else None
    return backend if backend in _PAIR_LOSS_HERE else None


def _pair_loss_module(backend: str, device: torch.device) -> ModuleType:
    return import_module(_PAIR_LOSS[_first_pair_loss(device) if backend == _FIRST else backend][1])


@cache
def _first_pair_loss(device: torch.device) -> str:
    small = Problem(device.type, torch.float32, torch.float32, 1, 1, 1, arch=device_arch(device))
    reasons = {name: refusal(name, small) for name in _PAIR_LOSS_FOR[device.type]}
    for name, reason in reasons.items():
        if reason is None:
            return name
    sentences = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NoBackend(
        f"no backend computes the loss on {device}: {sentences}; backend='reference' runs it in plain PyTorch"
    )


@torch.library.custom_op("isdaa::pair_loss_forward", mutates_args=())
def pair_loss_forward(
    policy: Tensor,
    reference: Tensor,
    behaviour: Tensor | None,
    cu_seqlens: Tensor | None,
    scored: Tensor | None,
    pairs: Tensor | None,
    terms: Tensor | None,
    numbers: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], metrics [METRICS], slope fp64 [2, P]: d loss / d(sum) of the chosen and the rejected). `PairLossCall` says what the
    arguments are; numbers: `PairLossNumbers.pack`. Few arguments: what PyTorch spends on a call grows with their square."""
    call = PairLossCall.of(policy, reference, behaviour, cu_seqlens, scored, pairs, terms, numbers)
    with on(policy.device):
        return _pair_loss_module(backend, policy.device).forward(call)


@pair_loss_forward.register_fake
def _(policy, reference, behaviour, cu_seqlens, scored, pairs, terms, numbers, backend):
    S = policy.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    P = S // 2 if pairs is None else pairs.shape[0]
    new = policy.new_empty
    return new((), dtype=torch.float32), new(METRICS, dtype=torch.float32), new((2, P), dtype=torch.float64)


@torch.library.custom_op("isdaa::pair_loss_backward", mutates_args=())
def pair_loss_backward(
    grad: Tensor,
    slope: Tensor,
    policy: Tensor,
    cu_seqlens: Tensor | None,
    targets: Tensor | None,
    ignore_index: int,
    pairs: Tensor | None,
    backend: str,
) -> Tensor:
    """d_policy [N] in the dtype of `policy`, of which nothing else is read: grad [] times the slopes of each sequence."""
    packing = Packing.of(policy.shape[0], cu_seqlens, targets, pairs, ignore_index)
    with on(policy.device):
        return _pair_loss_module(backend, policy.device).backward(packing, grad, slope, policy)


@pair_loss_backward.register_fake
def _(grad, slope, policy, cu_seqlens, targets, ignore_index, pairs, backend):
    return torch.empty_like(policy, memory_format=torch.contiguous_format)


def _save_pair_loss(ctx, inputs, output) -> None:
    policy, _, _, cu_seqlens, scored, pairs, _, numbers, ctx.backend = inputs
    _, metrics, slope = output
    ctx.mark_non_differentiable(metrics, slope)
    ctx.ignore_index = PairLossNumbers.unpack(numbers).ignore_index
    ctx.save_for_backward(slope, policy, cu_seqlens, None if cu_seqlens is None else scored, pairs)


def _backward_pair_loss(ctx, grad, _grad_metrics, _grad_slope):
    slope, policy, cu_seqlens, targets, pairs = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 9
    d_policy = pair_loss_backward(grad, slope, policy, cu_seqlens, targets, ctx.ignore_index, pairs, ctx.backend)
    return d_policy, *[None] * 8


def _name_of_pair_loss(ctx, inputs, output) -> None:
    ctx.public_name = "preference_loss"


pair_loss_forward.register_autograd(_backward_pair_loss, setup_context=_save_pair_loss)
pair_loss_backward.register_autograd(no_second_derivative, setup_context=_name_of_pair_loss)
