"""Cross entropy of each token under an LM head, without the logits: what the drop-ins for other libraries' linear
cross entropies share.

N tokens, V vocabulary; z are the final logits of a token, lse = log sum exp z.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels import LMHead, VocabStats, linear_logprob, linear_logprob_stats

REDUCTIONS = ("none", "mean", "sum")


class TokenLoss(NamedTuple):
    """Of each token, shaped like the targets: the loss, the log-prob of the target, and the statistics asked for; 0
    where ignored."""

    loss: Tensor
    logprob: Tensor
    stats: VocabStats


def token_cross_entropy(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    stats: Sequence[str] = (),
    **kernel: object,
) -> TokenLoss:
    """(1 - e) (lse - z[target]) + e (lse - mean z) of each token, e = label_smoothing.

    Equal to `torch.nn.functional.cross_entropy(z, targets, label_smoothing=e, reduction="none")`. `kernel`: gradient,
    vocab_order, max_workspace_mb, backend of `linear_logprob`. Raises ValueError for a smoothing outside [0, 1].
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    kernel = {**kernel, "bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    kernel["ignore_index"] = ignore_index
    names = tuple(dict.fromkeys((*stats, *(("lse", "mean_logit") if label_smoothing else ()))))
    if not names:
        logprob = linear_logprob(hidden, head.weight, targets, **kernel)
        return TokenLoss(-logprob, logprob, VocabStats())
    logprob, found = linear_logprob_stats(hidden, head.weight, targets, stats=names, **kernel)
    if not label_smoothing:
        return TokenLoss(-logprob, logprob, found)
    smooth = found.lse - found.mean_logit
    return TokenLoss((1 - label_smoothing) * -logprob + label_smoothing * smooth, logprob, found)


def class_weight_of(
    targets: Tensor, class_weight: Tensor | None, V: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The weight of each token: that of its class, 1 without class weights, 0 where it is ignored. fp32 (fp64 for
    fp64 weights).

    ValueError for weights of another shape, and for weights together with label smoothing, where every class of every
    token has another weight and the statistics of a token do not say enough.
    """
    scored = targets != ignore_index
    if class_weight is None:
        return scored.float()
    if class_weight.shape != (V,) or not class_weight.is_floating_point():
        raise ValueError(
            f"class weights: expected a floating tensor [{V}], got {class_weight.dtype} {list(class_weight.shape)}"
        )
    if class_weight.requires_grad:
        raise ValueError("class weights: expected a tensor without gradient, got requires_grad=True")
    if label_smoothing:
        raise ValueError(f"label_smoothing: expected 0 with class weights, got {label_smoothing}")
    # A target outside the vocabulary is for the kernel to report, not for this look-up.
    weight = class_weight.index_select(0, targets.reshape(-1).long().clamp(0, V - 1)).reshape(targets.shape)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return torch.where(scored, weight, 0)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def total(value: Tensor) -> Tensor:
    """The sum of all entries, in fp64, in the dtype of `value`."""
    return value.sum(dtype=torch.float64).to(value.dtype)
