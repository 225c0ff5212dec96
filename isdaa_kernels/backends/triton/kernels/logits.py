"""Kernels over logits in memory: one read of each. They serve products left to the library, and callers who hold logits already.

T tokens, M tokens and N columns of a tile, C columns of the chunk, V vocabulary.
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.tiles import fold, gradient, narrow, transform


@triton.jit
def fold_logits_kernel(
    logits,  # [., C]: logits, or the product for the vocabulary rows from `begin` on
    rows,  # int64: the row of each token, or None: token i is row i
    bias,  # [V] or None
    targets,  # int64 [T]
    inverse_temperature,  # fp32 [T]
    count,  # int32 [1]
    partial_max, partial_sum, partial_entropy, partial_total, partial_squares,  # [B, T]
    target_logit,  # fp32 [T]
    first, T, begin, end, stride_n, stride_v, logit_scale, softcap,
    GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOTAL: tl.constexpr,
    SQUARES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(T, M), cdiv(C, N)); the slot of a tile is begin / N + its column."""
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (row_M < T) & (first + row_M < tl.load(count))
    column_N = begin + tl.program_id(1) * N + tl.arange(0, N)
    source_M = row_M.to(tl.int64)
    if GATHER:
        source_M = tl.load(rows + first + row_M, mask=live_M, other=0)
    place_MN = source_M[:, None] * stride_n + (column_N - begin).to(tl.int64)[None, :] * stride_v
    x_MN = tl.load(logits + place_MN, mask=live_M[:, None] & (column_N < end)[None, :], other=0.0).to(tl.float32)
    bias_N = tl.load(bias + column_N, mask=column_N < end, other=0.0).to(tl.float32) if HAS_BIAS else None
    inverse_M = tl.load(inverse_temperature + row_M, mask=live_M, other=1.0)
    z_MN, _ = transform(x_MN, bias_N, logit_scale, softcap, inverse_M, HAS_BIAS, HAS_SOFTCAP)
    target_M = tl.load(targets + row_M, mask=live_M, other=-1)
    fold(
        z_MN, begin + tl.program_id(1) * N, end, target_M, row_M, live_M, begin // N + tl.program_id(1), T, partial_max, partial_sum,
        partial_entropy, partial_total, partial_squares, target_logit, False, ENTROPY, TOTAL, SQUARES,
    )  # fmt: skip


@triton.jit
def gradient_logits_kernel(
    logits,  # as above
    out,  # gradient of `logits`; may be `logits` itself
    bias,  # [V] or None
    targets,  # int64 [T]
    tokens,  # fp32 [10, T], as `tokens.token_kernel` writes them
    bias_sums,  # fp32 [T / M, C] or None
    live,  # bool [T]: rows that carry a gradient; the others become 0
    T, begin, end, stride_n, stride_v, stride_out_n, stride_out_v, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LOG_PROB: tl.constexpr, FLAT: tl.constexpr, BIAS_SUMS: tl.constexpr,
    TARGET: tl.constexpr,  # the target's own entry stands in its column; else 0 does, and it is added outside
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    inside_M = row_M < T
    live_M = tl.load(live + row_M, mask=inside_M, other=0) != 0
    column_N = begin + tl.program_id(1) * N + tl.arange(0, N)
    place_N = (column_N - begin).to(tl.int64)
    mask_MN = inside_M[:, None] & (column_N < end)[None, :]
    x_MN = tl.load(
        logits + row_M.to(tl.int64)[:, None] * stride_n + place_N[None, :] * stride_v, mask=mask_MN & live_M[:, None], other=0.0
    ).to(tl.float32)  # fmt: skip
    bias_N = tl.load(bias + column_N, mask=column_N < end, other=0.0).to(tl.float32) if HAS_BIAS else None
    token_M = tokens + row_M
    x_MN = x_MN * tl.load(token_M + T, mask=inside_M, other=1.0)[:, None]
    inverse_M = tl.load(token_M, mask=inside_M, other=1.0)
    z_MN, slope_MN = transform(x_MN, bias_N, logit_scale, softcap, inverse_M, HAS_BIAS, HAS_SOFTCAP)
    g_MN = gradient(
        z_MN, tl.load(token_M + 2 * T, mask=inside_M, other=0.0), tl.load(token_M + 3 * T, mask=inside_M, other=0.0),
        tl.load(token_M + 4 * T, mask=inside_M, other=0.0), tl.load(token_M + 5 * T, mask=inside_M, other=0.0),
        tl.load(token_M + 6 * T, mask=inside_M, other=0.0), LOG_PROB, FLAT,
    ) * slope_MN  # fmt: skip
    target_M = tl.load(targets + row_M, mask=inside_M, other=-1)
    entry_M = tl.load(token_M + 8 * T, mask=inside_M, other=0.0) if TARGET else tl.zeros((M,), tl.float32)
    g_MN = tl.where(column_N[None, :] == target_M[:, None], entry_M[:, None], g_MN)
    g_MN = tl.where(live_M[:, None], g_MN, 0.0)
    if BIAS_SUMS:
        scale_M = tl.load(token_M + 7 * T, mask=inside_M, other=0.0)
        sums_N = tl.sum(g_MN * scale_M[:, None], 0)
        tl.store(bias_sums + tl.program_id(0).to(tl.int64) * (end - begin) + place_N, sums_N, mask=column_N < end)
    tl.store(
        out + row_M.to(tl.int64)[:, None] * stride_out_n + place_N[None, :] * stride_out_v,
        narrow(g_MN, out.dtype.element_ty), mask=mask_MN,
    )  # fmt: skip
