"""Operators of `logprob_from_logits` and `logprob_stats_from_logits`. N tokens, V vocabulary, S statistics asked for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from isdaa_kernels.dispatch import Problem, device_arch, select_backend
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.ops.common import SECOND, names_of, no_second_derivative, request_of, save_numbers
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.targets import raise_bad_targets


def _logits_problem(logits: Tensor) -> Problem:
    V = logits.shape[-1]
    arch = device_arch(logits.device)
    return Problem(logits.device.type, logits.dtype, logits.dtype, logits.numel() // V, 0, V, arch=arch)


def _as_matrices(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views [n, V] that cover logits [..., V] in the order of its tokens, and which tokens each holds: one where the strides allow."""
    N, V = logits.numel() // logits.shape[-1], logits.shape[-1]
    try:
        whole = logits.view(N, V)
    except RuntimeError:
        # Such as logits[:, :-1] of a padded batch: never copied, but taken one sequence after the other.
        each = N // logits.shape[0]
        for i, part in enumerate(logits.unbind(0)):
            for rows, matrix in _as_matrices(part):
                yield slice(i * each + rows.start, i * each + rows.stop), matrix
        return
    yield slice(0, N), whole


def _each_matrix(logits, targets, temperature, constant_temperature, logit_scale, softcap):
    """(tokens, logits [n, V], problem, targets [n], transform) of every matrix."""
    for rows, matrix in _as_matrices(logits):
        own = None if temperature is None else temperature[rows]
        transform = Transform(None, logit_scale, softcap, constant_temperature, own)
        yield rows, matrix, _logits_problem(matrix), targets[rows], transform


@torch.library.custom_op("isdaa::logprob_from_logits_forward", mutates_args=())
def logprob_from_logits_forward(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    constant_temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    overwrite: bool,
    stats: str,
    top_k: int,
    backend: str | None,
    detached: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [N], stats [S, N], lse fp64 [N]) of logits [..., V] and targets [N]. `overwrite`: the backward may use their memory.
    `detached`: further rows of the statistics, which the backward does not know of."""
    module = select_backend(_logits_problem(logits), backend)
    if targets.device.type == "cpu":  # here, since a backend may see a part of the tokens and would tell another index
        raise_bad_targets(targets, logits.shape[-1], ignore_index)
    request = request_of(stats, detached, top_k)
    with torch.autocast(logits.device.type, enabled=False):
        parts = [
            module.forward_logits(problem, matrix, targets_n, transform, ignore_index, request)
            for _, matrix, problem, targets_n, transform in _each_matrix(
                logits, targets, temperature, constant_temperature, logit_scale, softcap
            )
        ]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(each, -1) for each in zip(*parts, strict=True))


@logprob_from_logits_forward.register_fake
def _(
    logits,
    targets,
    temperature,
    constant_temperature,
    logit_scale,
    softcap,
    ignore_index,
    overwrite,
    stats,
    top_k,
    backend,
    detached="",
):
    dtype, N = torch.promote_types(logits.dtype, torch.float32), targets.shape[0]
    return (
        logits.new_empty(N, dtype=dtype),
        logits.new_empty(len(request_of(stats, detached, top_k).names), N, dtype=dtype),
        logits.new_empty(N, dtype=torch.float64),
    )


def _logits_gradient(grad, grad_stats, logits, out, targets, temperature, logprob, stats_values, lse, constant_temperature,
                     logit_scale, softcap, ignore_index, stats, backend) -> None:  # fmt: skip
    """The gradient of logits [..., V] into `out` of the same shape."""
    module = select_backend(_logits_problem(logits), backend)
    token_grad = TokenGradient.of(grad, grad_stats, stats_values, names_of(stats), logits.shape[-1])
    matrices = _each_matrix(logits, targets, temperature, constant_temperature, logit_scale, softcap)
    with torch.autocast(logits.device.type, enabled=False):
        for rows, matrix, problem, targets_n, transform in matrices:
            out_matrix = matrix if out is logits else out.view(-1, out.shape[-1])[rows]
            own = token_grad.map(lambda term_N, rows=rows: term_N[rows])
            module.backward_logits(
                problem, own, matrix, out_matrix, targets_n, transform, ignore_index, logprob[rows], lse[rows]
            )


@torch.library.custom_op("isdaa::logprob_from_logits_backward", mutates_args=())
def logprob_from_logits_backward(
    grad: Tensor | None,
    grad_stats: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    logprob: Tensor,
    stats_values: Tensor,
    lse: Tensor,
    constant_temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    stats: str,
    backend: str | None,
) -> Tensor:
    """d_logits [..., V], a new tensor."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _logits_gradient(grad, grad_stats, logits, out, targets, temperature, logprob, stats_values, lse, constant_temperature,
                     logit_scale, softcap, ignore_index, stats, backend)  # fmt: skip
    return out


@logprob_from_logits_backward.register_fake
def _(grad, grad_stats, logits, targets, temperature, logprob, stats_values, lse, constant_temperature, logit_scale, softcap,
      ignore_index, stats, backend):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("isdaa::logprob_from_logits_backward_", mutates_args=("logits",))
def logprob_from_logits_backward_(
    grad: Tensor | None,
    grad_stats: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    logprob: Tensor,
    stats_values: Tensor,
    lse: Tensor,
    constant_temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    stats: str,
    backend: str | None,
) -> None:
    """The same, written over the logits."""
    _logits_gradient(grad, grad_stats, logits, logits, targets, temperature, logprob, stats_values, lse, constant_temperature,
                     logit_scale, softcap, ignore_index, stats, backend)  # fmt: skip


@logprob_from_logits_backward_.register_fake
def _(grad, grad_stats, logits, targets, temperature, logprob, stats_values, lse, constant_temperature, logit_scale, softcap,
      ignore_index, stats, backend):  # fmt: skip
    return None


def _save_logits(ctx, inputs, output) -> None:
    (logits, targets, temperature, ctx.constant_temperature, ctx.logit_scale, ctx.softcap, ctx.ignore_index, ctx.overwrite,
     ctx.stats, _, ctx.backend, _) = inputs  # fmt: skip
    saved = save_numbers(ctx, *output)
    ctx.save_for_backward(logits, targets, temperature, *saved)


def _name_of_logits(stats: str) -> str:
    return "logprob_stats_from_logits" if stats else "logprob_from_logits"


def _backward_logits(ctx, grad_logprob, grad_stats, _grad_lse):
    logits, targets, temperature, logprob, stats_values, lse = ctx.saved_tensors
    if (grad_logprob is None and grad_stats is None) or not ctx.needs_input_grad[0]:
        return (None,) * 12
    args = (grad_logprob, grad_stats, logits, targets, temperature, logprob, stats_values, lse,
            ctx.constant_temperature, ctx.logit_scale, ctx.softcap, ctx.ignore_index, ctx.stats, ctx.backend)  # fmt: skip
    if not ctx.overwrite:
        return logprob_from_logits_backward(*args), *[None] * 11
    if torch.is_grad_enabled():  # create_graph=True: later there are no logits left to differentiate at
        raise RuntimeError(SECOND.format(_name_of_logits(ctx.stats) + " with overwrite_logits=True"))
    # The write raises the version of the saved logits, so that autograd refuses a second backward, and that of others who saved them.
    logprob_from_logits_backward_(*args)
    return logits.detach(), *[None] * 11


def _save_name_of_logits(ctx, inputs, output) -> None:
    ctx.public_name = _name_of_logits(inputs[-2])


logprob_from_logits_forward.register_autograd(_backward_logits, setup_context=_save_logits)
logprob_from_logits_backward.register_autograd(no_second_derivative, setup_context=_save_name_of_logits)
