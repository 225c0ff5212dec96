"""Kernels of the routed backward: blocks of vocabulary as experts, each with the list of tokens that are routed to it.

T tokens of a slab, C vocabulary rows of a chunk, `blocks` blocks of BLOCK rows in it, D hidden size, V vocabulary, N tokens of the call,
B blocks of the whole vocabulary. The gradient of the product lies packed, [blocks, T, BLOCK]: row i of a block belongs to the i-th token
of its list (`routes.list_kernel`).
"""

import triton
import triton.language as tl

from isdaa_kernels.backends.triton.kernels.tiles import dot, narrow, split_columns, transform


@triton.jit
def find_tile(item, ends, blocks, SEARCH: tl.constexpr):
    """(block, tile within it) of the item-th tile of the blocks' lists; `ends` counts the tiles up to each block's last."""
    b_S = tl.arange(0, SEARCH)
    end_S = tl.load(ends + b_S, mask=b_S < blocks, other=2147483647)
    passed_S = end_S <= item
    return tl.sum(passed_S.to(tl.int32), 0), item - tl.max(tl.where(passed_S, end_S, 0), 0)


@triton.jit
def listed_product(
    hidden, weight, i_M, c_N, D, stride_hidden, stride_weight_v, stride_weight_d,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N]: hidden[i] @ weight[c].T"""
    acc_MN = tl.zeros((M, N), dtype=tl.float32)
    hidden_M1 = hidden + i_M.to(tl.int64)[:, None] * stride_hidden
    weight_1N = weight + c_N.to(tl.int64)[None, :] * stride_weight_v
    for k in range(0, D, K):
        d_K = k + tl.arange(0, K).to(tl.int64)
        if EVEN_D:
            a_MK = tl.load(hidden_M1 + d_K[None, :])
            b_KN = tl.load(weight_1N + d_K[:, None] * stride_weight_d)
        else:
            a_MK = tl.load(hidden_M1 + d_K[None, :], mask=d_K[None, :] < D, other=0.0)
            b_KN = tl.load(weight_1N + d_K[:, None] * stride_weight_d, mask=d_K[:, None] < D, other=0.0)
        acc_MN = dot(a_MK, b_KN, acc_MN, PRECISION)
    return acc_MN


@triton.jit
def routed_gradient_kernel(
    hidden,  # [T, D] times 2 ** -back of its token
    weight,  # [C, D]: the chunk's rows in the order of the blocks
    bias,  # [C] of the chunk, or None
    targets,  # int32 [T]: places in the order of the blocks
    tokens,  # fp32 [10, T], rows as `tokens.token_kernel` writes them
    log_mass,  # fp32 [B, N]
    rows,  # int64: the token of each live one
    lists, counts, ends,  # int32 [blocks, T], [blocks], [blocks]
    out,  # [blocks, T, BLOCK]: 0 in the target's column
    mean_sums,  # fp32 [cdiv(T, M), C]: sums over a tile's tokens of exp(z) over its sum within the block
    bias_sums,  # fp32 [cdiv(T, M), C] of the gradient, or None
    first, T, D, N_TOKENS, begin, C, blocks, stride_hidden, stride_weight_v, stride_weight_d, logit_scale,
    HAS_BIAS: tl.constexpr, BIAS_SUMS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    SEARCH: tl.constexpr, PIECE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The logits of each block's listed tokens, and their gradient. Persistent: the number of tiles is read on the device."""
    PARTS: tl.constexpr = BLOCK // N
    PIECES: tl.constexpr = N // PIECE
    tiles = tl.load(ends + blocks - 1) * PARTS
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        b, m = find_tile(tile // PARTS, ends, blocks, SEARCH)
        place_M = m * M + tl.arange(0, M)
        live_M = place_M < tl.load(counts + b)
        i_M = tl.load(lists + b.to(tl.int64) * T + place_M, mask=live_M, other=0)
        c_N = b * BLOCK + tile % PARTS * N + tl.arange(0, N)
        x_MN = listed_product(
            hidden, weight, i_M, tl.minimum(c_N, C - 1), D, stride_hidden, stride_weight_v, stride_weight_d, EVEN_D, PRECISION, M, N, K
        )  # fmt: skip
        token_M = tokens + i_M
        inverse_M, unscale_M = tl.load(token_M), tl.load(token_M + T)
        high_M, low_M = tl.load(token_M + 2 * T), tl.load(token_M + 3 * T)
        coefficient_M = tl.load(token_M + 4 * T) * (logit_scale * inverse_M)
        target_M = tl.load(targets + i_M) - begin - b * BLOCK
        n_M = tl.load(rows + first + i_M)
        share_M = tl.load(
            log_mass + (begin // BLOCK + b).to(tl.int64) * N_TOKENS + n_M, mask=live_M, other=float("-inf")
        )
        counted_M = share_M > float("-inf")
        share_M = tl.where(counted_M, share_M, 0.0)
        out_M = out + (b.to(tl.int64) * T + place_M) * BLOCK
        pieces = split_columns(x_MN, PIECES)
        for piece in tl.static_range(PIECES):
            within_P = tile % PARTS * N + piece * PIECE + tl.arange(0, PIECE)
            c_P = b * BLOCK + within_P
            inside_P = c_P < C
            bias_P = tl.load(bias + c_P, mask=inside_P, other=0.0).to(tl.float32) if HAS_BIAS else None
            z_MP, _ = transform(
                pieces[piece] * unscale_M[:, None], bias_P, logit_scale, 1.0, inverse_M, HAS_BIAS, False
            )
            log_p_MP = (z_MP - high_M[:, None]) - low_M[:, None]
            mean_MP = tl.where(counted_M[:, None], tl.exp(log_p_MP - share_M[:, None]), 0.0)
            sums_P = m.to(tl.int64) * C + c_P
            tl.store(mean_sums + sums_P, tl.sum(mean_MP, 0), mask=inside_P)
            g_MP = tl.exp(log_p_MP) * coefficient_M[:, None]
            keep_MP = live_M[:, None] & inside_P[None, :] & (within_P[None, :] != target_M[:, None])
            g_MP = tl.where(keep_MP, g_MP, 0.0)
            tl.store(out_M[:, None] + within_P[None, :], narrow(g_MP, out.dtype.element_ty), mask=live_M[:, None])
            if BIAS_SUMS:
                tl.store(bias_sums + sums_P, tl.sum(g_MP * tl.load(token_M + 7 * T)[:, None], 0), mask=inside_P)


@triton.jit
def routed_weight_kernel(
    g,  # [blocks, T, BLOCK]
    hidden,  # [T, D]
    lists, counts,
    sums,  # fp32 [., D]: of the chunk's rows from block `skip` on
    skip, T, D, C, stride_hidden, FIRST: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """sums[c] (+)= the sum over the block's listed tokens of g[., c] * hidden. Grid: (cdiv(D, N), parts of M rows of the blocks)."""
    PARTS: tl.constexpr = BLOCK // M
    b, part = skip + tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    within_M, d_N = part * M + tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    c_M = (b - skip) * BLOCK + within_M
    mask_MN = (b * BLOCK + within_M < C)[:, None] & (d_N < D)[None, :]
    sums_MN = sums + c_M.to(tl.int64)[:, None] * D + d_N[None, :]
    acc_MN = tl.zeros((M, N), tl.float32)
    if not FIRST:
        acc_MN = tl.load(sums_MN, mask=mask_MN, other=0.0)
    count = tl.load(counts + b)
    g_b, list_b = g + b.to(tl.int64) * T * BLOCK, lists + b.to(tl.int64) * T
    for k in range(0, count, K):
        place_K = k + tl.arange(0, K)
        here_K = place_K < count
        i_K = tl.load(list_b + place_K, mask=here_K, other=0).to(tl.int64)
        g_MK = tl.load(g_b + place_K.to(tl.int64)[None, :] * BLOCK + within_M[:, None], mask=here_K[None, :], other=0.0)
        h_KN = tl.load(
            hidden + i_K[:, None] * stride_hidden + d_N[None, :], mask=here_K[:, None] & (d_N < D)[None, :], other=0.0
        )
        acc_MN = dot(g_MK, h_KN, acc_MN, PRECISION)
    tl.store(sums_MN, acc_MN, mask=mask_MN)


@triton.jit
def add_product(
    g, weight, row_M, here_M, b, d_N, acc_MN, T, D, C, stride_weight_v, stride_weight_d, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """acc + g[b, row] @ the block's rows of weight, 0 where not `here`."""
    g_M = g + (b * T + row_M).to(tl.int64) * BLOCK
    for k in range(0, BLOCK, K):
        within_K = k + tl.arange(0, K)
        c_K = tl.minimum(b * BLOCK + within_K, C - 1).to(tl.int64)
        g_MK = tl.load(g_M[:, None] + within_K[None, :], mask=here_M[:, None], other=0.0)
        w_KN = tl.load(
            weight + c_K[:, None] * stride_weight_v + d_N.to(tl.int64)[None, :] * stride_weight_d, mask=(d_N < D)[None, :], other=0.0
        )  # fmt: skip
        acc_MN = dot(g_MK, w_KN, acc_MN, PRECISION)
    return acc_MN


@triton.jit
def routed_hidden_kernel(
    g,  # [blocks, T, BLOCK]
    weight,  # [C, D]
    count,  # int32 [1]
    lists, places, starts,
    sums,  # fp32 [T, D]
    blocks, first, T, D, C, steps, stride_weight_v, stride_weight_d, stride_sums, SPAN: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """sums[i] += the sum over the blocks that token i is routed to of g @ weight.

    A program owns N columns of the tokens of SPAN steps of STEP tokens: it alone adds to them, in one order. Of GROUP blocks at a time:
    where fewer than DENSE percent of the pairs of its tokens and those blocks are routed, the tokens listed for each block, whose sums
    are read and written once a block; else all its tokens, once a group, with 0 for the pairs that are not routed.
    Grid: (cdiv(D, N), cdiv(steps, SPAN)).
    """
    d_N = tl.program_id(0) * N + tl.arange(0, N)
    step = tl.program_id(1) * SPAN
    last = tl.minimum(step + SPAN, steps)
    end = tl.minimum(tl.minimum(last * STEP, T), tl.load(count) - first)
    for group in range(0, blocks, GROUP):
        within_G = tl.arange(0, GROUP)
        starts_G = starts + (group + within_G) * (steps + 1)
        here_G = group + within_G < blocks
        pairs = tl.sum(
            tl.load(starts_G + last, mask=here_G, other=0) - tl.load(starts_G + step, mask=here_G, other=0), 0
        )
        stop = tl.minimum(group + GROUP, blocks)
        if pairs * 100 >= (end - step * STEP) * (stop - group) * DENSE:
            for start in range(step * STEP, end, M):
                i_M = start + tl.arange(0, M)
                acc_MN = tl.zeros((M, N), tl.float32)
                for b in range(group, stop):
                    row_M = tl.load(places + b * T + i_M, mask=i_M < end, other=-1)
                    acc_MN = add_product(
                        g, weight, row_M, row_M >= 0, b, d_N, acc_MN, T, D, C, stride_weight_v, stride_weight_d, PRECISION, BLOCK, K
                    )  # fmt: skip
                add_rows(sums, i_M, i_M < end, d_N, D, acc_MN, stride_sums)
        else:
            for b in range(group, stop):
                starts_b = starts + b * (steps + 1)
                listed = tl.load(starts_b + last)
                for start in range(tl.load(starts_b + step), listed, M):
                    row_M = start + tl.arange(0, M)
                    acc_MN = add_product(
                        g, weight, row_M, row_M < listed, b, d_N, tl.zeros((M, N), tl.float32), T, D, C, stride_weight_v,
                        stride_weight_d, PRECISION, BLOCK, K,
                    )  # fmt: skip
                    i_M = tl.load(lists + b * T + row_M, mask=row_M < listed, other=0)
                    add_rows(sums, i_M, row_M < listed, d_N, D, acc_MN, stride_sums)
                tl.debug_barrier()  # the next block's tokens may be the same, in other threads
        tl.debug_barrier()


@triton.jit
def add_rows(sums, i_M, here_M, d_N, D, x_MN, stride_sums):
    """sums[i] += x, 0 for those that are not `here`."""
    sums_MN = sums + i_M.to(tl.int64)[:, None] * stride_sums + d_N[None, :]
    mask_MN = here_M[:, None] & (d_N < D)[None, :]
    tl.store(sums_MN, tl.load(sums_MN, mask=mask_MN, other=0.0) + x_MN, mask=mask_MN)
