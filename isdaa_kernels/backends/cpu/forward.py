"""Forward of the CPU backend: one product a tile, folded at once into an online log-sum-exp.

N tokens, D hidden size, V vocabulary, T tokens and C vocabulary rows of a tile, K tokens whose logits are kept.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu import products
from isdaa_kernels.backends.cpu.frozen_head import MeanWeight
from isdaa_kernels.backends.cpu.plan import forward_spans, make_plan
from isdaa_kernels.backends.cpu.tiles import HiddenTiles, RowKernels, State, WeightTiles, finish, kept_block, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest
from isdaa_kernels.targets import raise_bad_targets, scored_rows


def forward(
    problem: Problem,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    transform: Transform,
    ignore_index: int,
    stats: StatsRequest,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise_bad_targets(targets_N, problem.V, ignore_index)
    dtype, plan = problem.compute_dtype, make_plan(problem)
    rows = scored_rows(targets_N, ignore_index, problem.N)
    kept_KV = torch.empty(plan.kept_tokens, problem.V, dtype=dtype)
    block_lse_BN, block = None, 0
    if problem.routed is not None:
        block = problem.routed.block
        block_lse_BN = torch.zeros(problem.routed.blocks(problem.V), len(targets_N), dtype=dtype)
    tokens = forward_spans(len(rows), plan)
    tallest = max((stop - start for start, stop in tokens), default=0)
    hidden = HiddenTiles(hidden_ND, rows, tallest, dtype)
    weight = WeightTiles(weight_VD, plan.vocab_tile, dtype, transform.order_V)
    kernels = RowKernels(transform, rows, targets_N, dtype)
    state = State(len(rows), problem.V, dtype, stats)
    buffer = torch.empty(tallest * plan.vocab_tile, dtype=dtype)
    mean_weight, scratch = None, buffer
    if plan.hidden_in_forward:  # which needs the product as it is
        mean_weight, scratch = MeanWeight(problem, kernels), torch.empty_like(buffer)
    for column, column_end in spans(problem.V, plan.vocab_tile):
        C = column_end - column
        kept_KC = kept_block(kept_KV, column, column_end)
        for token, token_end in tokens:
            hidden_ND, rows_T = hidden.left(token, token_end)
            tile_TC = buffer[: (token_end - token) * C].view(token_end - token, C)
            products.multiply(hidden_ND, weight.columns_of(column, column_end), tile_TC, left_rows=rows_T)
            kept_TC = kept_KC[token:token_end] if token_end <= len(kept_KC) else None
            scratch_TC = scratch[: tile_TC.numel()].view(tile_TC.shape)
            blocks = None if block_lse_BN is None else block_lse_BN[column // block :, token:token_end]
            old_max_T = None if mean_weight is None else state.max_N[token:token_end].clone()
            kernels.forward_tile(tile_TC, None, scratch_TC, token, column, state, kept_TC, blocks, block)
            if mean_weight is not None:
                weight_CD = weight.rows_of(column, column_end)
                mean_weight.add(token, column, tile_TC, scratch_TC, weight_CD, old_max_T, state)
    kept = kept_KV if block_lse_BN is None else block_lse_BN
    if mean_weight is not None:
        kept = mean_weight.finish(state)
    return *finish(state, rows, len(targets_N), dtype), kept
