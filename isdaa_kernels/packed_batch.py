"""Hidden states of a packed batch and a head: the checks that losses share, and the log-probs of tokens.

Letters: N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isdaa_kernels.linear_kl import KlLogprobs, linear_kl
from isdaa_kernels.linear_logprob import linear_logprob, linear_logprob_stats
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.sequence_logprob import check_cu_seqlens
from isdaa_kernels.stats import VocabStats


def evaluate(
    hidden: Tensor,
    head: LMHead | Tensor,
    targets: Tensor,
    kernel: dict,
    stats: Sequence[str] = (),
    detached: Sequence[str] = (),
    top_k: int = 20,
) -> tuple[Tensor, VocabStats | None]:
    """Token log-probs [N], and statistics of each token's distribution where any are asked for."""
    head = head if isinstance(head, LMHead) else LMHead(head)
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    if not stats:
        return linear_logprob(hidden, head.weight, targets, **transforms, **kernel).reshape(-1), None
    logprob, found = linear_logprob_stats(
        hidden, head.weight, targets, stats=stats, detached=detached, top_k=top_k, **transforms, **kernel
    )
    return logprob.reshape(-1), found


def evaluate_both(
    hidden: Tensor,
    head: LMHead | Tensor,
    reference: tuple[Tensor, LMHead | Tensor],
    targets: Tensor,
    kernel: dict,
    direction: str,
) -> KlLogprobs:
    """Token log-probs of policy and reference and the divergence between them, [N] each, in one pass."""
    kernel = {name: value for name, value in kernel.items() if name not in ("gradient", "vocab_order")}
    found = linear_kl(hidden, head, *reference, targets=targets, direction=direction, logprobs=True, **kernel)
    return KlLogprobs(*(x.reshape(-1) for x in found))


def check_exact(why: str, gradient: object, vocab_order: object) -> None:
    """ValueError for options of a routed gradient where a divergence between two heads is computed, which has none."""
    if gradient != "exact":
        raise ValueError(f"gradient: expected 'exact' {why}, got {gradient}")
    if vocab_order is not None:
        raise ValueError(f"vocab_order: would be ignored {why}; expected None")


def check_batch(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, validate: bool) -> torch.Size:
    """The shape of the tokens, [N] or [1, N], after checking that the batch is packed."""
    if hidden.ndim not in (2, 3) or (hidden.ndim == 3 and hidden.shape[0] != 1):
        raise ValueError(f"hidden: expected [N, D] or [1, N, D], got {list(hidden.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: expected {list(hidden.shape[:-1])}, got {list(targets.shape)}")
    check_cu_seqlens(cu_seqlens, targets.numel(), hidden.device, validate=validate)
    return targets.shape


def check_reference(
    reference_logprob: Tensor | None, reference: tuple | None, token_shape: torch.Size, head: LMHead | Tensor
) -> None:
    """ValueError unless there is at most one of the two, and `reference` fits the tokens and the vocabulary of `head`."""
    if reference_logprob is not None and reference is not None:
        raise ValueError("reference_logprob, reference: expected one of the two, got both")
    if reference is None:
        return
    if not isinstance(reference, tuple) or len(reference) != 2:
        raise ValueError(f"reference: expected a tuple (hidden, head), got {type(reference).__name__}")
    hidden, weight = reference[0], _weight(reference[1])
    if not isinstance(hidden, Tensor) or hidden.shape[:-1] != token_shape:
        got = list(hidden.shape) if isinstance(hidden, Tensor) else repr(hidden)
        raise ValueError(f"reference: expected hidden {[*token_shape, 'D']}, got {got}")
    rows = len(_weight(head))
    if len(weight) != rows:
        raise ValueError(f"reference: expected a head of {rows} rows, the policy's vocabulary, got {len(weight)}")
    if weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(f"reference: expected a head [{rows}, {hidden.shape[-1]}], got {list(weight.shape)}")


def _weight(head: LMHead | Tensor) -> Tensor:
    return head.weight if isinstance(head, LMHead) else head
