"""Tiles, workspace and matrix work of the Triton backend: pure arithmetic, for a GPU that need not be here.

N tokens, D hidden size, V vocabulary, T tokens of a slab, C vocabulary rows of a chunk.
"""

import torch

from isdaa_kernels.backends.triton.tile_config import TileConfig, choose_tile_config
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import MIB, Plan, ceil_div, refuse_budget

DEFAULT_MIB = 512  # beside the fp32 sums of d_hidden, where no workspace is given
_FORWARD_TOKENS = 4096  # of a slab of the fused forward: bounds the partial results
SLAB_TOKENS = (16384, 8192, 4096, 2048, 1024, 512, 256)
CHUNK_COLUMNS = (16384, 8192, 4096, 2048, 1024)
# Tiles of logits that are read from memory: rows x columns.
FOLD_ROWS, LOGITS_TILE = 4, 2048
GRADIENT_ROWS, GRADIENT_COLUMNS = 16, 512
TOKEN_ROWS = 10  # fp32 numbers that `token_kernel` writes for each token of a slab
_TOKEN_BYTES = 32  # a token of the call: its index and slot, place in the order of targets, target, the target's entry
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
    """(tokens, columns) of the forward's products. The library's depend on the vocabulary and the device alone, and so do the bits of
    what comes out; a fused tile does not see the others of its slab."""
    if choose_products(problem) == "fused":
        M = slab_step(problem)
        return min(_FORWARD_TOKENS, ceil_div(max(problem.N, 1), M) * M), problem.V
    return (32, LOGITS_TILE) if arch_of(problem) == "interpreter" else (1024, min(8192, problem.V))


def fold_slots(problem: Problem, tile: TileConfig) -> int:
    """Partial results of each token: one a piece of a tile of vocabulary."""
    if choose_products(problem) == "library":
        return ceil_div(problem.V, LOGITS_TILE)
    return ceil_div(problem.V, tile.N) * tile.pieces


def make_plan(problem: Problem) -> Plan:
    """The largest slabs and chunks that fit. d_hidden and d_weight together: vocabulary chunks outside, every d_weight chunk finished
    once, d_hidden summed in fp32 beside it (4 D bytes a token); where that does not fit, two passes, which recompute the logits twice."""
    limited = problem.max_workspace_mb is not None
    budget = (problem.max_workspace_mb if limited else DEFAULT_MIB) * MIB
    both = problem.need_hidden and problem.need_weight
    sums = problem.N * problem.D * 4 if both else 0
    shape = _largest(problem, budget - (sums if limited else 0), split=False)
    split = shape is None and both
    if split:
        sums, shape = 0, _largest(problem, budget, split=True)
    if shape is None:
        T, C = min(_slabs(problem)), min(_chunks(problem))
        raise refuse_budget(problem.max_workspace_mb or DEFAULT_MIB, _bytes(problem, T, C, split=both))
    T, C = _balanced(problem, shape[0]), shape[1]
    work = problem.need_hidden + problem.need_weight
    return Plan(
        backend="triton",
        token_tile=T,
        vocab_tile=C,
        chunks=ceil_div(problem.N, T) * ceil_div(problem.V, C),
        kept_tokens=0,
        split=split,
        bytes=_bytes(problem, T, C, split) + sums,
        units=1.0 + work + (2 if split else 1) * (work > 0),
    )


def _slabs(problem: Problem) -> list[int]:
    M = slab_step(problem)
    return sorted({min(T, ceil_div(max(problem.N, 1), M) * M) for T in SLAB_TOKENS}, reverse=True)


def _balanced(problem: Problem, T: int) -> int:
    """Slabs of one height: as many as slabs of T are, with the least padding."""
    M = slab_step(problem)
    slabs = ceil_div(max(problem.N, 1), T)
    return ceil_div(ceil_div(max(problem.N, 1), slabs), M) * M


def _chunks(problem: Problem) -> list[int]:
    return sorted({min(C, problem.V) for C in CHUNK_COLUMNS}, reverse=True)


def _largest(problem: Problem, budget: float, split: bool) -> tuple[int, int] | None:
    """Of the shapes that fit the one of most logits: every sum in memory is then read and written least often."""
    fit = [(T, C) for T in _slabs(problem) for C in _chunks(problem) if _bytes(problem, T, C, split) <= budget]
    return max(fit, key=lambda shape: (shape[0] * shape[1], shape[0]), default=None)


def _bytes(problem: Problem, T: int, C: int, split: bool) -> int:
    backward = _backward_bytes(problem, T, C, split) if problem.need_hidden or problem.need_weight else 0
    return problem.N * _TOKEN_BYTES + max(_forward_bytes(problem), backward)


def _forward_bytes(problem: Problem) -> int:
    T, C = forward_shape(problem)
    size = product_dtype(problem).itemsize
    fused = choose_products(problem) == "fused"
    numbers = (
        T * (problem.D + 8) * size
        + T * fold_slots(problem, choose_tile_config(problem, arch_of(problem))) * _PARTIAL_BYTES
    )
    if not fused:
        numbers += T * C * 4 + (C * problem.D * 4 if problem.weight_dtype != torch.float32 else 0)
    return numbers


def _backward_bytes(problem: Problem, T: int, C: int, split: bool) -> int:
    size = product_dtype(problem).itemsize
    numbers = T * C * size + T * (problem.D + 8) * size + T * (TOKEN_ROWS + 4) * 4
    if problem.need_weight:
        numbers += C * problem.D * 4 + problem.V * 4
    if problem.need_hidden and (split or not problem.need_weight):
        numbers += T * problem.D * 4
    if choose_products(problem) == "library" and problem.weight_dtype != torch.float32:
        numbers += C * problem.D * 4
    return numbers
