"""Kernels of what the routed backward does not recompute: mass times the mean distribution of the block, through two products of the
width of the number of blocks.

T tokens of a slab, N tokens of the call, L live ones, B blocks, D hidden size, V vocabulary, C vocabulary rows of a chunk. The factors
that are no inputs are fp32 numbers: where the other factor is 16-bit they enter as two 16-bit halves, for a single one would leave the
rows of the gradient of the logits a sum of 2^-9 of what is not routed.
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.tiles import dot, narrow


@triton.jit
def dot_halves(a_MK, b_KN, acc_MN, dtype: tl.constexpr):
    """acc + a @ b for an fp32 factor a and b in `dtype`."""
    if dtype == tl.float32:
        acc_MN = dot(a_MK, b_KN, acc_MN, "ieee")
    else:
        high_MK = narrow(a_MK, dtype)
        acc_MN = dot(narrow(a_MK - high_MK.to(tl.float32), dtype), b_KN, acc_MN, "ieee")
        acc_MN = dot(high_MK, b_KN, acc_MN, "ieee")
    return acc_MN


@triton.jit
def rest_of(route, log_mass, rows, tokens, b_B, i_T, live, logit_scale, first, T, L, N, B, LEAST: tl.constexpr):
    """[B, T]: coefficient of the product's gradient times the mass that is not recomputed, 0 where the route is LEAST or more."""
    inside_T = i_T < live
    coefficient_T = tl.load(tokens + 4 * T + i_T, mask=inside_T, other=0.0)
    coefficient_T *= logit_scale * tl.load(tokens + i_T, mask=inside_T, other=0.0)
    mask_BT = (b_B < B)[:, None] & (inside_T & (coefficient_T != 0.0))[None, :]
    n_T = tl.load(rows + first + i_T, mask=inside_T, other=0)
    b_B = b_B.to(tl.int64)
    kind_BT = tl.load(route + b_B[:, None] * L + (first + i_T)[None, :], mask=mask_BT, other=2)
    share_BT = tl.load(
        log_mass + b_B[:, None] * N + n_T[None, :], mask=mask_BT & (kind_BT < LEAST), other=float("-inf")
    )
    return tl.exp(share_BT) * coefficient_T[None, :]


@triton.jit
def rest_weight_kernel(
    route, log_mass, rows, count, tokens,
    hidden,  # [T, D] times 2 ** -back of its token
    poison,  # fp32 [1]: NaN where a token of the call has a number that is not finite, else 0
    sums,  # fp32 [B, D]
    first, T, D, L, N_TOKENS, B, stride_hidden, logit_scale, FIRST: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """sums[b] (+)= the sum over tokens of rest[b, i] * hidden[i]. Grid: (cdiv(D, N), cdiv(B, M))."""
    b_M, d_N = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    mask_MN = (b_M < B)[:, None] & (d_N < D)[None, :]
    sums_MN = sums + b_M.to(tl.int64)[:, None] * D + d_N[None, :]
    acc_MN = tl.zeros((M, N), tl.float32)
    live = tl.maximum(tl.minimum(tl.load(count) - first, T), 0)
    for k in range(0, live, K):
        i_K = k + tl.arange(0, K)
        a_MK = rest_of(route, log_mass, rows, tokens, b_M, i_K, live, logit_scale, first, T, L, N_TOKENS, B, 1)
        h_KN = tl.load(
            hidden + i_K.to(tl.int64)[:, None] * stride_hidden + d_N[None, :], mask=(i_K < live)[:, None] & (d_N < D)[None, :], other=0.0
        )  # fmt: skip
        acc_MN = dot_halves(a_MK, h_KN, acc_MN, hidden.dtype.element_ty)
    if FIRST:
        acc_MN += tl.load(poison)
    else:
        acc_MN += tl.load(sums_MN, mask=mask_MN, other=0.0)
    tl.store(sums_MN, acc_MN, mask=mask_MN)


@triton.jit
def rest_hidden_kernel(
    route, log_mass, rows, count, tokens,
    mean,  # fp32 [B, D]
    sums,  # fp32 [T, D]
    first, T, D, L, N_TOKENS, B, stride_sums, logit_scale, HALVES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """sums[i] += the sum over blocks of rest[b, i] * mean[b]. HALVES: the dtype that both factors are split in, or fp32.
    Grid: (cdiv(D, N), cdiv(T, M))."""
    i_M, d_N = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    live = tl.maximum(tl.minimum(tl.load(count) - first, T), 0)
    if tl.program_id(1) * M < live:
        acc_MN = tl.zeros((M, N), tl.float32)
        for k in range(0, B, K):
            b_K = k + tl.arange(0, K)
            a_MK = tl.trans(
                rest_of(route, log_mass, rows, tokens, b_K, i_M, live, logit_scale, first, T, L, N_TOKENS, B, 2)
            )
            mean_KN = tl.load(
                mean + b_K.to(tl.int64)[:, None] * D + d_N[None, :], mask=(b_K < B)[:, None] & (d_N < D)[None, :], other=0.0
            )  # fmt: skip
            high_KN = narrow(mean_KN, HALVES)
            if tl.float32 != HALVES:
                acc_MN = dot(narrow(a_MK, HALVES), narrow(mean_KN - high_KN.to(tl.float32), HALVES), acc_MN, "ieee")
            acc_MN = dot_halves(a_MK, high_KN, acc_MN, HALVES)
        mask_MN = (i_M < live)[:, None] & (d_N < D)[None, :]
        sums_MN = sums + i_M.to(tl.int64)[:, None] * stride_sums + d_N[None, :]
        tl.store(sums_MN, tl.load(sums_MN, mask=mask_MN, other=0.0) + acc_MN, mask=mask_MN)


@triton.jit
def block_sums_kernel(
    mean_sums, bias_sums,  # fp32 [tiles, C]
    counts,
    mean,  # fp32 [V]: of the chunk's rows on
    bias,  # fp32 [V] or None, likewise
    C, FIRST: tl.constexpr, LAST: tl.constexpr, BIAS_SUMS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Add the tiles' sums in one order, and after the last slab make each block's a distribution: uniform where nothing is routed.
    TILE: tokens of a tile. Grid: (blocks,)."""
    b = tl.program_id(0)
    c_B = b * BLOCK + tl.arange(0, BLOCK)
    inside_B = c_B < C
    sum_B, bias_B = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if not FIRST:
        sum_B = tl.load(mean + c_B, mask=inside_B, other=0.0)
        if BIAS_SUMS:
            bias_B = tl.load(bias + c_B, mask=inside_B, other=0.0)
    tiles = tl.cdiv(tl.load(counts + b), TILE)
    for r in range(0, tiles, R):
        r_R = r + tl.arange(0, R)
        place_RB = r_R.to(tl.int64)[:, None] * C + c_B[None, :]
        mask_RB = (r_R < tiles)[:, None] & inside_B[None, :]
        sum_B += tl.sum(tl.load(mean_sums + place_RB, mask=mask_RB, other=0.0), 0)
        if BIAS_SUMS:
            bias_B += tl.sum(tl.load(bias_sums + place_RB, mask=mask_RB, other=0.0), 0)
    if LAST:
        total = tl.sum(sum_B, 0)
        columns = tl.minimum(C - b * BLOCK, BLOCK).to(tl.float32)
        sum_B = tl.where(total > 0.0, sum_B / tl.where(total > 0.0, total, 1.0), 1.0 / columns)
    tl.store(mean + c_B, sum_B, mask=inside_B)
    if BIAS_SUMS:
        tl.store(bias + c_B, bias_B, mask=inside_B)


@triton.jit
def block_mean_kernel(
    weight,  # [C, D]: the chunk's rows in the order of the blocks
    mean,  # fp32 [C]
    out,  # fp32 [blocks, D]
    D, C, stride_weight_v, stride_weight_d, BLOCK: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[b] = the mean of the block's rows under its distribution. Grid: (blocks, cdiv(D, K))."""
    b = tl.program_id(0)
    d_K = tl.program_id(1) * K + tl.arange(0, K)
    acc_K = tl.zeros((K,), tl.float32)
    for c in range(0, BLOCK, M):
        c_M = b * BLOCK + c + tl.arange(0, M)
        mask_MK = (c_M < C)[:, None] & (d_K < D)[None, :]
        w_MK = tl.load(
            weight + c_M.to(tl.int64)[:, None] * stride_weight_v + d_K.to(tl.int64)[None, :] * stride_weight_d, mask=mask_MK, other=0.0
        ).to(tl.float32)  # fmt: skip
        acc_K += tl.sum(w_MK * tl.load(mean + c_M, mask=c_M < C, other=0.0)[:, None], 0)
    tl.store(out + b.to(tl.int64) * D + d_K, acc_K, mask=d_K < D)
