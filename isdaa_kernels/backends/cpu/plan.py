"""Tiles, workspace and matrix work of the CPU backend: pure arithmetic.

N tokens, D hidden size, V vocabulary.
"""

import torch

from isdaa_kernels.backends.cpu.products import panel_numbers
from isdaa_kernels.backends.cpu.tiles import GATHERED_ROWS, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

# The backward adds each tile into d_weight, so more tokens a tile mean fewer passes over d_weight; fewer where memory is short.
BACKWARD_TOKENS = (1024, 512, 256, 128)
# Of the forward, for each thread: its logits stay in the cache until they are folded.
FORWARD_TOKENS = 96
_KEPT_ROWS = 128  # whose logits are kept: fewer are not worth a tile of their own
_STATE_BYTES = 64  # a token: running maximum and sum, target logit, lse, indices


def vocab_tile(problem: Problem) -> int:
    """Depends on (V, D) alone: the log-prob of a token must not depend on the batch. 2048 rows, fewer where D is large (cache)."""
    rows = 2048
    while rows > 256 and rows * problem.D > 1 << 21:
        rows //= 2
    return min(rows, problem.V)


def make_plan(problem: Problem) -> Plan:
    """Tiles of fixed shape in the forward; a budget, where one is given, decides the backward's, whether d_hidden and d_weight take
    two passes, and how many logits are kept. Routed: the workspace comes on top of the blocks' log-sum-exps, and `units` is the most it
    can cost."""
    columns = vocab_tile(problem)
    budget = float("inf") if problem.max_workspace_mb is None else problem.max_workspace_mb * MIB
    if problem.hidden_in_forward and problem.keep_logits:
        prepared = _plan_hidden_in_forward(problem, columns, budget)
        if prepared is not None:
            return prepared
    accumulator = _hidden_accumulator_bytes(problem)
    tokens = _token_tile(problem, columns, budget - accumulator)
    split = tokens is None and problem.routed is None
    if split:
        accumulator = 0
        tokens = _token_tile(problem, columns, budget)
    if tokens is None:
        least = _scratch_bytes(problem, columns, BACKWARD_TOKENS[-1])
        raise refuse_budget(problem.max_workspace_mb, least + (accumulator if problem.routed is not None else 0))
    fixed = _scratch_bytes(problem, columns, tokens) + accumulator
    row = problem.V * problem.compute_dtype.itemsize
    kept = 0
    if problem.keep_logits and problem.max_workspace_mb is not None and problem.routed is None:
        rows = int(budget - fixed) // row
        kept = problem.N if rows >= problem.N else rows // _KEPT_ROWS * _KEPT_ROWS
    work = problem.need_hidden + problem.need_weight
    passes = 2 if split and problem.need_weight and problem.need_hidden else 1
    return Plan(
        backend="cpu",
        token_tile=tokens,
        vocab_tile=columns,
        chunks=ceil_div(problem.N, tokens) * ceil_div(problem.V, columns),
        kept_tokens=kept,
        split=split,
        bytes=fixed + kept * row,
        units=1.0 + work + passes * (1 - kept / max(problem.N, 1)) * (work > 0),
    )


def _plan_hidden_in_forward(problem: Problem, columns: int, budget: float) -> Plan | None:
    """The mean weight row of each token waits for the backward, D numbers a token, and no logits are recomputed."""
    size = problem.compute_dtype.itemsize
    for tokens in BACKWARD_TOKENS:
        tokens = min(tokens, problem.N)
        scratch = _scratch_bytes(problem, columns, tokens) + tokens * columns * size
        backward = (
            min(tokens, 512) * problem.D * (2 * size + problem.weight_dtype.itemsize + problem.hidden_dtype.itemsize)
        )
        needed = max(scratch, backward) + problem.N * problem.D * size
        if needed <= budget:
            chunks = ceil_div(problem.V, columns)
            return Plan("cpu", tokens, columns, chunks, 0, False, needed, 2.0, hidden_in_forward=True)
    return None


def forward_spans(N: int, plan: Plan) -> list[tuple[int, int]]:
    """Tiles of the forward: no tile mixes tokens whose logits are kept with others."""
    tile = max(min(FORWARD_TOKENS * torch.get_num_threads(), plan.token_tile), 1)
    kept = min(plan.kept_tokens, N)
    return spans(kept, tile) + [(kept + a, kept + b) for a, b in spans(N - kept, tile)]


def _token_tile(problem: Problem, columns: int, room: float) -> int | None:
    """Tokens of the largest backward tile whose buffers fit into `room` bytes."""
    return next(
        (max(1, min(t, problem.N)) for t in BACKWARD_TOKENS if _scratch_bytes(problem, columns, t) <= room), None
    )


def _scratch_bytes(problem: Problem, columns: int, tokens: int) -> int:
    tokens, D = min(tokens, problem.N), problem.D
    numbers = tokens * columns + problem.V  # logits, widened bias
    numbers += panel_numbers_of_tiles(tokens, columns, D)
    numbers += 2 * tokens * D  # hidden of other strides or dtype; d_hidden times its token's scale
    if problem.hidden_dtype != problem.compute_dtype:
        numbers += tokens * D  # rounded
    numbers += columns * D  # weight of other strides or dtype
    if problem.weight_dtype != problem.compute_dtype and problem.need_weight:
        numbers += columns * D  # fp32 d_weight of the tile
    if problem.routed is not None:
        numbers = max(numbers + GATHERED_ROWS * D, _routed_numbers(problem, tokens))
        return numbers * problem.compute_dtype.itemsize + problem.N * (problem.routed.blocks(problem.V) + _STATE_BYTES)
    return numbers * problem.compute_dtype.itemsize + problem.N * _STATE_BYTES


def panel_numbers_of_tiles(tokens: int, columns: int, D: int) -> int:
    """Weight as a factor of logits and of d_hidden, hidden as a factor of d_weight."""
    return panel_numbers(D, columns) + panel_numbers(columns, D) + panel_numbers(tokens, D)


def _routed_numbers(problem: Problem, tokens: int) -> int:
    """Beside the blocks' log-sum-exps and a byte for each route: the mass that is not recomputed, the means of the blocks, the tokens of a
    block."""
    D, block, B = problem.D, problem.routed.block, problem.routed.blocks(problem.V)
    numbers = tokens * block + panel_numbers_of_tiles(tokens, block, D) + 2 * B * D + panel_numbers(B, D)
    numbers += (
        2 * block + GATHERED_ROWS
    ) * D + 2 * problem.V  # widened weight, d_weight of a block; gathered in pieces
    if problem.hidden_dtype != problem.compute_dtype:
        numbers += problem.N * D  # widened hidden
    return numbers + problem.N * B


def _hidden_accumulator_bytes(problem: Problem) -> int:
    """16-bit d_hidden is summed in fp32 beside the output; fp32 d_hidden is summed in the output itself."""
    if not problem.need_hidden or problem.hidden_dtype == problem.compute_dtype:
        return 0
    return problem.N * problem.D * problem.compute_dtype.itemsize
