"""Kernels of the routing plan: each block's share of a token's probability, the rules of `isdaa_kernels.routing`, the lists they make.

T tokens of a slab, M tokens at once, L live tokens of the call, N tokens of the call, V vocabulary, B blocks of it, S slots of partial
results.
"""

import triton
import triton.language as tl


@triton.jit
def block_mass_kernel(
    partial_max, partial_sum,  # fp32, fp64 [S, T]
    rows, count,
    lse,  # fp64 [N]
    log_mass,  # fp32 [B, N]
    first, T, S, N, SLOTS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """log_mass[b, n] = log-sum-exp of the SLOTS slots of block b, minus lse[n]: small where the mass is large, so that fp32 keeps it
    exact there. Grid: (cdiv(T, M), B)."""
    i_M = tl.program_id(0) * M + tl.arange(0, M)
    live_M = (i_M < T) & (first + i_M < tl.load(count))
    b = tl.program_id(1)
    slot_S = b * SLOTS + tl.arange(0, SLOTS)
    place_SM = slot_S.to(tl.int64)[:, None] * T + i_M[None, :]
    mask_SM = (slot_S < S)[:, None] & live_M[None, :]
    max_SM = tl.load(partial_max + place_SM, mask=mask_SM, other=float("-inf"))
    top_M = tl.max(max_SM, 0)
    shift_M = tl.where(top_M == float("-inf"), 0.0, top_M)
    below_SM = max_SM - shift_M[None, :]
    factor_SM = tl.where(below_SM == 0.0, 1.0, tl.exp(below_SM)).to(tl.float64)
    sum_M = tl.sum(factor_SM * tl.load(partial_sum + place_SM, mask=mask_SM, other=0.0), 0)
    n_M = tl.load(rows + first + i_M, mask=live_M, other=0)
    log_sum_M = tl.where(sum_M > 0.0, tl.log(tl.where(sum_M > 0.0, sum_M, 1.0)), float("-inf"))
    share_M = (shift_M.to(tl.float64) - tl.load(lse + n_M, mask=live_M, other=0.0)) + log_sum_M
    tl.store(log_mass + b.to(tl.int64) * N + n_M, share_M.to(tl.float32), mask=live_M)


@triton.jit
def weighted_mass(log_mass_b, rows, size, first, end, M: tl.constexpr):
    """|coefficient| * mass of M live tokens in one block; 0 where the coefficient is 0 or there is no token."""
    m_M = first + tl.arange(0, M)
    size_M = tl.load(size + m_M, mask=m_M < end, other=0.0)
    n_M = tl.load(rows + m_M, mask=m_M < end, other=0)
    share_M = tl.load(log_mass_b + n_M, mask=size_M > 0.0, other=float("-inf"))
    return tl.where(size_M > 0.0, tl.exp(share_M) * size_M, 0.0)


@triton.jit
def route_kernel(
    log_mass,  # fp32 [B, N]
    rows, count,
    size,  # fp32 [L]: |coefficient| of each live token, 0 of those that are routed nowhere
    target_block,  # int32 [L], -1 of those
    rules,  # fp64 [2]: the least |coefficient| * mass of a routed token, and the share of the row's rule
    route,  # uint8 [B, L]: 0 not routed, 1 in the gradients of weight and bias alone, 2 in that of hidden too
    N, L, BISECTIONS: tl.constexpr, BY_ROW: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The rules, one block a program. That of the row: the largest of a bisection's numbers above which its share of the block's sum
    lies. Sums are fp64, in one order. Grid: (B,)."""
    b = tl.program_id(0)
    log_mass_b = log_mass + b.to(tl.int64) * N
    live = tl.load(count)
    threshold = float("inf")
    if BY_ROW:
        sum_M, top_M = tl.zeros((M,), tl.float64), tl.zeros((M,), tl.float32)
        for m in range(0, live, M):
            x_M = weighted_mass(log_mass_b, rows, size, m, live, M)
            sum_M += x_M.to(tl.float64)
            top_M = tl.maximum(top_M, x_M)
        wanted = tl.load(rules + 1) * tl.sum(sum_M, 0)
        threshold, high = 0.0, tl.max(top_M, 0)
        for _ in range(BISECTIONS):
            middle = (threshold + high) * 0.5
            above_M = tl.zeros((M,), tl.float64)
            for m in range(0, live, M):
                x_M = weighted_mass(log_mass_b, rows, size, m, live, M)
                above_M += tl.where(x_M > middle, x_M, 0.0).to(tl.float64)
            enough = tl.sum(above_M, 0) >= wanted
            threshold, high = tl.where(enough, middle, threshold), tl.where(enough, high, middle)
    least = tl.load(rules).to(tl.float32)
    for m in range(0, L, M):
        m_M = m + tl.arange(0, M)
        x_M = weighted_mass(log_mass_b, rows, size, m, live, M)
        here_M = tl.load(target_block + m_M, mask=m_M < live, other=-1) == b
        kind_M = tl.where((x_M > least) | here_M, 2, tl.where(x_M > threshold, 1, 0))
        tl.store(route + b.to(tl.int64) * L + m_M, kind_M.to(tl.uint8), mask=m_M < L)


@triton.jit
def list_kernel(
    route,  # uint8 [B, L]
    lists,  # int32 [blocks, T]: tokens of the slab that are routed to a block: those of hidden's gradient first, each kind in order
    places,  # int32 [blocks, T]: where in its block's list a token of hidden's gradient stands, -1 for the others
    starts,  # int32 [blocks, cdiv(T, M) + 1]: where the tokens from step * M on begin among those of hidden's gradient
    counts,  # int32 [blocks]: of both kinds
    begin, first, T, L, M: tl.constexpr,
):  # fmt: skip
    """The lists of the blocks from `begin` on, for the slab of tokens from `first` on. Grid: (blocks,)."""
    c = tl.program_id(0)
    route_b = route + (begin + c).to(tl.int64) * L + first
    here = tl.minimum(T, L - first)
    both_M = tl.zeros((M,), tl.int32)
    for i in range(0, here, M):
        i_M = i + tl.arange(0, M)
        both_M += (tl.load(route_b + i_M, mask=i_M < here, other=0) == 2).to(tl.int32)
    both = tl.sum(both_M, 0)
    list_b, places_b, starts_b = (
        lists + c.to(tl.int64) * T,
        places + c.to(tl.int64) * T,
        starts + c * (tl.cdiv(T, M) + 1),
    )
    place_2, place_1 = 0, both
    for i in range(0, T, M):
        tl.store(starts_b + i // M, place_2)
        i_M = i + tl.arange(0, M)
        kind_M = tl.load(route_b + i_M, mask=i_M < here, other=0)
        two_M, one_M = (kind_M == 2).to(tl.int32), (kind_M == 1).to(tl.int32)
        place_M = place_2 + tl.cumsum(two_M, 0) - 1
        tl.store(list_b + place_M, i_M, mask=two_M > 0)
        tl.store(places_b + i_M, tl.where(two_M > 0, place_M, -1), mask=i_M < T)
        tl.store(list_b + place_1 + tl.cumsum(one_M, 0) - 1, i_M, mask=one_M > 0)
        place_2 += tl.sum(two_M, 0)
        place_1 += tl.sum(one_M, 0)
    tl.store(starts_b + tl.cdiv(T, M), place_2)
    tl.store(counts + c, place_1)
