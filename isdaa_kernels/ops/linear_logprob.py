"""Operators of `linear_logprob` and `linear_logprob_stats`.

N tokens, D hidden size, V vocabulary, K tokens whose logits are kept, S statistics asked for: their names come as one string joined by
commas, since a schema holds no list of strings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isdaa_kernels.dispatch import Problem, select_backend
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.ops.common import names_of, no_second_derivative, request_of, save_numbers
from isdaa_kernels.routing import Routed
from isdaa_kernels.stats import TokenGradient


def _problem(
    hidden, weight, max_scored, keep, max_workspace_mb, need_hidden, need_weight, routed, hidden_in_forward
) -> Problem:
    return Problem.of(
        hidden,
        weight,
        max_scored,
        need_hidden=need_hidden,
        need_weight=need_weight,
        keep_logits=keep,
        max_workspace_mb=max_workspace_mb,
        routed=Routed.unpack(routed),
        hidden_in_forward=hidden_in_forward,
    )


@torch.library.custom_op("isdaa::linear_logprob_forward", mutates_args=())
def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    constant_temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    max_scored: int,
    max_workspace_mb: float | None,
    keep: Sequence[bool],
    stats: str,
    top_k: int,
    backend: str | None,
    order: Tensor | None = None,
    routed: Sequence[float] | None = None,
    hidden_in_forward: bool = False,
    detached: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N], stats [S, N], lse fp64 [N], kept [K, V]). The rows of `stats` come first, then those of `detached`, which the backward
    does not know of. `keep`: which of hidden, weight will need a gradient; none keeps nothing.
    Routed (`Routed.pack`), `kept` is the log-sum-exps of the blocks [B, N], on triton less those of the tokens; where the forward
    prepares d_hidden, what it prepared, for the scored tokens [max_scored, D]."""
    problem = _problem(hidden, weight, max_scored, any(keep), max_workspace_mb, *keep, routed, hidden_in_forward)
    transform = Transform(bias, logit_scale, softcap, constant_temperature, temperature, order)
    request = request_of(stats, detached, top_k)
    with torch.autocast(hidden.device.type, enabled=False):  # the inputs are cast already; the arithmetic stays fp32
        return select_backend(problem, backend).forward(
            problem, hidden, weight, targets, transform, ignore_index, request
        )


@linear_logprob_forward.register_fake
def _(hidden, weight, targets, bias, temperature, constant_temperature, logit_scale, softcap, ignore_index, max_scored,
      max_workspace_mb, keep, stats, top_k, backend, order=None, routed=None, hidden_in_forward=False, detached=""):  # fmt: skip
    problem = _problem(hidden, weight, max_scored, any(keep), max_workspace_mb, *keep, routed, hidden_in_forward)
    dtype, N, kept = problem.compute_dtype, hidden.shape[0], (0, weight.shape[0])
    if problem.routed is not None:
        kept = (problem.routed.blocks(weight.shape[0]), N)
    elif any(keep) and (max_workspace_mb is not None or hidden_in_forward):
        plan = select_backend(problem, backend).make_plan(problem)
        kept = (max_scored, hidden.shape[1]) if plan.hidden_in_forward else (plan.kept_tokens, weight.shape[0])
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(len(request_of(stats, detached, top_k).names), N, dtype=dtype),
        hidden.new_empty(N, dtype=torch.float64),
        hidden.new_empty(kept, dtype=dtype),
    )


@torch.library.custom_op("isdaa::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad: Tensor | None,
    grad_stats: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    logprob: Tensor,
    stats_values: Tensor,
    lse: Tensor,
    kept: Tensor,
    constant_temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    max_scored: int,
    max_workspace_mb: float | None,
    need: Sequence[bool],
    stats: str,
    backend: str | None,
    order: Tensor | None = None,
    routed: Sequence[float] | None = None,
    hidden_in_forward: bool = False,
) -> list[Tensor]:
    """[d_hidden, d_weight, d_bias], an empty tensor where `need` says no. Not both of grad [N] and grad_stats [S, N] are None; rows of
    grad_stats behind those of `stats` are not read."""
    problem = _problem(
        hidden, weight, max_scored, kept.shape[0] > 0, max_workspace_mb, *need[:2], routed, hidden_in_forward
    )
    transform = Transform(bias, logit_scale, softcap, constant_temperature, temperature, order)
    token_grad = TokenGradient.of(grad, grad_stats, stats_values, names_of(stats), weight.shape[0])
    module = select_backend(problem, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = module.backward(
            problem, token_grad, hidden, weight, targets, transform, ignore_index, logprob, lse, kept, need_bias=need[2]
        )
    return [hidden.new_empty(0) if d is None else d for d in grads]


@linear_logprob_backward.register_fake
def _(grad, grad_stats, hidden, weight, targets, bias, temperature, logprob, stats_values, lse, kept, constant_temperature,
      logit_scale, softcap, ignore_index, max_scored, max_workspace_mb, need, stats, backend, order=None, routed=None,
      hidden_in_forward=False):  # fmt: skip
    inputs = (hidden, weight, bias)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for x, needed in zip(inputs, need, strict=True)
    ]


def _save(ctx, inputs, output) -> None:
    (hidden, weight, targets, bias, temperature, ctx.constant_temperature, ctx.logit_scale, ctx.softcap,
     ctx.ignore_index, ctx.max_scored, ctx.max_workspace_mb, _, ctx.stats, _, ctx.backend, order, ctx.routed,
     ctx.hidden_in_forward, _) = inputs  # fmt: skip
    saved = save_numbers(ctx, *output)
    ctx.save_for_backward(hidden, weight, targets, bias, temperature, order, *saved)


def _backward(ctx, grad_logprob, grad_stats, _grad_lse, _grad_kept):
    hidden, weight, targets, bias, temperature, order, logprob, stats_values, lse, kept = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if grad_logprob is None and grad_stats is None:
        return (None,) * 19
    d_hidden, d_weight, d_bias = linear_logprob_backward(
        grad_logprob, grad_stats, hidden, weight, targets, bias, temperature, logprob, stats_values, lse, kept,
        ctx.constant_temperature, ctx.logit_scale, ctx.softcap, ctx.ignore_index, ctx.max_scored, ctx.max_workspace_mb, need,
        ctx.stats, ctx.backend, order, ctx.routed, ctx.hidden_in_forward,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (d if n else None for d, n in zip((d_hidden, d_weight, d_bias), need, strict=True))
    return d_hidden, d_weight, None, d_bias, *[None] * 15


linear_logprob_forward.register_autograd(_backward, setup_context=_save)


def _name_of_linear(ctx, inputs, output) -> None:
    ctx.public_name = "linear_logprob_stats" if inputs[18] else "linear_logprob"


linear_logprob_backward.register_autograd(no_second_derivative, setup_context=_name_of_linear)
