"""The operators that PyTorch sees: schema, fake, autograd. The backend is chosen inside, so `fullgraph` compiles around it.

N tokens, D hidden size, V vocabulary, K tokens whose logits are kept, S segments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isdaa_kernels.dispatch import Problem, select_backend
from isdaa_kernels.lm_head import Transform

_SECOND = "isdaa_kernels: {} has no second derivative; detach its gradient, or use dense PyTorch where create_graph=True is needed"


def _problem(hidden, weight, max_scored, keep, max_workspace_mb, need_hidden, need_weight) -> Problem:
    return Problem.of(
        hidden,
        weight,
        max_scored,
        need_hidden=need_hidden,
        need_weight=need_weight,
        keep_logits=keep,
        max_workspace_mb=max_workspace_mb,
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
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [N], lse fp64 [N], kept [K, V]). `keep`: which of hidden, weight will need a gradient; none keeps nothing."""
    problem = _problem(hidden, weight, max_scored, any(keep), max_workspace_mb, *keep)
    transform = Transform(bias, logit_scale, softcap, constant_temperature, temperature)
    with torch.autocast(hidden.device.type, enabled=False):  # the inputs are cast already; the arithmetic stays fp32
        return select_backend(problem, backend).forward(problem, hidden, weight, targets, transform, ignore_index)


@linear_logprob_forward.register_fake
def _(hidden, weight, targets, bias, temperature, constant_temperature, logit_scale, softcap, ignore_index, max_scored,
      max_workspace_mb, keep, backend):  # fmt: skip
    problem = _problem(hidden, weight, max_scored, any(keep), max_workspace_mb, *keep)
    kept = 0
    if any(keep) and max_workspace_mb is not None:
        kept = select_backend(problem, backend).make_plan(problem).kept_tokens
    dtype = problem.compute_dtype
    return (
        hidden.new_empty(hidden.shape[0], dtype=dtype),
        hidden.new_empty(hidden.shape[0], dtype=torch.float64),
        hidden.new_empty(kept, weight.shape[0], dtype=dtype),
    )


@torch.library.custom_op("isdaa::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lse: Tensor,
    kept: Tensor,
    constant_temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    max_scored: int,
    max_workspace_mb: float | None,
    need: Sequence[bool],
    backend: str | None,
) -> list[Tensor]:
    """[d_hidden, d_weight, d_bias], an empty tensor where `need` says no."""
    problem = _problem(hidden, weight, max_scored, kept.shape[0] > 0, max_workspace_mb, need[0], need[1])
    transform = Transform(bias, logit_scale, softcap, constant_temperature, temperature)
    module = select_backend(problem, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = module.backward(
            problem, grad, hidden, weight, targets, transform, ignore_index, lse, kept, need_bias=need[2]
        )
    return [hidden.new_empty(0) if d is None else d for d in grads]


@linear_logprob_backward.register_fake
def _(grad, hidden, weight, targets, bias, temperature, lse, kept, constant_temperature, logit_scale, softcap,
      ignore_index, max_scored, max_workspace_mb, need, backend):  # fmt: skip
    inputs = (hidden, weight, bias)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for x, needed in zip(inputs, need, strict=True)
    ]


def _save(ctx, inputs, output) -> None:
    (hidden, weight, targets, bias, temperature, ctx.constant_temperature, ctx.logit_scale, ctx.softcap,
     ctx.ignore_index, ctx.max_scored, ctx.max_workspace_mb, _, ctx.backend) = inputs  # fmt: skip
    _, lse, kept = output
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)  # or autograd makes zeros as large as the kept logits
    ctx.save_for_backward(hidden, weight, targets, bias, temperature, lse, kept)


def _backward(ctx, grad_logprob, _grad_lse, _grad_kept):
    hidden, weight, targets, bias, temperature, lse, kept = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if grad_logprob is None:
        return (None,) * 13
    d_hidden, d_weight, d_bias = linear_logprob_backward(
        grad_logprob, hidden, weight, targets, bias, temperature, lse, kept, ctx.constant_temperature, ctx.logit_scale,
        ctx.softcap, ctx.ignore_index, ctx.max_scored, ctx.max_workspace_mb, need, ctx.backend
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (d if n else None for d, n in zip((d_hidden, d_weight, d_bias), need, strict=True))
    return d_hidden, d_weight, None, d_bias, *[None] * 9


linear_logprob_forward.register_autograd(_backward, setup_context=_save)


def _no_second_derivative(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(_SECOND.format(name))

    return backward


linear_logprob_backward.register_autograd(_no_second_derivative("linear_logprob"))


@torch.library.custom_op("isdaa::segment_sum", mutates_args=())
def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """fp64 [S]: sums of values [N] over segments cu_seqlens[s]..cu_seqlens[s + 1]. No atomics; a NaN stays in its segment; no sync."""
    if cu_seqlens.device.type == "cpu":
        _check_segments(cu_seqlens, values.shape[0])
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), initial=0.0, unsafe=True)


def _check_segments(cu_seqlens: Tensor, N: int) -> None:
    """Here and not only in the public functions: under torch.compile those see no values, and the sum reads where it is told."""
    ends = cu_seqlens.tolist()
    if not ends or ends[0] < 0 or ends[-1] > N or ends != sorted(ends):
        raise ValueError(f"cu_seqlens: expected ascending numbers from 0 to {N}, got {ends}")


@segment_sum.register_fake
def _(values, cu_seqlens):
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float64)


@torch.library.custom_op("isdaa::segment_spread", mutates_args=())
def segment_spread(sums: Tensor, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """The transpose of segment_sum: every token gets its segment's number, in the dtype of `like` [N]."""
    position_N = torch.arange(like.shape[0], device=like.device)
    segment_N = torch.searchsorted(cu_seqlens.long(), position_N, right=True) - 1
    return sums.index_select(0, segment_N.clamp_(0, max(sums.shape[0] - 1, 0))).to(like.dtype)


@segment_spread.register_fake
def _(sums, cu_seqlens, like):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _save_segments(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _segment_sum_backward(ctx, grad):
    values, cu_seqlens = ctx.saved_tensors
    return segment_spread(grad, cu_seqlens, values), None


def _segment_spread_backward(ctx, grad):
    _, cu_seqlens, _ = ctx.saved_tensors
    return segment_sum(grad, cu_seqlens), None, None


segment_sum.register_autograd(_segment_sum_backward, setup_context=_save_segments)
segment_spread.register_autograd(_segment_spread_backward, setup_context=_save_segments)
