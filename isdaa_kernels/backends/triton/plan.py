"""Tiles, workspace and matrix work of the Triton backend: pure arithmetic, for a GPU that need not be here.

N tokens, D hidden size, V vocabulary, T tokens of a slab, C vocabulary rows of a chunk.
"""

import torch

from isdaa_kernels.backends.triton.routed_tiles import (
    SLOT_COLUMNS,
    SLOT_ROWS,
    RoutedTiles,
    choose_routed_tiles,
    routed_bytes,
)
from isdaa_kernels.backends.triton.tile_config import TileConfig, choose_tile_config
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

DEFAULT_MIB = 512  # beside the fp32 sums of d_hidden, where no workspace is given
_FORWARD_TOKENS = 4096  # of a slab of the fused forward at most: bounds the partial results
SLAB_TOKENS = (16384, 8192, 4096, 2048, 1024, 512, 256)
CHUNK_COLUMNS = (16384, 8192, 4096, 2048, 1024)
# Tiles of logits that are read from memory: rows x columns.
FOLD_ROWS, LOGITS_TILE = 4, 2048
GRADIENT_ROWS, GRADIENT_COLUMNS = 16, 512
TOKEN_ROWS = 10  # fp32 numbers that `token_kernel` writes for each token of a slab
ORDER_ROWS = 8192  # of the head that a fused forward gathers into the order of the blocks at once
WEIGHT_ROWS = 2048  # of d_weight that one slab finishes at once, while their fp32 sums are in the cache
_TOKEN_BYTES = (
    56  # a token of the call: log-sum-exp, log-prob, coefficient, target, index, slot, place in the order of targets
)
_ROUTED_BYTES = 40  # besides, where gradients are routed: size of the coefficient, block and place of the target, what they are made of
_ORDER_BYTES = 32  # a vocabulary row: its place in the order of the blocks, bias in that order, mean distribution, sum for the bias
_PARTIAL_BYTES = 24  # a token and slot: maximum, fp64 sum, three statistics


def choose_products(problem: Problem) -> str:
    """ "fused": the logits' product in our own kernel, tiles of logits never leave the registers. 16-bit factors of one dtype.
    "library": products of fixed shape into one chunk of fp32 logits, and one pass over it. fp32 or mixed factors: full fp32 products
    run without tensor cores, where the library's kernels are several times faster than what Triton makes of `tl.dot`, and writing and
    reading the chunk is nothing beside them.

    The two products of the backward always go to the library, from a gradient chunk in the factors' dtype: it is as fast as the
    hardware there, and a chunk costs 2 bytes written and 4 read an entry, against 6 D flop.
    """
    same = problem.hidden_dtype == problem.weight_dtype
    return "fused" if same and problem.hidden_dtype in (torch.float16, torch.bfloat16) else "library"


def product_dtype(problem: Problem) -> torch.dtype:
    """Of the products' factors and of the gradient chunk."""
    return problem.hidden_dtype if choose_products(problem) == "fused" else torch.float32


def slab_step(problem: Problem) -> int:
    """Slabs are multiples of it: of the height of any tile."""
    return 32 if arch_of(problem) == "interpreter" else 256


def arch_of(problem: Problem) -> str:
    return problem.arch or "interpreter"


def forward_shape(problem: Problem) -> tuple[int, int]:
    """(tokens, columns) of the forward's products; a fused one takes all columns unless they are gathered into an order. The library's
    depend on the vocabulary and the device alone, and so do the bits of what comes out; a fused tile does not see the others of its
    slab, which is as large as the workspace allows."""
    if choose_products(problem) == "library":
        return (32, LOGITS_TILE) if arch_of(problem) == "interpreter" else (1024, min(8192, problem.V))
    budget = _budget(problem) - _fixed_bytes(problem)
    slabs = [T for T in _slabs(problem) if T <= _FORWARD_TOKENS] or _slabs(problem)[-1:]
    columns = problem.V if problem.routed is None else min(ORDER_ROWS, problem.V)
    return next((T for T in slabs if _forward_bytes(problem, T, columns) <= budget), slabs[-1]), columns


def fold_shape(problem: Problem) -> tuple[int, int]:
    """Rows and columns of a tile of the library's logits that is folded at once."""
    return (FOLD_ROWS, LOGITS_TILE) if problem.routed is None else (SLOT_ROWS, SLOT_COLUMNS)


def fold_slots(problem: Problem, tile: TileConfig) -> int:
    """Partial results of each token: one a piece of a tile of vocabulary."""
    if choose_products(problem) == "library":
        return ceil_div(problem.V, fold_shape(problem)[1])
    return ceil_div(problem.V, tile.N) * tile.pieces


def routed_tiles(problem: Problem) -> RoutedTiles:
    return choose_routed_tiles(problem.routed.block, product_dtype(problem), arch_of(problem))


def make_plan(problem: Problem) -> Plan:
    """The slabs and chunks that move the fewest bytes of those that fit. d_hidden and d_weight together: vocabulary chunks outside,
    every d_weight chunk finished once, d_hidden summed in fp32 beside it (4 D bytes a token); where that does not fit, two passes,
    which recompute the logits twice. Without `max_workspace_mb` nothing is refused.

    Routed gradients are made in one pass, with vocabulary chunks outside. `units` counts every pair of token and block as routed: it is
    the most that a call can cost. The blocks' masses and the routes, 5 bytes a token and block, are not counted in `bytes`."""
    limited = problem.max_workspace_mb is not None
    both = problem.need_hidden and problem.need_weight and problem.routed is None
    shapes = [(T, C) for T in _slabs(problem) for C in _chunks(problem)]
    one_pass = [
        s
        for s in shapes
        if _bytes(problem, *s, split=False) - (0 if limited else _sums(problem, s[0])) <= _budget(problem)
    ]
    two_passes = [s for s in shapes if _bytes(problem, *s, split=True) <= _budget(problem)] if limited and both else []
    split = not one_pass and both and limited
    fit = two_passes if split else one_pass
    if not fit:
        if limited:
            raise refuse_budget(problem.max_workspace_mb, min(_bytes(problem, *s, split) for s in shapes))
        fit = [shapes[-1]]
    T, C = min(fit, key=lambda shape: _traffic(problem, *shape))
    work = problem.need_hidden + problem.need_weight
    return Plan(
        backend="triton",
        token_tile=T,
        vocab_tile=C,
        chunks=ceil_div(problem.N, T) * ceil_div(problem.V, C),
        kept_tokens=0,
        split=split,
        bytes=_bytes(problem, T, C, split),
        units=1.0 + work + (2 if split else 1) * (work > 0),
    )


def weight_rows(problem: Problem, T: int, C: int) -> int:
    """Rows of the fp32 sums of d_weight: few where one slab makes them whole, else a chunk that waits for the other slabs."""
    block = 1 if problem.routed is None else problem.routed.block
    return min(C, max(WEIGHT_ROWS // block, 1) * block) if T >= problem.N else C


def _budget(problem: Problem) -> float:
    return (DEFAULT_MIB if problem.max_workspace_mb is None else problem.max_workspace_mb) * MIB


def _slabs(problem: Problem) -> list[int]:
    """Heights to choose from, largest first: as many slabs as the rounder number would make, with the least padding."""
    step, N = slab_step(problem), max(problem.N, 1)
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


def _bytes(problem: Problem, T: int, C: int, split: bool) -> int:
    backward = _backward_bytes(problem, T, C, split) if problem.need_hidden or problem.need_weight else 0
    backward += 0 if split else _sums(problem, T)
    return _fixed_bytes(problem) + max(_forward_bytes(problem, *forward_shape(problem)), backward)


def _fixed_bytes(problem: Problem) -> int:
    if problem.routed is None:
        return problem.N * _TOKEN_BYTES
    return problem.N * (_TOKEN_BYTES + _ROUTED_BYTES) + problem.V * _ORDER_BYTES


def _forward_bytes(problem: Problem, T: int, C: int) -> int:
    size = product_dtype(problem).itemsize
    tile = choose_tile_config(problem, arch_of(problem))
    numbers = T * (problem.D + 8) * size + T * fold_slots(problem, tile) * _PARTIAL_BYTES
    if choose_products(problem) == "library":
        copied = problem.weight_dtype != torch.float32 or problem.routed is not None
        numbers += T * C * 4 + (C * (problem.D + 8) * 4 if copied else 0)
    elif problem.routed is not None:
        numbers += C * (problem.D + 8) * size
    return numbers


def _backward_bytes(problem: Problem, T: int, C: int, split: bool) -> int:
    size, fused = product_dtype(problem).itemsize, choose_products(problem) == "fused"
    numbers = T * (problem.D + 8) * size + T * (TOKEN_ROWS + 4) * 4
    if problem.routed is not None:
        numbers += routed_bytes(problem.routed, routed_tiles(problem), T, C, problem.D, problem.V, size)
    else:
        numbers += (
            T * C * size + ceil_div(T, 128 if fused else GRADIENT_ROWS) * C * 4 + 8 * problem.V
        )  # sums for the bias
    if problem.need_weight:
        numbers += weight_rows(problem, T, C) * problem.D * 4 + problem.V * 4
    if problem.routed is not None:
        return numbers
    if problem.need_hidden and (split or not problem.need_weight):
        numbers += T * problem.D * 4
    if not fused and problem.weight_dtype != torch.float32:
        numbers += C * problem.D * 4
    return numbers
