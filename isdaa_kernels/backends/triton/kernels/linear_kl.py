"""Kernels of `linear_kl` fused into both heads' products: a tile of each head's logits lives in registers, and they are folded together.

T tokens of a slab, M tokens and N vocabulary rows of a tile, K a step along the hidden sizes D and E, V vocabulary, S slots of partial
results. Persistent, as in `products`. The policy's and the reference's tiles have one shape, so that equal heads give equal bits.
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.divergence import (
    FORWARD,
    kl_gradient,
    kl_mixture,
    kl_sums,
    store_fold,
    store_gradient,
    store_mixture,
    store_target,
    tops,
)
from isdaa_kernels.backends.triton.kernels.products import zero_behind
from isdaa_kernels.backends.triton.kernels.tiles import product_tile, split_columns, tile_position, transform


@triton.jit
def final_logits(
    x_MN, y_MN, policy_bias, reference_bias, column_N, end, inverse_M, policy_scale, policy_softcap, reference_scale, reference_softcap,
    POLICY_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REFERENCE_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """(z of the policy, z of the reference, dz / dx of the policy) from both products; -inf in columns from `end` on."""
    inside_N = column_N < end
    p_bias_N = tl.load(policy_bias + column_N, mask=inside_N, other=0.0).to(tl.float32) if POLICY_BIAS else None
    q_bias_N = tl.load(reference_bias + column_N, mask=inside_N, other=0.0).to(tl.float32) if REFERENCE_BIAS else None
    zp_MN, slope_MN = transform(x_MN, p_bias_N, policy_scale, policy_softcap, inverse_M, POLICY_BIAS, POLICY_SOFTCAP)
    zq_MN, _ = transform(
        y_MN, q_bias_N, reference_scale, reference_softcap, inverse_M, REFERENCE_BIAS, REFERENCE_SOFTCAP
    )
    if not EVEN:
        zp_MN = tl.where(inside_N[None, :], zp_MN, float("-inf"))
        zq_MN = tl.where(inside_N[None, :], zq_MN, float("-inf"))
    return zp_MN, zq_MN, slope_MN


@triton.jit
def linear_kl_forward_kernel(
    policy_hidden, reference_hidden,  # [T, D], [T, E], descriptors where TMA
    policy_weight, reference_weight,  # [V, D], [V, E], likewise
    policy_bias, reference_bias,  # [V] or None
    inverse_temperature,  # fp32 [T]
    tokens,  # fp32 [17, T] as `backends.gpu.kl_tokens` makes them, where MIXTURE
    targets,  # int32 [T], where LOGPROBS
    target_logit,  # fp32 [2, T] of policy and reference, where LOGPROBS
    count,  # int32 [1]: scored tokens of the whole call
    partial,  # fp32 [., S, T]
    first, T, S, D, E, V, stride_policy_hidden, stride_policy_weight_v, stride_policy_weight_d, stride_reference_hidden,
    stride_reference_weight_v, stride_reference_weight_d,
    policy_scale, policy_softcap, reference_scale, reference_softcap, rest, weight,
    POLICY_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REFERENCE_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
    DIRECTION: tl.constexpr, MIXTURE: tl.constexpr, LOGPROBS: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Both log-sum-exps and the divergence's sums, or, MIXTURE, the sums of jsd, which needs the log-sum-exps first."""
    live = tl.maximum(tl.minimum(tl.load(count) - first, T), 0)  # a slab may begin behind the last token
    tiles_m, tiles_n = tl.cdiv(live, M), tl.cdiv(V, N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_position(tile, tiles_m, tiles_n, GROUP)
        x_MN = product_tile(
            policy_hidden, policy_weight, m * M, n * N, V, D, stride_policy_hidden, stride_policy_weight_v, stride_policy_weight_d, TMA,
            EVEN_D, PRECISION, M, N, K,
        )  # fmt: skip
        y_MN = product_tile(
            reference_hidden, reference_weight, m * M, n * N, V, E, stride_reference_hidden, stride_reference_weight_v,
            stride_reference_weight_d, TMA, EVEN_E, PRECISION, M, N, K,
        )  # fmt: skip
        row_M = m * M + tl.arange(0, M)
        live_M = row_M < live
        inverse_M = tl.load(inverse_temperature + row_M)
        x_pieces, y_pieces = split_columns(x_MN, PIECES), split_columns(y_MN, PIECES)
        if MIXTURE:
            p_M, q_M, a_M = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
            for piece in tl.static_range(PIECES):
                begin = n * N + piece * (N // PIECES)
                zp_MP, zq_MP, _ = final_logits(
                    x_pieces[piece], y_pieces[piece], policy_bias, reference_bias, begin + tl.arange(0, N // PIECES), V,
                    inverse_M, policy_scale, policy_softcap, reference_scale, reference_softcap, POLICY_BIAS, POLICY_SOFTCAP,
                    REFERENCE_BIAS, REFERENCE_SOFTCAP, EVEN_V,
                )  # fmt: skip
                p_share_M, q_share_M, a_share_M = kl_mixture(zp_MP, zq_MP, tokens + row_M, rest, weight, T)
                p_M += p_share_M
                q_M += q_share_M
                a_M += a_share_M
            store_mixture(p_M, q_M, a_M, n, S, T, row_M, live_M, partial)
        else:
            p_top_M, q_top_M = tl.full((M,), float("-inf"), tl.float32), tl.full((M,), float("-inf"), tl.float32)
            center_M, p_M, p_ones_M = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
            q_M, q_ones_M, a_M, b_M, c_M = p_M, p_M, p_M, p_M, p_M
            for piece in tl.static_range(PIECES):
                begin = n * N + piece * (N // PIECES)
                zp_MP, zq_MP, _ = final_logits(
                    x_pieces[piece], y_pieces[piece], policy_bias, reference_bias, begin + tl.arange(0, N // PIECES), V,
                    inverse_M, policy_scale, policy_softcap, reference_scale, reference_softcap, POLICY_BIAS, POLICY_SOFTCAP,
                    REFERENCE_BIAS, REFERENCE_SOFTCAP, EVEN_V,
                )  # fmt: skip
                p_here_M, q_here_M, gap_M = tops(zp_MP, zq_MP, DIRECTION)
                above_M = q_here_M > q_top_M if DIRECTION == FORWARD else p_here_M > p_top_M
                center_M = tl.where(above_M, gap_M, center_M)
                p_top_M, q_top_M = tl.maximum(p_top_M, p_here_M), tl.maximum(q_top_M, q_here_M)
                if LOGPROBS:
                    store_target(zp_MP, zq_MP, begin, tl.load(targets + row_M), row_M, live_M, T, target_logit)
            for piece in tl.static_range(PIECES):
                begin = n * N + piece * (N // PIECES)
                zp_MP, zq_MP, _ = final_logits(
                    x_pieces[piece], y_pieces[piece], policy_bias, reference_bias, begin + tl.arange(0, N // PIECES), V,
                    inverse_M, policy_scale, policy_softcap, reference_scale, reference_softcap, POLICY_BIAS, POLICY_SOFTCAP,
                    REFERENCE_BIAS, REFERENCE_SOFTCAP, EVEN_V,
                )  # fmt: skip
                p_share_M, p_here_M, q_share_M, q_here_M, a_share_M, b_share_M, c_share_M = kl_sums(
                    zp_MP, zq_MP, p_top_M, q_top_M, center_M, DIRECTION
                )
                p_M += p_share_M
                p_ones_M += p_here_M
                q_M += q_share_M
                q_ones_M += q_here_M
                a_M += a_share_M
                b_M += b_share_M
                c_M += c_share_M
            store_fold(
                p_top_M, q_top_M, center_M, p_M, p_ones_M, q_M, q_ones_M, a_M, b_M, c_M, n, S, T, row_M, live_M, partial, DIRECTION
            )  # fmt: skip


@triton.jit
def linear_kl_backward_kernel(
    policy_hidden, reference_hidden,  # [T, D] times 2 ** -back of its token, [T, E]; descriptors where TMA
    policy_weight, reference_weight,  # [V, D], [V, E], likewise
    policy_bias, reference_bias,  # [V] or None
    targets,  # int32 [T], where LOGPROBS
    tokens,  # fp32 [17, T] as `backends.gpu.kl_tokens` makes them
    count,  # int32 [1]: tokens of the whole call that carry a gradient
    out,  # [T, C]: gradient of the policy's product for the vocabulary rows [begin, end), 0 past the last token
    low,  # [T, C] likewise, what rounding that left divided by LOW, where PARTS is 2
    bias_sums,  # fp32 [T / M, C] or None
    first, T, D, E, V, begin, end, stride_policy_hidden, stride_policy_weight_v, stride_policy_weight_d, stride_reference_hidden,
    stride_reference_weight_v, stride_reference_weight_d, stride_out,
    policy_scale, policy_softcap, reference_scale, reference_softcap, rest, weight,
    POLICY_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REFERENCE_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
    DIRECTION: tl.constexpr, BIAS_SUMS: tl.constexpr, LOGPROBS: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    live = tl.maximum(tl.minimum(tl.load(count) - first, T), 0)  # a slab may begin behind the last token
    tiles_m, tiles_n = tl.cdiv(live, M), tl.cdiv(end - begin, N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_position(tile, tiles_m, tiles_n, GROUP)
        x_MN = product_tile(
            policy_hidden, policy_weight, m * M, begin + n * N, V, D, stride_policy_hidden, stride_policy_weight_v, stride_policy_weight_d,
            TMA, EVEN_D, PRECISION, M, N, K,
        )  # fmt: skip
        y_MN = product_tile(
            reference_hidden, reference_weight, m * M, begin + n * N, V, E, stride_reference_hidden, stride_reference_weight_v,
            stride_reference_weight_d, TMA, EVEN_E, PRECISION, M, N, K,
        )  # fmt: skip
        row_M = m * M + tl.arange(0, M)
        live_M = row_M < live
        place_M, inverse_M = row_M.to(tl.int64) * stride_out, tl.load(tokens + row_M)
        target_M = tl.load(targets + row_M) if LOGPROBS else None
        x_pieces, y_pieces = split_columns(x_MN, PIECES), split_columns(y_MN, PIECES)
        for piece in tl.static_range(PIECES):
            place_P = (n * PIECES + piece) * (N // PIECES) + tl.arange(0, N // PIECES)
            inside_P = begin + place_P < end
            unscale_M = tl.load(tokens + 1 * T + row_M)
            zp_MP, zq_MP, slope_MP = final_logits(
                x_pieces[piece] * unscale_M[:, None], y_pieces[piece], policy_bias, reference_bias, begin + place_P, end, inverse_M,
                policy_scale, policy_softcap, reference_scale, reference_softcap, POLICY_BIAS, POLICY_SOFTCAP, REFERENCE_BIAS,
                REFERENCE_SOFTCAP, EVEN_V,
            )  # fmt: skip
            g_MP = kl_gradient(
                zp_MP, zq_MP, begin + place_P, target_M, tokens + row_M, rest, weight, T, DIRECTION, LOGPROBS
            )
            g_MP = tl.where(live_M[:, None], g_MP * slope_MP, 0.0)
            store_gradient(g_MP, out, low, place_M[:, None] + place_P[None, :], inside_P[None, :], PARTS, LOW)
            if BIAS_SUMS:
                sums_P = tl.sum(g_MP * tl.load(tokens + 7 * T + row_M)[:, None], 0)
                tl.store(bias_sums + m.to(tl.int64) * (end - begin) + place_P, sums_P, mask=inside_P)
    zero_behind(out, tiles_m * M, T, end - begin, stride_out, N)
    if PARTS == 2:
        zero_behind(low, tiles_m * M, T, end - begin, stride_out, N)
