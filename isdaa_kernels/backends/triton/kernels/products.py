"""Kernels fused into the matrix product: a tile of logits lives in registers and is folded, or turned into its gradient, at once.

T tokens of a slab, M tokens and N vocabulary rows of a tile, K a step along the hidden size, V vocabulary, D hidden size.
Persistent: each program walks tiles until none is left. The number of live tokens is read on the device: no tile is made for others.
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.tiles import (
    fold,
    gradient,
    narrow,
    product_tile,
    split_columns,
    tile_position,
    transform,
)


@triton.jit
def linear_logprob_forward_kernel(
    hidden,  # [T, D], a descriptor where TMA
    weight,  # [V, D], likewise
    bias,  # [V] or None
    targets,  # int64 [T]
    inverse_temperature,  # fp32 [T]
    count,  # int32 [1]: scored tokens of the whole call
    partial_max, partial_sum, partial_entropy, partial_total, partial_squares,  # [cdiv(V, N) * PIECES, T]; fp32, the sum fp64
    target_logit,  # fp32 [T]
    first, T, D, V, stride_hidden, stride_weight_v, stride_weight_d,
    logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TOTAL: tl.constexpr, SQUARES: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr, FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    live = tl.maximum(tl.minimum(tl.load(count) - first, T), 0)  # a slab may begin behind the last token
    tiles_m = tl.cdiv(live, M)
    tiles_n = tl.cdiv(V, N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        m, n = tile_position(tile, tiles_m, tiles_n, GROUP)
        x_MN = product_tile(
            hidden, weight, m * M, n * N, V, D, stride_hidden, stride_weight_v, stride_weight_d, TMA, EVEN_D, PRECISION, M, N, K
        )  # fmt: skip
        row_M = m * M + tl.arange(0, M)
        live_M = row_M < live
        inverse_M = tl.load(inverse_temperature + row_M)
        target_M = tl.load(targets + row_M)
        pieces = split_columns(x_MN, PIECES)
        for piece in tl.static_range(PIECES):
            slot = n * PIECES + piece
            column_P = slot * (N // PIECES) + tl.arange(0, N // PIECES)
            bias_P = tl.load(bias + column_P, mask=column_P < V, other=0.0).to(tl.float32) if HAS_BIAS else None
            z_MP, _ = transform(pieces[piece], bias_P, logit_scale, softcap, inverse_M, HAS_BIAS, HAS_SOFTCAP)
            fold(
                z_MP, slot * (N // PIECES), V, target_M, row_M, live_M, slot, T, partial_max, partial_sum, partial_entropy, partial_total,
                partial_squares, target_logit, EVEN_V, ENTROPY, TOTAL, SQUARES,
            )  # fmt: skip


@triton.jit
def linear_logprob_backward_kernel(
    hidden,  # [T, D] times 2 ** -back of its token, a descriptor where TMA
    weight,  # [V, D], likewise
    bias,  # [V] or None
    targets,  # int64 [T]
    tokens,  # fp32 [10, T], rows as `tokens.token_kernel` writes them
    count,  # int32 [1]: tokens of the whole call that carry a gradient
    out,  # [T, C]: gradient of the product for the vocabulary rows [begin, end), 0 in the target's column and past the last token
    bias_sums,  # fp32 [T / M, C] or None
    first, T, D, V, begin, end, stride_hidden, stride_weight_v, stride_weight_d, stride_out,
    logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LOG_PROB: tl.constexpr, FLAT: tl.constexpr, BIAS_SUMS: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr, FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    live = tl.maximum(tl.minimum(tl.load(count) - first, T), 0)  # a slab may begin behind the last token
    tiles_m = tl.cdiv(live, M)
    tiles_n = tl.cdiv(end - begin, N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        m, n = tile_position(tile, tiles_m, tiles_n, GROUP)
        x_MN = product_tile(
            hidden, weight, m * M, begin + n * N, V, D, stride_hidden, stride_weight_v, stride_weight_d, TMA, EVEN_D, PRECISION,
            M, N, K,
        )  # fmt: skip
        row_M = m * M + tl.arange(0, M)
        out_M = out + row_M.to(tl.int64) * stride_out
        target_M = tl.load(targets + row_M)
        token_M = tokens + row_M
        inverse_M = tl.load(token_M)
        unscale_M = tl.load(token_M + 1 * T)
        lse_high_M, lse_low_M = tl.load(token_M + 2 * T), tl.load(token_M + 3 * T)
        plain_M = tl.load(token_M + 4 * T)
        log_prob_M = tl.load(token_M + 5 * T) if LOG_PROB else None
        flat_M = tl.load(token_M + 6 * T) if FLAT else None
        pieces = split_columns(x_MN, PIECES)
        for piece in tl.static_range(PIECES):
            place_P = (n * PIECES + piece) * (N // PIECES) + tl.arange(0, N // PIECES)
            column_P = begin + place_P
            inside_P = column_P < end
            bias_P = tl.load(bias + column_P, mask=inside_P, other=0.0).to(tl.float32) if HAS_BIAS else None
            z_MP, slope_MP = transform(
                pieces[piece] * unscale_M[:, None], bias_P, logit_scale, softcap, inverse_M, HAS_BIAS, HAS_SOFTCAP
            )
            g_MP = gradient(z_MP, lse_high_M, lse_low_M, plain_M, log_prob_M, flat_M, LOG_PROB, FLAT) * slope_MP
            g_MP = tl.where(column_P[None, :] == target_M[:, None], 0.0, g_MP)
            g_MP = tl.where((row_M < live)[:, None], g_MP, 0.0)
            tl.store(out_M[:, None] + place_P[None, :], narrow(g_MP, out.dtype.element_ty), mask=inside_P[None, :])
            if BIAS_SUMS:
                sums_P = tl.sum(g_MP * tl.load(token_M + 7 * T)[:, None], 0)
                tl.store(bias_sums + m.to(tl.int64) * (end - begin) + place_P, sums_P, mask=inside_P)
    zero_behind(out, tiles_m * M, T, end - begin, stride_out, N)


@triton.jit
def zero_behind(out, begin, T, C, stride_out, N: tl.constexpr):
    """Rows [begin, T) of out [T, C]: a library product reads them all."""
    columns = tl.cdiv(C, N)
    for place in tl.range(tl.program_id(0), (T - begin) * columns, tl.num_programs(0)):
        row = begin + place // columns
        column_N = place % columns * N + tl.arange(0, N)
        tl.store(
            out + row.to(tl.int64) * stride_out + column_N,
            tl.zeros((N,), dtype=out.dtype.element_ty),
            mask=column_N < C,
        )
