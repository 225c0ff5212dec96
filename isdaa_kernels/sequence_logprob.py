"""Token log-probs -> one log-prob a sequence, summed in fp64.

Letters: N tokens of a packed batch, S sequences, T tokens of a padded row.
"""

import torch
from torch import Tensor

from isdaa_kernels.objectives.options import describe
from isdaa_kernels.objectives.tokens import TokenPlace
from isdaa_kernels.ops import segment_sum


def sequence_logprob(
    logprob: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduce: str = "sum",
    token_weight: Tensor | None = None,
) -> Tensor:
    """Sum or mean of the token log-probs of each sequence; fp64 [S].

    Equal to, for a padded batch::

        scored = torch.where(mask, logprob.double() * token_weight, 0)      # [S, T]
        scored.sum(-1)   or   scored.sum(-1) / mask.sum(-1)

    fp64 because an importance weight exponentiates the result: at 32768 tokens an fp32 sum is off by about 0.006.

    logprob       packed [N] with `cu_seqlens`, or padded [S, T] with `mask`; any floating dtype; differentiable.
    cu_seqlens    [S + 1] int32 or int64, where each sequence starts, and N at the end; it counts all tokens, ignored
                  ones too.
    mask          bool, shaped like logprob, True where a token is scored. May be left out of a packed batch for
                  reduce="sum", as `linear_logprob` gives 0 where a target is ignored. What lies under False is never
                  read, be it NaN.
    reduce        "sum", or "mean": over the number of scored tokens (weights do not enter the count); an empty sequence
                  gives 0.
    token_weight  a factor for each token, shaped like logprob.

    A NaN stays in its sequence. The values of cu_seqlens are checked where that needs no wait: on the CPU. Raises
    ValueError for shapes, dtypes, devices or values other than these.
    """
    _check_arguments(logprob, cu_seqlens, mask, reduce, token_weight)
    if cu_seqlens is None:
        S, T = logprob.shape
        cu_seqlens = torch.arange(S + 1, device=logprob.device) * T
    check_cu_seqlens(cu_seqlens, logprob.numel(), logprob.device)
    # Both factors are masked: 0 * NaN in the backward would leak what lies under the mask.
    value_N = _masked(logprob, mask)
    if token_weight is not None:
        value_N = value_N.double() * _masked(token_weight, mask)
    sum_S = segment_sum(value_N.reshape(-1), cu_seqlens)
    return sum_S if reduce == "sum" else sum_S / sequence_length(mask.reshape(-1), cu_seqlens).clamp(min=1)


def sequence_length(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How many tokens of each sequence are True in `mask` (bool [N]); fp64 [S]."""
    return segment_sum(mask.double(), cu_seqlens)


def token_place(scored_N: Tensor, cu_seqlens: Tensor, pairs: Tensor | None) -> TokenPlace:
    """Where each token of a packed batch of pairs stands. scored_N: bool. pairs: [P, 2] rows; None: p and P + p."""
    N, S = scored_N.numel(), cu_seqlens.numel() - 1
    sequence_N = torch.bucketize(torch.arange(N, device=scored_N.device), cu_seqlens[1:], right=True)
    before_N = scored_N.cumsum(0) - scored_N.long()
    # one more, for a last sequence without tokens
    before_S = torch.cat([before_N, scored_N.sum().view(1)])[cu_seqlens[:-1].long()]
    length_S = sequence_length(scored_N, cu_seqlens)
    if pairs is None:
        pairs = torch.arange(S, device=scored_N.device).view(2, -1).T
    chosen_P, rejected_P = pairs.long().unbind(1)
    other_S = torch.full_like(length_S, torch.inf)
    other_S = other_S.scatter_reduce(0, chosen_P, length_S[rejected_P], "amin")
    other_S = other_S.scatter_reduce(0, rejected_P, length_S[chosen_P], "amin")
    return TokenPlace((before_N - before_S[sequence_N]).double(), length_S[sequence_N], other_S[sequence_N])


def check_cu_seqlens(cu_seqlens: Tensor, N: int, device: torch.device, *, validate: bool = False) -> None:
    """ValueError unless `cu_seqlens` cuts N tokens into sequences.

    Its values are looked at on the CPU only, as anywhere else that waits for the device, unless `validate`.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected a tensor [S + 1], got {describe(cu_seqlens)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device}, got {cu_seqlens.device}")
    # A compiled graph cannot branch on values.
    if (validate or device.type == "cpu") and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != N or ends != sorted(ends):
            raise ValueError(f"cu_seqlens: expected non-decreasing values from 0 to {N}, got {ends}")


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0)


def _check_arguments(
    logprob: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, reduce: str, token_weight: Tensor | None
) -> None:
    if not logprob.is_floating_point() or logprob.ndim != (2 if cu_seqlens is None else 1):
        expected = "[S, T] (padded)" if cu_seqlens is None else "[N] (packed, with cu_seqlens)"
        raise ValueError(f"logprob: expected a floating tensor {expected}, got {describe(logprob)}")
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce: expected 'sum' or 'mean', got {reduce!r}")
    if mask is None and (cu_seqlens is None or reduce == "mean"):
        what = "a padded batch" if cu_seqlens is None else "reduce='mean'"
        raise ValueError(f"mask: expected a bool tensor {list(logprob.shape)} for {what}, got None")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != logprob.shape):
        raise ValueError(f"mask: expected bool {list(logprob.shape)}, got {describe(mask)}")
    if token_weight is not None and token_weight.shape != logprob.shape:
        raise ValueError(f"token_weight: expected {list(logprob.shape)}, got {describe(token_weight)}")
    for name, tensor in (("mask", mask), ("token_weight", token_weight)):
        if tensor is not None and tensor.device != logprob.device:
            raise ValueError(f"{name}: expected on {logprob.device}, got {tensor.device}")
