"""Tiles, workspace and matrix work of a call on a GPU that need not be here: pure arithmetic over the shapes of a kernel set.

N tokens, D hidden size, V vocabulary, T tokens of a slab, C vocabulary rows of a chunk.
"""

import torch

from isdaa_kernels.backends.gpu.call import Call, gradient_parts, reference_dtype
from isdaa_kernels.backends.gpu.kernels import FusedTile, Shapes
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

DEFAULT_MIB = 512  # beside the fp32 sums of d_hidden, where no workspace is given
_FORWARD_TOKENS = 4096  # of a slab of the fused forward at most: bounds the partial results
SLAB_TOKENS = (16384, 8192, 4096, 2048, 1024, 512, 256)
CHUNK_COLUMNS = (16384, 8192, 4096, 2048, 1024)
_LIBRARY_TOKENS, _LIBRARY_COLUMNS = 1024, 8192  # of the forward's products where the library makes them
TOKEN_ROWS = 10  # fp32 numbers that `Kernels.token` writes for each token of a slab
ORDER_ROWS = 8192  # of the head that a fused forward gathers into the order of the blocks at once
WEIGHT_ROWS = 2048  # of d_weight that one slab finishes at once, while their fp32 sums are in the cache
_TOKEN_BYTES = (
    56  # a token of the call: log-sum-exp, log-prob, coefficient, target, index, slot, place in the order of targets
)
_ROUTED_BYTES = 40  # besides, where gradients are routed: size of the coefficient, block and place of the target, what they are made of
_ORDER_BYTES = 32  # a vocabulary row: its place in the order of the blocks, bias in that order, mean distribution, sum for the bias
_PARTIAL_BYTES = 24  # a token and slot: maximum, fp64 sum, three statistics
# Besides, where two heads are compared: four fp64 numbers, coefficients, exponents, each slab's numbers.
_KL_TOKEN_BYTES = 240
_KL_SLAB_BYTES = (
    160  # of a token in a slab of the forward: temperature, what the second pass reads, the targets' logits
)
KEPT_MIB = 256  # of both heads' logits for all of the vocabulary, which jsd's forward would like to keep
_LEAST_KEPT = 256  # tokens


def forward_shape(call: Call) -> tuple[int, int]:
    """(tokens, columns) of the forward's products; a fused one takes all columns unless they are gathered into an order. The library's
    depend on the vocabulary and the device alone, and so do the bits of what comes out; a fused tile does not see the others of its
    slab, which is as large as the workspace allows."""
    problem = call.problem
    if not call.fused:
        T, C = (32, 2048) if problem.arch is None else (_LIBRARY_TOKENS, min(_LIBRARY_COLUMNS, problem.V))
        if problem.divergence is not None and problem.divergence.direction == "jsd":
            while T > _LEAST_KEPT and 2 * 4 * T * problem.V > KEPT_MIB * MIB:
                T //= 2
        return T, C
    budget = _budget(problem) - _fixed_bytes(problem)
    slabs = [T for T in _slabs(call) if T <= _FORWARD_TOKENS] or _slabs(call)[-1:]
    columns = problem.V if problem.routed is None else min(ORDER_ROWS, problem.V)
    return next((T for T in slabs if _forward_bytes(call, T, columns) <= budget), slabs[-1]), columns


def keeps_logits(call: Call) -> bool:
    """Whether jsd's forward keeps the logits of both heads that the library made of a slab, instead of making them again when it has the
    log-sum-exps."""
    problem = call.problem
    if call.fused or problem.divergence is None or problem.divergence.direction != "jsd":
        return False
    return _kl_forward_bytes(call, *forward_shape(call), columns=problem.V) + _fixed_bytes(problem) <= _budget(problem)


def slot_columns(call: Call, tile: FusedTile | None) -> int:
    """Columns of a partial result. tile: of the fused forward, None where the library makes the logits."""
    return call.kernels.fold_columns(call.problem) if tile is None else tile.N // tile.pieces


def fold_slots(call: Call, tile: FusedTile | None) -> int:
    """Partial results of each token: one a piece of a tile of vocabulary."""
    if tile is None:
        return ceil_div(call.problem.V, slot_columns(call, tile))
    return ceil_div(call.problem.V, tile.N) * tile.pieces


def make_plan(kernels: Shapes, problem: Problem, aligned: bool = True) -> Plan:
    """The slabs and chunks that move the fewest bytes of those that fit. d_hidden and d_weight together: vocabulary chunks outside,
    every d_weight chunk finished once, d_hidden summed in fp32 beside it (4 D bytes a token); where that does not fit, two passes,
    which recompute the logits twice. Without `max_workspace_mb` nothing is refused.

    A divergence of two heads makes the reference's product beside each of the policy's, jsd's forward passes twice unless it keeps the
    logits, and each part of the gradient chunk is a product of its own.

    Routed gradients are made in one pass, with vocabulary chunks outside. `units` counts every pair of token and block as routed: it is
    the most that a call can cost. The blocks' masses and the routes, 5 bytes a token and block, are not counted in `bytes`."""
    call = Call(kernels, problem, aligned)
    limited = problem.max_workspace_mb is not None
    both = problem.need_hidden and problem.need_weight and problem.routed is None
    shapes = [(T, C) for T in _slabs(call) for C in _chunks(problem)]
    one_pass = [
        s
        for s in shapes
        if _bytes(call, *s, split=False) - (0 if limited else _sums(problem, s[0])) <= _budget(problem)
    ]
    two_passes = [s for s in shapes if _bytes(call, *s, split=True) <= _budget(problem)] if limited and both else []
    split = not one_pass and both and limited
    fit = two_passes if split else one_pass
    if not fit:
        if limited:
            raise refuse_budget(problem.max_workspace_mb, min(_bytes(call, *s, split) for s in shapes))
        fit = [shapes[-1]]
    T, C = min(fit, key=lambda shape: _traffic(problem, *shape))
    hidden_parts, weight_parts = gradient_parts(problem)
    work = hidden_parts * problem.need_hidden + weight_parts * problem.need_weight
    passes, products = 1 + (2 if split else 1) * (work > 0), 1.0
    if problem.divergence is not None:
        passes += problem.divergence.direction == "jsd" and not keeps_logits(call)
        products += problem.divergence.reference_D / problem.D
    return Plan(
        backend=kernels.name,
        token_tile=T,
        vocab_tile=C,
        chunks=ceil_div(problem.N, T) * ceil_div(problem.V, C),
        kept_tokens=0,
        split=split,
        bytes=_bytes(call, T, C, split),
        units=passes * products + work,
    )


def weight_rows(problem: Problem, T: int, C: int) -> int:
    """Rows of the fp32 sums of d_weight: few where one slab makes them whole, else a chunk that waits for the other slabs."""
    block = 1 if problem.routed is None else problem.routed.block
    return min(C, max(WEIGHT_ROWS // block, 1) * block) if T >= problem.N else C


def _budget(problem: Problem) -> float:
    return (DEFAULT_MIB if problem.max_workspace_mb is None else problem.max_workspace_mb) * MIB


def _slabs(call: Call) -> list[int]:
    """Heights to choose from, largest first: as many slabs as the rounder number would make, with the least padding."""
    step, N = call.kernels.slab_step(call.problem), max(call.problem.N, 1)
    counts = {ceil_div(N, T) for T in SLAB_TOKENS}
    return sorted({ceil_div(ceil_div(N, count), step) * step for count in counts}, reverse=True)


def _chunks(problem: Problem) -> list[int]:
    block = 1 if problem.routed is None else problem.routed.block  # no block lies in two chunks
    return sorted({min(ceil_div(C, block) * block, problem.V) for C in CHUNK_COLUMNS}, reverse=True)


def _traffic(problem: Problem, T: int, C: int) -> tuple[float, int]:
    """Bytes an entry of the logits' matrix that the sums move, in units of D; of equals the fewest tiles."""
    hidden = 8 / C if C < problem.V else 0.0  # the fp32 sums of d_hidden, read and written once a chunk
    gather = 4 / C if T < problem.N and C < problem.V else 0.0
    weight = 8 / T if T < problem.N else 0.0  # those of d_weight, once a slab
    return hidden + gather + weight, ceil_div(problem.N, T) * ceil_div(problem.V, C)


def _sums(problem: Problem, T: int) -> int:
    """fp32 d_hidden of all slabs, where one pass makes it beside d_weight, or where it is routed."""
    all_slabs = problem.need_hidden and (problem.need_weight or problem.routed is not None)
    return ceil_div(problem.N, T) * T * problem.D * 4 if all_slabs else 0


def _bytes(call: Call, T: int, C: int, split: bool) -> int:
    problem = call.problem
    backward = _backward_bytes(call, T, C, split) if problem.need_hidden or problem.need_weight else 0
    backward += 0 if split else _sums(problem, T)
    return _fixed_bytes(problem) + max(_forward_bytes(call, *forward_shape(call)), backward)


def _fixed_bytes(problem: Problem) -> int:
    if problem.divergence is not None:
        return problem.N * (_TOKEN_BYTES + _KL_TOKEN_BYTES)
    if problem.routed is None:
        return problem.N * _TOKEN_BYTES
    return problem.N * (_TOKEN_BYTES + _ROUTED_BYTES) + problem.V * _ORDER_BYTES


def _tile(call: Call, kernel: str) -> FusedTile | None:
    """That of a plain head: others leave hardly more partial results."""
    return call.kernels.fused_tile(call.problem, kernel, rich=False, aligned=True) if call.fused else None


def _forward_bytes(call: Call, T: int, C: int) -> int:
    problem, size = call.problem, call.dtype.itemsize
    if problem.divergence is not None:
        return _kl_forward_bytes(call, T, C, columns=problem.V if keeps_logits(call) else min(C, problem.V))
    slots = fold_slots(call, _tile(call, "forward"))
    numbers = T * (problem.D + 8) * size + T * slots * _PARTIAL_BYTES
    if problem.routed is not None or problem.weight_dtype != call.dtype:
        numbers += C * (problem.D + 8) * size  # rows of the head in another order or dtype
    return numbers if call.fused else numbers + T * C * 4


def _kl_forward_bytes(call: Call, T: int, C: int, columns: int) -> int:
    """columns: of both heads' logits that are there at once."""
    problem = call.problem
    partial = fold_slots(call, _tile(call, "forward")) * call.kernels.kl_partial_rows(problem.divergence.direction) * 4
    hidden = (problem.D + 8) * call.dtype.itemsize
    rows = _chunk_bytes(problem, C, problem.D, problem.weight_dtype, call.dtype)
    logits = 0 if call.fused else 2 * T * columns * 4
    return T * (hidden + partial + _KL_SLAB_BYTES) + rows + logits + _reference_bytes(call, T, C)


def _backward_bytes(call: Call, T: int, C: int, split: bool) -> int:
    problem, size = call.problem, call.dtype.itemsize
    numbers = T * (problem.D + 8) * size + T * (TOKEN_ROWS + 4) * 4
    if problem.need_weight:
        numbers += weight_rows(problem, T, C) * problem.D * 4 + problem.V * 4
    if problem.routed is not None:
        return numbers + _routed_bytes(call, T, C)
    numbers += _gradient_bytes(call, T, C)
    if problem.need_hidden and (split or not problem.need_weight):
        numbers += T * problem.D * 4
    if problem.weight_dtype != call.dtype:
        numbers += C * problem.D * size
    if problem.divergence is not None:
        logits = 0 if call.fused else T * C * 4
        numbers += _reference_bytes(call, T, C) + logits + _narrow_bytes(call, T, C)
    return numbers


def _narrow_bytes(call: Call, T: int, C: int) -> int:
    """Factors of the gradient chunk, times powers of two: a slab of hidden states in fp16 and in their own dtype, a chunk of the weight."""
    problem = call.problem
    slabs = 0 if call.gradient_dtype != torch.float16 else 1 if call.dtype == torch.float16 else 2
    hidden = slabs * T * (problem.D + 8) * 2 * problem.need_weight
    return hidden + (min(C, problem.V) * (problem.D + 12) * 2 + 8 * problem.V if call.converts_weight else 0)


def _reference_bytes(call: Call, T: int, C: int) -> int:
    """The reference's hidden states of a slab, its rows of a chunk in another dtype."""
    divergence, dtype = call.problem.divergence, reference_dtype(call.problem)
    hidden = T * (divergence.reference_D + 8) * dtype.itemsize
    rows = _chunk_bytes(call.problem, C, divergence.reference_D, divergence.reference_weight_dtype, dtype)
    return hidden + rows


def _chunk_bytes(problem: Problem, C: int, D: int, weight_dtype: torch.dtype, dtype: torch.dtype) -> int:
    return min(C, problem.V) * D * dtype.itemsize if weight_dtype != dtype else 0


def _gradient_bytes(call: Call, T: int, C: int) -> int:
    """A chunk of the gradient, of the logits beside it, and the sums for the bias."""
    tile = _tile(call, "backward")
    rows = (
        tile.M
        if tile is not None
        else call.kernels.gradient_rows
        if call.problem.divergence is None
        else call.kernels.kl_gradient_rows
    )
    chunk = (0 if call.fused else 4) + (0 if call.in_place else call.gradient_dtype.itemsize * call.parts)
    return T * C * chunk + ceil_div(T, rows) * C * 4 + 8 * call.problem.V


def _routed_bytes(call: Call, T: int, C: int) -> int:
    """What a routed backward allocates for a chunk: gradient, lists, sums of each tile, rows in the order of the blocks; and two matrices
    of the width of the number of blocks."""
    problem, size, routed = call.problem, call.dtype.itemsize, call.problem.routed
    sizes, blocks = call.kernels.routed_sizes(problem), ceil_div(C, routed.block)
    gradient = T * blocks * routed.block * size
    lists = 4 * blocks * (2 * T + ceil_div(T, sizes.step) + 5)
    sums = 2 * 4 * ceil_div(T, sizes.gradient_rows) * C
    return gradient + lists + sums + C * (problem.D + 8) * size + 2 * 4 * routed.blocks(problem.V) * problem.D
