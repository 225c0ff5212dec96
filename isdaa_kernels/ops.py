"""The operators that PyTorch sees: schema, fake, autograd. The backend is chosen inside, so `fullgraph` compiles around it.

N tokens, D hidden size, V vocabulary, K tokens whose logits are kept, S segments, or statistics asked for: their names come as one
string joined by commas, since a schema holds no list of strings.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from isdaa_kernels.dispatch import ACCELERATED, NoBackend, Problem, device_arch, on, refusal, select_backend
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.pair_loss import METRICS, Packing, PairLossCall, PairLossNumbers
from isdaa_kernels.routing import Routed
from isdaa_kernels.stats import StatsRequest, TokenGradient
from isdaa_kernels.targets import raise_bad_targets

_SECOND = "isdaa_kernels: {} has no second derivative; detach its gradient, or use dense PyTorch where create_graph=True is needed"


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


def _names(stats: str) -> tuple[str, ...]:
    return tuple(stats.split(",")) if stats else ()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N], stats [S, N], lse fp64 [N], kept [K, V]). `keep`: which of hidden, weight will need a gradient; none keeps nothing.
    Routed (`Routed.pack`), `kept` is the log-sum-exps of the blocks [B, N], on triton less those of the tokens; where the forward
    prepares d_hidden, what it prepared, for the scored tokens [max_scored, D]."""
    problem = _problem(hidden, weight, max_scored, any(keep), max_workspace_mb, *keep, routed, hidden_in_forward)
    transform = Transform(bias, logit_scale, softcap, constant_temperature, temperature, order)
    request = StatsRequest(_names(stats), top_k)
    with torch.autocast(hidden.device.type, enabled=False):  # the inputs are cast already; the arithmetic stays fp32
        return select_backend(problem, backend).forward(
            problem, hidden, weight, targets, transform, ignore_index, request
        )


@linear_logprob_forward.register_fake
def _(hidden, weight, targets, bias, temperature, constant_temperature, logit_scale, softcap, ignore_index, max_scored,
      max_workspace_mb, keep, stats, top_k, backend, order=None, routed=None, hidden_in_forward=False):  # fmt: skip
    problem = _problem(hidden, weight, max_scored, any(keep), max_workspace_mb, *keep, routed, hidden_in_forward)
    dtype, N, kept = problem.compute_dtype, hidden.shape[0], (0, weight.shape[0])
    if problem.routed is not None:
        kept = (problem.routed.blocks(weight.shape[0]), N)
    elif any(keep) and (max_workspace_mb is not None or hidden_in_forward):
        plan = select_backend(problem, backend).make_plan(problem)
        kept = (max_scored, hidden.shape[1]) if plan.hidden_in_forward else (plan.kept_tokens, weight.shape[0])
    return (
        hidden.new_empty(N, dtype=dtype),
        hidden.new_empty(len(_names(stats)), N, dtype=dtype),
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
    """[d_hidden, d_weight, d_bias], an empty tensor where `need` says no. Not both of grad [N] and grad_stats [S, N] are None."""
    problem = _problem(
        hidden, weight, max_scored, kept.shape[0] > 0, max_workspace_mb, *need[:2], routed, hidden_in_forward
    )
    transform = Transform(bias, logit_scale, softcap, constant_temperature, temperature, order)
    token_grad = TokenGradient.of(grad, grad_stats, stats_values, _names(stats), weight.shape[0])
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
     ctx.hidden_in_forward) = inputs  # fmt: skip
    saved = _save_numbers(ctx, *output)
    ctx.save_for_backward(hidden, weight, targets, bias, temperature, order, *saved)


def _save_numbers(ctx, logprob, stats, *others) -> tuple[Tensor, ...]:
    """Copies of [N] numbers, so that the caller may write to what was returned."""
    differentiable = StatsRequest(_names(ctx.stats)).gradient()
    ctx.mark_non_differentiable(*others, *(() if differentiable else (stats,)))
    ctx.set_materialize_grads(False)  # or autograd makes zeros as large as the kept logits
    return logprob.detach().clone(), stats.detach().clone(), *others


def _backward(ctx, grad_logprob, grad_stats, _grad_lse, _grad_kept):
    hidden, weight, targets, bias, temperature, order, logprob, stats_values, lse, kept = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    if grad_logprob is None and grad_stats is None:
        return (None,) * 18
    d_hidden, d_weight, d_bias = linear_logprob_backward(
        grad_logprob, grad_stats, hidden, weight, targets, bias, temperature, logprob, stats_values, lse, kept,
        ctx.constant_temperature, ctx.logit_scale, ctx.softcap, ctx.ignore_index, ctx.max_scored, ctx.max_workspace_mb, need,
        ctx.stats, ctx.backend, order, ctx.routed, ctx.hidden_in_forward,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (d if n else None for d, n in zip((d_hidden, d_weight, d_bias), need, strict=True))
    return d_hidden, d_weight, None, d_bias, *[None] * 14


linear_logprob_forward.register_autograd(_backward, setup_context=_save)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(_SECOND.format(ctx.public_name))


def _name_of_linear(ctx, inputs, output) -> None:
    ctx.public_name = "linear_logprob_stats" if inputs[18] else "linear_logprob"


linear_logprob_backward.register_autograd(_no_second_derivative, setup_context=_name_of_linear)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [N], stats [S, N], lse fp64 [N]) of logits [..., V] and targets [N]. `overwrite`: the backward may use their memory."""
    module = select_backend(_logits_problem(logits), backend)
    if targets.device.type == "cpu":  # here, since a backend may see a part of the tokens and would tell another index
        raise_bad_targets(targets, logits.shape[-1], ignore_index)
    request = StatsRequest(_names(stats), top_k)
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
):
    dtype, N = torch.promote_types(logits.dtype, torch.float32), targets.shape[0]
    return (
        logits.new_empty(N, dtype=dtype),
        logits.new_empty(len(_names(stats)), N, dtype=dtype),
        logits.new_empty(N, dtype=torch.float64),
    )


def _logits_gradient(grad, grad_stats, logits, out, targets, temperature, logprob, stats_values, lse, constant_temperature,
                     logit_scale, softcap, ignore_index, stats, backend) -> None:  # fmt: skip
    """The gradient of logits [..., V] into `out` of the same shape."""
    module = select_backend(_logits_problem(logits), backend)
    token_grad = TokenGradient.of(grad, grad_stats, stats_values, _names(stats), logits.shape[-1])
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
     ctx.stats, _, ctx.backend) = inputs  # fmt: skip
    saved = _save_numbers(ctx, *output)
    ctx.save_for_backward(logits, targets, temperature, *saved)


def _name_of_logits(stats: str) -> str:
    return "logprob_stats_from_logits" if stats else "logprob_from_logits"


def _backward_logits(ctx, grad_logprob, grad_stats, _grad_lse):
    logits, targets, temperature, logprob, stats_values, lse = ctx.saved_tensors
    if (grad_logprob is None and grad_stats is None) or not ctx.needs_input_grad[0]:
        return (None,) * 11
    args = (grad_logprob, grad_stats, logits, targets, temperature, logprob, stats_values, lse, ctx.constant_temperature,
            ctx.logit_scale, ctx.softcap, ctx.ignore_index, ctx.stats, ctx.backend)  # fmt: skip
    if not ctx.overwrite:
        return logprob_from_logits_backward(*args), *[None] * 10
    if torch.is_grad_enabled():  # create_graph=True: later there are no logits left to differentiate at
        raise RuntimeError(_SECOND.format(_name_of_logits(ctx.stats) + " with overwrite_logits=True"))
    # The write raises the version of the saved logits, so that autograd refuses a second backward, and that of others who saved them.
    logprob_from_logits_backward_(*args)
    return logits.detach(), *[None] * 10


def _save_name_of_logits(ctx, inputs, output) -> None:
    ctx.public_name = _name_of_logits(inputs[-2])


logprob_from_logits_forward.register_autograd(_backward_logits, setup_context=_save_logits)
logprob_from_logits_backward.register_autograd(_no_second_derivative, setup_context=_save_name_of_logits)


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
pair_loss_backward.register_autograd(_no_second_derivative, setup_context=_name_of_pair_loss)
