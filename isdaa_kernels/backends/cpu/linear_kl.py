"""`linear_kl` on the CPU: a tile of each head's logits, folded together by the C++ row kernels.

forward and reverse take one pass over both heads. jsd needs both log-sum-exps before its first term: a stripe of tokens keeps the logits
of both heads for the whole vocabulary until it has them, or, where memory is short, a second pass makes them again.
N tokens, D hidden size (E that of the reference), V vocabulary, T tokens and C vocabulary rows of a tile.
"""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu import products
from isdaa_kernels.backends.cpu.backward import Sweep
from isdaa_kernels.backends.cpu.linear_kl_kernels import KlKernels, KlState
from isdaa_kernels.backends.cpu.plan import BACKWARD_TOKENS, forward_spans, panel_numbers_of_tiles, vocab_tile
from isdaa_kernels.backends.cpu.products import panel_numbers
from isdaa_kernels.backends.cpu.sums import Upstream
from isdaa_kernels.backends.cpu.tiles import HiddenTiles, RowKernels, WeightTiles, scatter, spans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.divergence import KlGradient, Model
from isdaa_kernels.targets import raise_bad_targets, scored_rows
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

_STRIPE_MIB = 128  # of both heads' logits, when no workspace is given; the least stripe may take more
_TALLEST_STRIPE = 512
_STATE_BYTES = 256  # a token: running sums, what they become, indices


def make_plan(problem: Problem) -> Plan:
    """Pure arithmetic. A unit is a product of the policy; one of the reference counts by its hidden size."""
    columns, budget = _columns(problem), _budget(problem)
    accumulator = problem.N * problem.D * problem.compute_dtype.itemsize
    accumulator *= problem.need_hidden and problem.hidden_dtype != problem.compute_dtype
    tokens = _token_tile(problem, columns, budget - accumulator)
    split = tokens is None
    if split:
        accumulator = 0
        tokens = _token_tile(problem, columns, budget)
    if tokens is None:
        raise refuse_budget(problem.max_workspace_mb, _scratch_bytes(problem, columns, BACKWARD_TOKENS[-1]))
    work = problem.need_hidden + problem.need_weight
    passes = 2 if split and work == 2 else 1 if work else 0
    stripe = _stripe(problem)
    passes += 2 if problem.divergence.direction == "jsd" and not stripe else 1
    return Plan(
        backend="cpu",
        token_tile=tokens,
        vocab_tile=columns,
        chunks=ceil_div(problem.N, tokens) * ceil_div(problem.V, columns),
        kept_tokens=0,
        split=split,
        bytes=max(_scratch_bytes(problem, columns, tokens) + accumulator, _stripe_bytes(problem, stripe)),
        units=passes * (1 + problem.divergence.reference_D / problem.D) + work,
    )


def forward(
    problem: Problem, policy: Model, reference: Model, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise_bad_targets(targets_N, problem.V, ignore_index)
    plan, divergence, dtype = make_plan(problem), problem.divergence, problem.compute_dtype
    rows = scored_rows(targets_N, ignore_index, problem.N)
    kernels, state = (
        _kernels(problem, policy, reference, rows, targets_N),
        KlState(len(rows), dtype, divergence),
    )
    jsd, stripe = divergence.direction == "jsd", _stripe(problem)
    if stripe:
        tiles = _Tiles(problem, policy, reference, rows, spans(len(rows), stripe), wide=True)
        _mixture_in_stripes(tiles, kernels, state)
    else:
        tiles = _Tiles(problem, policy, reference, rows, forward_spans(len(rows), plan))
        for token, column, policy_TC, reference_TC in tiles.by_columns():
            kernels.fold(policy_TC, reference_TC, token, column, state)
        if jsd:
            state.start_mixture()
            state.normalize_for_mixture(slice(None))
            for token, column, policy_TC, reference_TC in tiles.by_columns():
                kernels.mixture(policy_TC, reference_TC, token, column, state)
    value, numbers_4K = state.finish_mixture() if jsd else state.finish()
    numbers_4N = _spread(numbers_4K, rows, len(targets_N), torch.float64)
    logprob_2N = _spread(state.logprobs(numbers_4K), rows, len(targets_N), dtype)
    return scatter(value, rows, torch.empty(len(targets_N), dtype=dtype)), numbers_4N, logprob_2N


def backward(
    problem: Problem,
    grad: KlGradient,
    policy: Model,
    reference: Model,
    targets_N: Tensor,
    ignore_index: int,
    numbers_4N: Tensor,
    logprob_2N: Tensor,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return KlSweep(problem, grad, policy, reference, targets_N, ignore_index, numbers_4N).gradients(need_bias)


class KlSweep(Sweep):
    """The walks of a backward over the tiles, with the logits of two heads in each."""

    def __init__(self, problem, grad, policy, reference, targets_N, ignore_index, numbers_4N):
        scored = scored_rows(targets_N, ignore_index, problem.N)
        self.rows = scored[grad.active().index_select(0, scored)]  # coefficients of exactly 0 cost nothing
        self.problem, self.policy, self.reference = problem, policy, reference
        self.hidden_ND, self.weight_VD, _ = policy
        self.dtype, self.plan, self.V = problem.compute_dtype, make_plan(problem), problem.V
        self.upstream = Upstream(grad.map(lambda term_N: term_N.index_select(0, self.rows).to(self.dtype)))
        self.numbers = numbers_4N.index_select(1, self.rows)
        self.pair = _kernels(problem, policy, reference, self.rows, targets_N)
        self.kernels = self.pair.policy

    def _gradient_tiles(self, tokens_outside: bool):
        tokens = spans(len(self.rows), self.plan.token_tile)
        tiles = _Tiles(self.problem, self.policy, self.reference, self.rows, tokens)
        for token, column, policy_TC, reference_TC in tiles.by_tokens() if tokens_outside else tiles.by_columns():
            self.pair.gradient(policy_TC, reference_TC, token, column, self.numbers, self.upstream.mantissa)
            T, C = policy_TC.shape
            side = tiles.policy
            yield (token, token + T), (column, column + C), policy_TC, side.hidden, side.weight


class _Side:
    """Tiles of one model's hidden states and weight, and a buffer for their product: of one tile, or, wide, of all of a token's."""

    def __init__(self, model: Model, rows: Tensor, height: int, columns: int, dtype: torch.dtype, wide: bool):
        self.hidden = HiddenTiles(model.hidden_ND, rows, height, dtype)
        self.weight = WeightTiles(model.weight_VD, columns, dtype)
        self.wide = wide
        self.buffer = torch.empty(height * (len(model.weight_VD) if wide else columns), dtype=dtype)

    def product(self, token: tuple[int, int], column: tuple[int, int]) -> Tensor:
        """[T, C], one stretch of memory."""
        hidden_ND, rows_T = self.hidden.left(*token)
        T, C = token[1] - token[0], column[1] - column[0]
        place = self.buffer[T * column[0] :] if self.wide else self.buffer
        product_TC = place[: T * C].view(T, C)
        return products.multiply(hidden_ND, self.weight.columns_of(*column), product_TC, left_rows=rows_T)


class _Tiles:
    """Yields (first token, first column, policy's product [T, C], reference's product [T, C])."""

    def __init__(
        self,
        problem: Problem,
        policy: Model,
        reference: Model,
        rows: Tensor,
        tokens: list[tuple[int, int]],
        wide: bool = False,
    ):
        height, columns = max((stop - start for start, stop in tokens), default=0), _columns(problem)
        self.policy, self.reference = (
            _Side(model, rows, height, columns, problem.compute_dtype, wide) for model in (policy, reference)
        )
        self.tokens, self.columns = tokens, spans(problem.V, columns)

    def by_columns(self):
        return (self.tile(token, column) for column, token in product(self.columns, self.tokens))

    def by_tokens(self):
        return (self.tile(token, column) for token, column in product(self.tokens, self.columns))

    def tile(self, token: tuple[int, int], column: tuple[int, int]):
        return token[0], column[0], self.policy.product(token, column), self.reference.product(token, column)


def _mixture_in_stripes(tiles: _Tiles, kernels: KlKernels, state: KlState) -> None:
    state.start_mixture()
    for stripe in tiles.tokens:
        pairs = []
        for column in tiles.columns:
            token, first_column, *pair = tiles.tile(stripe, column)
            kernels.fold(*pair, token, first_column, state)
            pairs.append(pair)
        state.normalize_for_mixture(slice(*stripe))
        for pair in pairs:
            kernels.mixture_of_logits(*pair, stripe[0], state)


def _spread(numbers_SK: Tensor, rows_K: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """[S, N], 0 but for the tokens `rows`."""
    return torch.zeros(len(numbers_SK), N, dtype=dtype).index_copy_(1, rows_K, numbers_SK.to(dtype))


def _kernels(problem: Problem, policy: Model, reference: Model, rows: Tensor, targets_N: Tensor) -> KlKernels:
    sides = (RowKernels(model.transform, rows, targets_N, problem.compute_dtype) for model in (policy, reference))
    return KlKernels(*sides, problem.divergence)


def _columns(problem: Problem) -> int:
    return vocab_tile(replace(problem, D=max(problem.D, problem.divergence.reference_D)))


def _budget(problem: Problem) -> float:
    return float("inf") if problem.max_workspace_mb is None else problem.max_workspace_mb * MIB


def _token_tile(problem: Problem, columns: int, room: float) -> int | None:
    return next(
        (max(1, min(t, problem.N)) for t in BACKWARD_TOKENS if _scratch_bytes(problem, columns, t) <= room), None
    )


def _stripe(problem: Problem) -> int:
    """Tokens of a stripe of jsd's forward; 0 where it takes two passes."""
    if problem.divergence.direction != "jsd":
        return 0
    heights = [t for t in BACKWARD_TOKENS if t <= _TALLEST_STRIPE]
    given = problem.max_workspace_mb is not None
    room = _budget(problem) if given else _STRIPE_MIB * MIB
    fitting = [t for t in heights if _stripe_bytes(problem, t) <= room]
    return fitting[0] if fitting else 0 if given else BACKWARD_TOKENS[-1]


def _stripe_bytes(problem: Problem, tokens: int) -> int:
    if not tokens:
        return 0
    columns = _columns(problem)
    height = min(tokens, problem.N)
    more = 2 * height * (problem.V - columns) * problem.compute_dtype.itemsize  # than one tile
    return _scratch_bytes(problem, columns, tokens) + more


def _scratch_bytes(problem: Problem, columns: int, tokens: int) -> int:
    size, divergence = problem.compute_dtype.itemsize, problem.divergence
    tokens, D, E = min(tokens, problem.N), problem.D, divergence.reference_D
    numbers = 2 * tokens * columns
    numbers += panel_numbers_of_tiles(tokens, columns, D) + panel_numbers(E, columns)
    numbers += tokens * (2 * D + E)  # hidden of other strides or dtype; d_hidden times its token's scale
    numbers += 2 * problem.V  # widened biases
    if problem.hidden_dtype != problem.compute_dtype:
        numbers += tokens * D  # rounded
    numbers += columns * (D + E)  # weight of other strides or dtype
    if problem.weight_dtype != problem.compute_dtype and problem.need_weight:
        numbers += columns * D  # fp32 d_weight of the tile
    return size * numbers + problem.N * _STATE_BYTES
