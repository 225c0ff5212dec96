"""A drop-in for `cut_cross_entropy.linear_cross_entropy`, after its public documentation.

T tokens of a sequence, D hidden size, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor

from isdaa_kernels import LMHead, Routed, VocabOrder, shift_targets
from isdaa_kernels.integrations.cross_entropy import check_reduction, token_cross_entropy, total

IMPLEMENTATIONS = ("cce", "torch_compile", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_c_full_e", "cce_exact")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | None = None,
    *,
    use_kahan: bool = False,
    vocab_parallel_options: object = None,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of `targets` under the classifier `c`, without the logits. Equal to

        logits = (e @ c.T + bias).float()
        logits = softcap * (logits / softcap).tanh()                 # softcap only where given
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction=reduction)

    e [..., D], c [V, D], targets [...]. shift: e[..., i, :] is scored against targets[..., i + shift] (True: 1)
    without a copy of either; with reduction "none" the result is [..., T - shift] then. return_lse: also the
    log-sum-exp of the logits, in the shape that "none" has, differentiable, 0 at ignored tokens.

    filter_eps "auto", None or 0, filter_e_grad, filter_c_grad, accum_e_fp32, accum_c_fp32, use_kahan and impl change
    no number here: the gradient is not filtered (the exact one is within any filter's error) and is summed in fp32
    always. A filter_eps above 0 raises ValueError: what the kernels can leave out, and by how much that is off, is
    said by gradient=Routed(...). vocab_parallel_options raises NotImplementedError. gradient, vocab_order,
    max_workspace_mb, backend: as in `isdaa_kernels.linear_logprob`.

    fp32 (fp64 for fp64 inputs). The mean over no target is NaN, as in torch.
    """
    check_reduction(reduction)
    if filter_eps not in ("auto", None, 0):
        raise ValueError(
            f"filter_eps: expected 'auto', None or 0, got {filter_eps!r}: gradients are exact, or routed by gradient=Routed(...)"
        )
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if vocab_parallel_options is not None:
        raise NotImplementedError("vocab_parallel_options: expected None; a classifier in shards is not supported")
    if not isinstance(shift, int):
        raise ValueError(f"shift: expected True, False or a whole number, got {shift!r}")
    shifted = _shifted(targets, int(shift), ignore_index)
    loss, _, stats = token_cross_entropy(
        e,
        LMHead(c, bias, softcap=softcap),
        shifted,
        ignore_index=ignore_index,
        stats=("lse",) if return_lse else (),
        gradient=gradient,
        vocab_order=vocab_order,
        max_workspace_mb=max_workspace_mb,
        backend=backend,
    )
    kept = targets.shape[-1] - int(shift) if shift else None
    count = (shifted != ignore_index).sum() if reduction == "mean" else 1
    loss = loss[..., :kept] if reduction == "none" else total(loss) / count
    return (loss, stats.lse[..., :kept]) if return_lse else loss


def _shifted(targets: Tensor, shift: int, ignore_index: int) -> Tensor:
    if shift == 0:
        return targets
    if targets.ndim == 0 or not 0 < shift < targets.shape[-1]:
        raise ValueError(
            f"shift: expected from 0 to less than the length of {list(targets.shape)} targets, got {shift}"
        )
    if shift == 1:
        return shift_targets(targets, ignore_index=ignore_index)
    later = torch.full_like(targets, ignore_index)
    later[..., :-shift] = targets[..., shift:]
    return later
