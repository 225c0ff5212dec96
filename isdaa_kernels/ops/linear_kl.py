"""Operators of `linear_kl`.

N tokens, D hidden size (E that of the reference), V vocabulary. Numbers of policy and reference come as pairs; a softcap of 0 is none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isdaa_kernels.dispatch import Problem, linear_kl_module, select_backend
from isdaa_kernels.divergence import Divergence, KlGradient, Model
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.ops.common import no_second_derivative

NUMBERS = 4  # a token; backends/__init__.py says which


def _call(
    policy_hidden, policy_weight, policy_bias, reference_hidden, reference_weight, reference_bias, temperature,
    constant_temperature, logit_scales, softcaps, max_scored, direction, jsd_weight, logprobs, max_workspace_mb, need, backend,
) -> tuple:  # fmt: skip
    """(module, problem, policy, reference)."""
    divergence = Divergence(
        direction, jsd_weight, reference_hidden.shape[1], reference_hidden.dtype, reference_weight.dtype, logprobs
    )
    problem = Problem.of(
        policy_hidden,
        policy_weight,
        max_scored,
        need_hidden=need[0],
        need_weight=need[1],
        max_workspace_mb=max_workspace_mb,
        divergence=divergence,
    )
    policy, reference = (
        Model(hidden, weight, Transform(bias, scale, softcap or None, constant_temperature, temperature))
        for hidden, weight, bias, scale, softcap in zip(
            (policy_hidden, reference_hidden),
            (policy_weight, reference_weight),
            (policy_bias, reference_bias),
            logit_scales,
            softcaps,
            strict=True,
        )
    )
    return linear_kl_module(select_backend(problem, backend)), problem, policy, reference


def _all_scored(targets: Tensor | None, ignore_index: int, hidden: Tensor) -> tuple[Tensor, int]:
    if targets is not None:
        return targets, ignore_index
    return torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device), -1


@torch.library.custom_op("isdaa::linear_kl_forward", mutates_args=())
def linear_kl_forward(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor | None,
    temperature: Tensor | None,
    constant_temperature: float,
    logit_scales: Sequence[float],
    softcaps: Sequence[float],
    ignore_index: int,
    max_scored: int,
    direction: str,
    jsd_weight: float,
    logprobs: bool,
    max_workspace_mb: float | None,
    keep: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], log-probs of policy and reference [2, N], or [0, N] where not wanted, numbers fp64 [4, N] for the backward).
    `keep`: which of the policy's hidden, weight will need a gradient."""
    module, problem, policy, reference = _call(
        policy_hidden, policy_weight, policy_bias, reference_hidden, reference_weight, reference_bias, temperature,
        constant_temperature, logit_scales, softcaps, max_scored, direction, jsd_weight, logprobs, max_workspace_mb, keep, backend,
    )  # fmt: skip
    targets_N, ignored = _all_scored(targets, ignore_index, policy_hidden)
    with torch.autocast(policy_hidden.device.type, enabled=False):  # the inputs are cast already
        divergence_N, numbers_4N, logprob_2N = module.forward(problem, policy, reference, targets_N, ignored)
    return divergence_N, logprob_2N, numbers_4N


@linear_kl_forward.register_fake
def _(policy_hidden, policy_weight, policy_bias, reference_hidden, reference_weight, reference_bias, targets, temperature,
      constant_temperature, logit_scales, softcaps, ignore_index, max_scored, direction, jsd_weight, logprobs, max_workspace_mb,
      keep, backend):  # fmt: skip
    N = policy_hidden.shape[0]
    double = any(x.dtype == torch.float64 for x in (policy_hidden, policy_weight, reference_hidden, reference_weight))
    dtype = torch.float64 if double else torch.float32
    return (
        policy_hidden.new_empty(N, dtype=dtype),
        policy_hidden.new_empty(2 if logprobs else 0, N, dtype=dtype),
        policy_hidden.new_empty(NUMBERS, N, dtype=torch.float64),
    )


@torch.library.custom_op("isdaa::linear_kl_backward", mutates_args=())
def linear_kl_backward(
    grad: Tensor,
    logprob_grad: Tensor | None,
    policy_hidden: Tensor,
    policy_weight: Tensor,
    policy_bias: Tensor | None,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    targets: Tensor | None,
    temperature: Tensor | None,
    logprob: Tensor,
    numbers: Tensor,
    constant_temperature: float,
    logit_scales: Sequence[float],
    softcaps: Sequence[float],
    ignore_index: int,
    max_scored: int,
    direction: str,
    jsd_weight: float,
    logprobs: bool,
    max_workspace_mb: float | None,
    need: Sequence[bool],
    backend: str | None,
) -> list[Tensor]:
    """[d_policy_hidden, d_policy_weight, d_policy_bias], an empty tensor where `need` says no."""
    module, problem, policy, reference = _call(
        policy_hidden, policy_weight, policy_bias, reference_hidden, reference_weight, reference_bias, temperature,
        constant_temperature, logit_scales, softcaps, max_scored, direction, jsd_weight, logprobs, max_workspace_mb, need, backend,
    )  # fmt: skip
    targets_N, ignored = _all_scored(targets, ignore_index, policy_hidden)
    gradient = KlGradient(grad, logprob_grad)
    with torch.autocast(policy_hidden.device.type, enabled=False):
        grads = module.backward(
            problem, gradient, policy, reference, targets_N, ignored, numbers, logprob, need_bias=need[2]
        )
    return [policy_hidden.new_empty(0) if d is None else d for d in grads]


@linear_kl_backward.register_fake
def _(grad, logprob_grad, policy_hidden, policy_weight, policy_bias, reference_hidden, reference_weight, reference_bias, targets,
      temperature, logprob, numbers, constant_temperature, logit_scales, softcaps, ignore_index, max_scored, direction, jsd_weight,
      logprobs, max_workspace_mb, need, backend):  # fmt: skip
    inputs = (policy_hidden, policy_weight, policy_bias)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else policy_hidden.new_empty(0)
        for x, needed in zip(inputs, need, strict=True)
    ]


def _save(ctx, inputs, output) -> None:
    *tensors, constant, scales, softcaps, ignore, scored, direction, weight, logprobs, workspace, _, ctx.backend = (
        inputs
    )
    ctx.options = (constant, scales, softcaps, ignore, scored, direction, weight, logprobs, workspace)
    _, logprob, numbers = output
    ctx.mark_non_differentiable(numbers)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, logprob.detach().clone(), numbers.detach().clone())


def _backward(ctx, grad, grad_logprob_2N, _grad_numbers):
    nothing = (None,) * 19
    wanted = grad_logprob_2N is not None and len(grad_logprob_2N) > 0
    if (grad is None and not wanted) or not any(ctx.needs_input_grad[:3]):
        return nothing
    need = list(ctx.needs_input_grad[:3])
    of_logprob = grad_logprob_2N[0].contiguous() if wanted else None  # the reference's has no gradient
    grad = torch.zeros_like(of_logprob) if grad is None else grad
    grads = linear_kl_backward(grad, of_logprob, *ctx.saved_tensors, *ctx.options, need, ctx.backend)
    return *(d if needed else None for d, needed in zip(grads, need, strict=True)), *nothing[3:]


linear_kl_forward.register_autograd(_backward, setup_context=_save)


def _name(ctx, inputs, output) -> None:
    ctx.public_name = "linear_kl"


linear_kl_backward.register_autograd(no_second_derivative, setup_context=_name)
