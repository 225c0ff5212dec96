"""A drop-in for `torch.nn.functional.linear_cross_entropy` (torch 2.13), for any torch that the package runs on.

N samples, D features, C classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from isdaa_kernels import LMHead, Routed, VocabOrder
from isdaa_kernels.integrations.cross_entropy import check_reduction, class_weight_of, token_cross_entropy, total


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy between `target` and a linear map of `input`, without the logits. Equal to

        logits = F.linear(input, linear_weight, linear_bias)
        loss = F.cross_entropy(logits, target, weight=weight, reduction=reduction, ignore_index=ignore_index,
                               label_smoothing=label_smoothing)

    input [..., D] (torch takes [D] and [N, D]), linear_weight [C, D], target [...] class indices (int64, int32 or
    uint8). The result is fp32
    (fp64 for fp64 inputs) where torch's has the dtype of the input; the logits are never rounded to 16 bits. The mean
    over no target is NaN, as in torch.

    options: an `nn.LinearCrossEntropyOptions`, or None. How it cuts the batch, whether its graph is kept and where it
    rounds change no number here; the sums are made in fp32 (fp64 for fp64 inputs), and an acc_dtype other than that
    or None raises ValueError. gradient, vocab_order, max_workspace_mb, backend: as in `isdaa_kernels.linear_logprob`.

    Raises ValueError for class probabilities as target, for a loss with further dimensions (linear_weight of more
    than 2), for class weights together with label smoothing, and for options of another kind.
    """
    check_reduction(reduction)
    if linear_weight.ndim != 2:
        raise ValueError(
            f"linear_weight: expected [C, D], got {list(linear_weight.shape)}; a loss of K dimensions is not supported"
        )
    if target.is_floating_point():
        raise ValueError(f"target: expected class indices, got {target.dtype}; class probabilities are not supported")
    target = target.long() if target.dtype == torch.uint8 else target
    _check_options(options)
    wide = torch.float64 if torch.float64 in (input.dtype, linear_weight.dtype) else torch.float32
    if getattr(options, "acc_dtype", None) not in (None, wide):
        raise ValueError(
            f"options: expected an acc_dtype of None or {wide}, in which sums are made; got {options.acc_dtype}"
        )
    ignore_index = -100 if ignore_index is None else ignore_index
    weights = class_weight_of(target, weight, len(linear_weight), ignore_index, label_smoothing)
    loss, _, _ = token_cross_entropy(
        input,
        LMHead(linear_weight, linear_bias),
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        gradient=gradient,
        vocab_order=vocab_order,
        max_workspace_mb=max_workspace_mb,
        backend=backend,
    )
    loss = loss if weight is None else (loss * weights).to(loss.dtype)
    if reduction == "none":
        return loss
    return total(loss) if reduction == "sum" else total(loss) / total(weights).to(loss.dtype)


def _check_options(options: object) -> None:
    kind = getattr(nn, "LinearCrossEntropyOptions", None)  # torch 2.13 has it
    if options is not None and (kind is None or not isinstance(options, kind)):
        raise ValueError(f"options: expected an nn.LinearCrossEntropyOptions or None, got {options!r}")
