"""Tiles, workspace and matrix work of the CPU backend: pure arithmetic.

N tokens, D hidden size, V vocabulary.
"""

import torch

from isdaa_kernels.backends.cpu.tiles import LEAST_HEIGHT, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

# The backward adds each tile into d_weight, so more tokens a tile mean fewer passes over d_weight; fewer where memory is short.
BACKWARD_TOKENS = (2048, 1024, 512, 256, 128)
# Of the forward. 128 rows cost a third more than 512, as the library packs the weight for each product; more rows would leave the cache
# before they are folded. The bits of fp64 products depend on their height, so it is always the least there.
FORWARD_TOKENS = {torch.float32: 512, torch.float64: LEAST_HEIGHT}
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
        kept = problem.N if rows >= problem.N else rows // LEAST_HEIGHT * LEAST_HEIGHT
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
        scratch = _scratch_bytes(problem, columns, tokens) + max(tokens, LEAST_HEIGHT) * columns * size
        backward = (
            min(tokens, 512) * problem.D * (2 * size + problem.weight_dtype.itemsize + problem.hidden_dtype.itemsize)
        )
        needed = max(scratch, backward) + problem.N * problem.D * size
        if needed <= budget:
            chunks = ceil_div(problem.V, columns)
            return Plan("cpu", tokens, columns, chunks, 0, False, needed, 2.0, hidden_in_forward=True)
    return None


def forward_spans(N: int, plan: Plan, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Tiles of the forward: no tile mixes tokens whose logits are kept with others."""
    tile = max(min(FORWARD_TOKENS[dtype], plan.token_tile), LEAST_HEIGHT)
    kept = min(plan.kept_tokens, N)
    return spans(kept, tile) + [(kept + a, kept + b) for a, b in spans(N - kept, tile)]


def _token_tile(problem: Problem, columns: int, room: float) -> int | None:
    """Tokens of the largest backward tile whose buffers fit into `room` bytes."""
    return next(
        (max(1, min(t, problem.N)) for t in BACKWARD_TOKENS if _scratch_bytes(problem, columns, t) <= room), None
    )


def _scratch_bytes(problem: Problem, columns: int, tokens: int) -> int:
    size = problem.compute_dtype.itemsize
    tokens = max(min(tokens, problem.N), LEAST_HEIGHT)
    numbers = tokens * columns  # logits
    numbers += 3 * tokens * (problem.D + 16)  # hidden before and after widening, and times its token's scale
    numbers += problem.V  # widened bias
    if problem.hidden_dtype != problem.compute_dtype:
        numbers += tokens * problem.D  # rounded d_hidden of a tile
    if problem.weight_dtype != problem.compute_dtype:
        numbers += columns * problem.D * (1 + problem.need_weight)  # widened weight, fp32 d_weight of the tile
    numbers *= size
    if problem.routed is not None:
        numbers = max(numbers + columns * problem.D * size, _routed_bytes(problem, tokens))  # weight in its order
    return numbers + problem.N * _STATE_BYTES


def _routed_bytes(problem: Problem, tokens: int) -> int:
    """Beside the blocks' log-sum-exps: routes and masses that are not recomputed, the means of the blocks, the tokens of a block."""
    size, block, B = problem.compute_dtype.itemsize, problem.routed.block, problem.routed.blocks(problem.V)
    numbers = tokens * (2 * problem.D + block) + 2 * (B + block) * problem.D + 2 * problem.V
    numbers += LEAST_HEIGHT * problem.D  # gathered in pieces
    if problem.hidden_dtype != problem.compute_dtype:
        numbers += problem.N * problem.D  # widened hidden
    return size * numbers + problem.N * B * (1 + size)


def _hidden_accumulator_bytes(problem: Problem) -> int:
    """16-bit d_hidden is summed in fp32 beside the output; fp32 d_hidden is summed in the output itself."""
    if not problem.need_hidden or problem.hidden_dtype == problem.compute_dtype:
        return 0
    return problem.N * problem.D * problem.compute_dtype.itemsize
