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
    store_mixture,
    tops,
)
from isdaa_kernels.backends.triton.kernels.products import zero_behind
from isdaa_kernels.backends.triton.kernels.tiles import narrow, product_tile, split_columns, tile_position, transform


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
    tokens,  # fp32 [13, T] as `backends.gpu.kl_tokens` makes them, where MIXTURE
    count,  # int32 [1]: scored tokens of the whole call
    partial,  # fp32 [., S, T]
    first, T, S, D, E, V, stride_policy_hidden, stride_policy_weight_v, stride_policy_weight_d, stride_reference_hidden,
    stride_reference_weight_v, stride_reference_weight_d,
    policy_scale, policy_softcap, reference_scale, reference_softcap, rest, weight,
    POLICY_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REFERENCE_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
    DIRECTION: tl.constexpr, MIXTURE: tl.constexpr,
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
        p_M, q_M, a_M = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
        if MIXTURE:
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
            largest_M = tl.full((M,), 2147483647, tl.int32)
            b_M, c_M, p_center_M, center_M = p_M, p_M, p_M, p_M
            for piece in tl.static_range(PIECES):
                begin = n * N + piece * (N // PIECES)
                zp_MP, zq_MP, _ = final_logits(
                    x_pieces[piece], y_pieces[piece], policy_bias, reference_bias, begin + tl.arange(0, N // PIECES), V,
                    inverse_M, policy_scale, policy_softcap, reference_scale, reference_softcap, POLICY_BIAS, POLICY_SOFTCAP,
                    REFERENCE_BIAS, REFERENCE_SOFTCAP, EVEN_V,
                )  # fmt: skip
                p_here_M, q_here_M, column_M, p_gap_M, gap_M = tops(zp_MP, zq_MP, begin, DIRECTION)
                above_M = p_here_M > p_top_M
                largest_M, p_center_M = tl.where(above_M, column_M, largest_M), tl.where(above_M, p_gap_M, p_center_M)
                center_M = tl.where(q_here_M > q_top_M, gap_M, center_M) if DIRECTION == FORWARD else p_center_M
                p_top_M, q_top_M = tl.maximum(p_top_M, p_here_M), tl.maximum(q_top_M, q_here_M)
            for piece in tl.static_range(PIECES):
                begin = n * N + piece * (N // PIECES)
                zp_MP, zq_MP, _ = final_logits(
                    x_pieces[piece], y_pieces[piece], policy_bias, reference_bias, begin + tl.arange(0, N // PIECES), V,
                    inverse_M, policy_scale, policy_softcap, reference_scale, reference_softcap, POLICY_BIAS, POLICY_SOFTCAP,
                    REFERENCE_BIAS, REFERENCE_SOFTCAP, EVEN_V,
                )  # fmt: skip
                p_share_M, q_share_M, a_share_M, b_share_M, c_share_M = kl_sums(
                    zp_MP, zq_MP, p_top_M, q_top_M, center_M, DIRECTION
                )
                p_M += p_share_M
                q_M += q_share_M
                a_M += a_share_M
                b_M += b_share_M
                c_M += c_share_M
            store_fold(
                p_top_M, q_top_M, largest_M, p_center_M, center_M, p_M, q_M, a_M, b_M, c_M, n, S, T, row_M, live_M, partial, DIRECTION
            )  # fmt: skip


@triton.jit
def linear_kl_backward_kernel(
    policy_hidden, reference_hidden,  # [T, D] times 2 ** -back of its token, [T, E]; descriptors where TMA
    policy_weight, reference_weight,  # [V, D], [V, E], likewise
    policy_bias, reference_bias,  # [V] or None
    targets,  # int32 [T]: the column of each token's own entry
    tokens,  # fp32 [13, T] as `backends.gpu.kl_tokens` makes them; row 8 is written: the entry of that column
    weight_entry,  # fp32 [T]: the same in the units of the sums of d_weight
    count,  # int32 [1]: tokens of the whole call that carry a gradient
    out,  # [T, C]: gradient of the policy's product for the vocabulary rows [begin, end), 0 in that column and past the last token
    bias_sums,  # fp32 [T / M, C] or None
    first, T, D, E, V, begin, end, stride_policy_hidden, stride_policy_weight_v, stride_policy_weight_d, stride_reference_hidden,
    stride_reference_weight_v, stride_reference_weight_d, stride_out,
    policy_scale, policy_softcap, reference_scale, reference_softcap, rest, weight,
    POLICY_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REFERENCE_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr,
    DIRECTION: tl.constexpr, BIAS_SUMS: tl.constexpr,
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
        out_M = out + row_M.to(tl.int64) * stride_out
        target_M, inverse_M = tl.load(targets + row_M), tl.load(tokens + row_M)
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
            g_MP = kl_gradient(zp_MP, zq_MP, tokens + row_M, rest, weight, T, DIRECTION) * slope_MP
            g_MP, scale_M = take_target(
                g_MP, tl.where(inside_P, begin + place_P, -2), target_M, row_M, live_M, tokens, weight_entry, T
            )
            tl.store(out_M[:, None] + place_P[None, :], narrow(g_MP, out.dtype.element_ty), mask=inside_P[None, :])
            if BIAS_SUMS:
                sums_P = tl.sum(g_MP * scale_M[:, None], 0)
                tl.store(bias_sums + m.to(tl.int64) * (end - begin) + place_P, sums_P, mask=inside_P)
    zero_behind(out, tiles_m * M, T, end - begin, stride_out, N)


@triton.jit
def take_target(g_MP, column_P, target_M, row_M, live_M, tokens, weight_entry, T):
    """(g of the live tokens without the targets' entries, the scale of their hidden states). The entries are kept in fp32."""
    scale_M = tl.load(tokens + 7 * T + row_M, mask=row_M < T, other=0.0)
    target_MP = (column_P[None, :] == target_M[:, None]) & live_M[:, None]
    here_M = tl.max(target_MP.to(tl.int32), 1) > 0
    if tl.max(here_M.to(tl.int32), 0) > 0:  # few tiles hold one
        entry_M = tl.sum(tl.where(target_MP, g_MP, 0.0), 1)
        tl.store(tokens + 8 * T + row_M, entry_M, mask=here_M)
        tl.store(weight_entry + row_M, entry_M * scale_M, mask=here_M)
    g_MP = tl.where(live_M[:, None], g_MP, 0.0)
    return tl.where(target_MP, 0.0, g_MP), scale_M
