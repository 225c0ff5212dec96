"""Token log-probs for callers that hold the logits already.

N tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isdaa_kernels import ops
from isdaa_kernels.arguments import check_floats, check_targets, split_temperature
from isdaa_kernels.lm_head import check_head_numbers
from isdaa_kernels.stats import StatsRequest, VocabStats, check_stats
from isdaa_kernels.targets import raise_bad_targets


def logprob_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor:
    """Log-probability of each target under logits that exist already, with the exact gradient for them. Equal to

        z = logits.float() * logit_scale
        z = softcap * (z / softcap).tanh() / temperature           # softcap only where given
        logprob = z.log_softmax(-1).gather(-1, targets[..., None])[..., 0].where(targets != ignore_index, 0)

    One pass over the logits forward and one backward. The forward allocates nothing of the size [..., V]: no fp32 copy, no softmax.
    The backward allocates the gradient [..., V] in the dtype of the logits and nothing else of that size; with overwrite_logits not
    even that: it writes the gradient over the logits' own memory and hands it on. Callers who have not made their logits yet want
    `linear_logprob`, which needs neither.

    logits [..., V]: fp16, bf16, fp32 or fp64, any strides (logits[:, :-1] is read in place). targets [...]: int64 or int32, already
    shifted (`shift_targets`); rows of ignored ones are not read. temperature: a positive number, or one a token [...]; not
    differentiable. backend, validate: as in `linear_logprob`.

    overwrite_logits: the backward destroys the logits. What else saved them for its own backward, and a second backward through this
    call, then raise autograd's error about a tensor modified by an inplace operation; create_graph=True is refused. The forward
    changes nothing. Refused for a leaf that requires grad (its values are a parameter) and for logits that overlap themselves.

    Returns fp32 [...] (fp64 for fp64 logits), 0 where the target is ignored; its gradient for the logits is summed in fp32 and rounded
    once. A second derivative raises RuntimeError. Raises ValueError for shapes, dtypes, devices and values that do not fit (a target
    outside the vocabulary: at once on the CPU, through `check` on a device), NoBackend where no backend takes the problem.
    """
    logprob, _ = _run(
        logits, targets, StatsRequest(), logit_scale, softcap, temperature, ignore_index, overwrite_logits, backend, validate
    )  # fmt: skip
    return logprob


def logprob_stats_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    stats: Sequence[str] = ("entropy",),
    detached: Sequence[str] = (),
    top_k: int = 20,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, VocabStats]:
    """`logprob_from_logits`, and the statistics of `linear_logprob_stats` (formulas there) from the same pass over the logits.

    entropy, lse and mean_logit have a gradient for the logits, in the same backward as the log-prob's; the others come detached, and so
    do those named in `detached`. No probabilities and no sorted copy [..., V] are allocated.

    Returns (logprob [...], VocabStats of [...]). Raises ValueError for unknown, missing or doubled names, a detached one that is not in
    `stats`, a top_k outside 1..64, and what `logprob_from_logits` raises for.
    """
    request = check_stats(stats, detached, top_k)
    return _run(
        logits, targets, request, logit_scale, softcap, temperature, ignore_index, overwrite_logits, backend, validate
    )


def _run(
    logits: Tensor,
    targets: Tensor,
    request: StatsRequest,
    logit_scale: float,
    softcap: float | None,
    temperature: float | Tensor,
    ignore_index: int,
    overwrite_logits: bool,
    backend: str | None,
    validate: bool,
) -> tuple[Tensor, VocabStats]:
    check_head_numbers(logit_scale, softcap)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected [..., V] with at least one column, got {list(logits.shape)}")
    check_targets(targets, logits.shape[:-1], "logits", ignore_index)
    check_floats("logits", logits, targets)
    constant, per_token = split_temperature(temperature, targets)
    if overwrite_logits:
        _check_overwrite(logits)
    targets_N = targets.reshape(-1)
    if validate:
        raise_bad_targets(targets_N, logits.shape[-1], ignore_index)
    logprob_N, stats_SN, _ = ops.logprob_from_logits_forward(
        logits,
        targets_N,
        per_token,
        constant,
        float(logit_scale),
        None if softcap is None else float(softcap),
        ignore_index,
        overwrite_logits,
        ",".join(request.differentiable),
        request.top_k,
        backend,
        ",".join(request.detached),
    )
    return logprob_N.reshape(targets.shape), VocabStats.from_rows(stats_SN, request, targets.shape)


def _check_overwrite(logits: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("overwrite_logits: expected logits that some operation made, got a leaf that requires grad")
    if _may_overlap(logits):
        raise ValueError(
            f"overwrite_logits: expected logits whose elements are all distinct in memory, "
            f"got shape {list(logits.shape)} with strides {list(logits.stride())}"
        )


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements can lie at one address: not where each stride steps over all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
