"""Existing logits on the CPU: the row kernels read them in place where they have the dtype of the arithmetic and contiguous rows; others
pass tile by tile through one buffer. Never a copy of all.

N tokens, V vocabulary, T tokens and C vocabulary columns of a tile.
"""

from itertools import product

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu.sums import Upstream
from isdaa_kernels.backends.cpu.tiles import RowKernels, State, finish, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest, TokenGradient
from isdaa_kernels.targets import raise_bad_targets, scored_rows

# One tile is 2 MiB of fp32, so that it stays in the cache between its passes. The columns decide the order of summation: fixed.
TOKENS, COLUMNS = 256, 2048


def forward_logits(
    problem: Problem,
    logits_NV: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    stats: StatsRequest,
) -> tuple[Tensor, Tensor, Tensor]:
    raise_bad_targets(targets_N, problem.V, ignore_index)
    dtype = problem.compute_dtype
    rows = scored_rows(targets_N, ignore_index, problem.N)
    kernels, state = RowKernels(transform, rows, targets_N, dtype), State(len(rows), problem.V, dtype, stats)
    direct = _direct(logits_NV, dtype)
    for token, column, scratch_TC in _tiles(len(rows), problem.V, dtype):
        rows_T, part = rows[slice(*token)], logits_NV[:, slice(*column)]
        if direct:
            kernels.forward_tile(part, rows_T, scratch_TC, token[0], column[0], state)
        else:
            _load(part, rows_T, scratch_TC)
            kernels.forward_tile(scratch_TC, None, scratch_TC, token[0], column[0], state)
    return finish(state, rows, len(targets_N), dtype)


def backward_logits(
    problem: Problem,
    grad: TokenGradient,
    logits_NV: Tensor,
    out_NV: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    logprob_N: Tensor,
    lse_N: Tensor,
) -> None:
    dtype = problem.compute_dtype
    active_N = (targets_N != ignore_index) & grad.active()
    rows = active_N.nonzero()[:, 0]
    upstream = Upstream(grad.select(rows).map(lambda term_N: term_N.to(dtype)))
    kernels, lse = RowKernels(transform, rows, targets_N, dtype), lse_N.index_select(0, rows)
    read, write = _direct(logits_NV, dtype), _direct(out_NV, dtype)
    for token, column, scratch_TC in _tiles(len(rows), problem.V, dtype):
        rows_T = rows[slice(*token)]
        source, out = logits_NV[:, slice(*column)], out_NV[:, slice(*column)]
        if not read:
            _load(source, rows_T, scratch_TC)
        kernels.backward_tile(
            source if read else scratch_TC,
            rows_T if read else None,
            out if write else scratch_TC,
            rows_T if write else None,
            token[0],
            column[0],
            lse,
            upstream.mantissa,
            upstream.scale_N,
        )
        if not write:
            out.index_copy_(0, rows_T, scratch_TC.to(out.dtype))
    out_NV.index_fill_(0, (~active_N).nonzero()[:, 0], 0)


def _direct(matrix_NV: Tensor, dtype: torch.dtype) -> bool:
    """Whether the row kernels can work on it where it lies."""
    return matrix_NV.dtype == dtype and (matrix_NV.stride(1) == 1 or matrix_NV.shape[1] == 1)


def _tiles(N: int, V: int, dtype: torch.dtype):
    """Yields (token span, column span, buffer [T, C]); a token's columns come one after the other, as they lie in memory."""
    buffer = torch.empty(min(TOKENS, N) * min(COLUMNS, V), dtype=dtype)
    for token, column in product(spans(N, TOKENS), spans(V, COLUMNS)):
        T, C = token[1] - token[0], column[1] - column[0]
        yield token, column, buffer[: T * C].view(T, C)


def _load(part_NC: Tensor, rows_T: Tensor, out_TC: Tensor) -> None:
    """The given rows, widened. Neighbours, the ordinary case, without a gather."""
    first, count = int(rows_T[0]), len(rows_T)
    if int(rows_T[-1]) - first == count - 1:
        out_TC.copy_(part_NC[first : first + count])
    else:
        out_TC.copy_(part_NC.index_select(0, rows_T))
