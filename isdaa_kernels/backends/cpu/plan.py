"""Tiles, workspace and matrix work of the CPU backend: pure arithmetic.

N tokens, D hidden size, V vocabulary.
"""

from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

# The forward's one shape. Few tokens, so that padding the last tile costs little: 128 tokens reach the rate of a large product.
FORWARD_TOKENS = 128
# The backward adds each tile into d_weight, so more tokens a tile mean fewer passes over d_weight.
BACKWARD_TOKENS = 512
_STATE_BYTES = 64  # a token: running maximum and sum, target logit, lse, indices


def vocab_tile(problem: Problem) -> int:
    """Depends on (V, D) alone: the log-prob of a token must not depend on the batch. 2048 rows, fewer where D is large (cache)."""
    rows = 2048
    while rows > 256 and rows * problem.D > 1 << 21:
        rows //= 2
    return min(rows, problem.V)


def make_plan(problem: Problem) -> Plan:
    """Tiles of fixed shape; the budget, where one is given, decides between one pass and two, and how many logits are kept."""
    columns = vocab_tile(problem)
    tokens = max(1, min(BACKWARD_TOKENS, problem.N))
    scratch = _scratch_bytes(problem, columns, max(tokens, FORWARD_TOKENS))
    accumulator = _hidden_accumulator_bytes(problem)
    kept = 0
    split = False
    if problem.max_workspace_mb is not None:
        budget = int(problem.max_workspace_mb * MIB) - scratch
        if budget < 0:
            raise refuse_budget(problem.max_workspace_mb, scratch)
        split = accumulator > budget
        if problem.keep_logits:
            row = problem.V * problem.compute_dtype.itemsize
            rows = (budget - (0 if split else accumulator)) // row
            kept = problem.N if rows >= problem.N else rows // FORWARD_TOKENS * FORWARD_TOKENS  # whole forward tiles
    if split:
        accumulator = 0
    work = problem.need_hidden + problem.need_weight
    recomputed = 1 - kept / max(problem.N, 1)
    passes = 2 if split and problem.need_weight and problem.need_hidden else 1
    return Plan(
        backend="cpu",
        token_tile=tokens,
        vocab_tile=columns,
        chunks=ceil_div(problem.N, tokens) * ceil_div(problem.V, columns),
        kept_tokens=kept,
        split=split,
        bytes=scratch + accumulator + kept * problem.V * problem.compute_dtype.itemsize,
        units=1.0 + work + passes * recomputed * (work > 0),
    )


def _scratch_bytes(problem: Problem, columns: int, tokens: int) -> int:
    size = problem.compute_dtype.itemsize
    numbers = tokens * columns + 2 * tokens * (problem.D + 16)  # logits, hidden, hidden times its token's scale
    if problem.weight_dtype != problem.compute_dtype:
        numbers += columns * problem.D * (1 + problem.need_weight)  # widened weight, fp32 d_weight of the tile
    if problem.hidden_dtype != problem.compute_dtype:
        numbers += tokens * problem.D
    return size * numbers + problem.N * _STATE_BYTES


def _hidden_accumulator_bytes(problem: Problem) -> int:
    """16-bit d_hidden is summed in fp32 beside the output; fp32 d_hidden is summed in the output itself."""
    if not problem.need_hidden or problem.hidden_dtype == problem.compute_dtype:
        return 0
    return problem.N * problem.D * problem.compute_dtype.itemsize
