"""Sums over the segments of a packed batch. N tokens, S segments."""

import torch
from torch import Tensor


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
