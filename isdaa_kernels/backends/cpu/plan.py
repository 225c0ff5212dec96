"""Tiles, workspace and matrix work of the CPU backend: pure arithmetic.

N tokens, D hidden size, V vocabulary.
"""

from isdaa_kernels.backends.cpu.tiles import FORWARD_TOKENS
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

# The backward adds each tile into d_weight, so more tokens a tile mean fewer passes over d_weight; fewer where memory is short.
BACKWARD_TOKENS = (2048, 1024, 512, 256, 128)
_STATE_BYTES = 64  # a token: running maximum and sum, target logit, lse, indices


def vocab_tile(problem: Problem) -> int:
    """Depends on (V, D) alone: the log-prob of a token must not depend on the batch. 2048 rows, fewer where D is large (cache)."""
    rows = 2048
    while rows > 256 and rows * problem.D > 1 << 21:
        rows //= 2
    return min(rows, problem.V)


def make_plan(problem: Problem) -> Plan:
    """Tiles of fixed shape in the forward; a budget, where one is given, decides the backward's, whether d_hidden and d_weight take
    two passes, and how many logits are kept."""
    columns = vocab_tile(problem)
    accumulator = _hidden_accumulator_bytes(problem)
    budget = float("inf") if problem.max_workspace_mb is None else problem.max_workspace_mb * MIB
    tokens = _token_tile(problem, columns, budget - accumulator)
    split = tokens is None
    if split:
        accumulator = 0
        tokens = _token_tile(problem, columns, budget)
    if tokens is None:
        raise refuse_budget(problem.max_workspace_mb, _scratch_bytes(problem, columns, BACKWARD_TOKENS[-1]))
    fixed = _scratch_bytes(problem, columns, tokens) + accumulator
    row = problem.V * problem.compute_dtype.itemsize
    kept = 0
    if problem.keep_logits and problem.max_workspace_mb is not None and problem.routed is None:
        rows = int(budget - fixed) // row
        kept = problem.N if rows >= problem.N else rows // FORWARD_TOKENS * FORWARD_TOKENS  # whole forward tiles
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


def _token_tile(problem: Problem, columns: int, room: float) -> int | None:
    """Tokens of the largest backward tile whose buffers fit into `room` bytes."""
    return next(
        (max(1, min(t, problem.N)) for t in BACKWARD_TOKENS if _scratch_bytes(problem, columns, t) <= room), None
    )


def _scratch_bytes(problem: Problem, columns: int, tokens: int) -> int:
    size = problem.compute_dtype.itemsize
    tokens = max(min(tokens, problem.N), FORWARD_TOKENS)
    numbers = tokens * columns  # logits
    numbers += 3 * tokens * (problem.D + 16)  # hidden before and after widening, and times its token's scale
    numbers += problem.V  # widened bias
    if problem.hidden_dtype != problem.compute_dtype:
        numbers += tokens * problem.D  # rounded d_hidden of a tile
    if problem.weight_dtype != problem.compute_dtype:
        numbers += columns * problem.D * (1 + problem.need_weight)  # widened weight, fp32 d_weight of the tile
    return size * numbers + problem.N * _STATE_BYTES


def _hidden_accumulator_bytes(problem: Problem) -> int:
    """16-bit d_hidden is summed in fp32 beside the output; fp32 d_hidden is summed in the output itself."""
    if not problem.need_hidden or problem.hidden_dtype == problem.compute_dtype:
        return 0
    return problem.N * problem.D * problem.compute_dtype.itemsize
