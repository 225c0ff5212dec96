"""The kernels of routed gradients in the Triton kernel set: grids and constants. Contracts: `backends.gpu.kernels`.

T tokens of a slab, C vocabulary rows of a chunk, b blocks in it, D hidden size, N tokens of the call, L live ones, B blocks.
"""

from dataclasses import asdict, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from isdaa_kernels.backends.triton.kernels.rest import (
    block_mean_kernel,
    block_sums_kernel,
    rest_hidden_kernel,
    rest_weight_kernel,
)
from isdaa_kernels.backends.triton.kernels.routed import (
    routed_gradient_kernel,
    routed_hidden_kernel,
    routed_weight_kernel,
)
from isdaa_kernels.backends.triton.kernels.routes import block_mass_kernel, list_kernel, route_kernel
from isdaa_kernels.backends.triton.routed_tiles import (
    DENSE_PERCENT,
    GROUP_ROWS,
    MASS_TOKENS,
    MEAN_COLUMNS,
    MEAN_ROWS,
    ROUTE_TOKENS,
    SUM_ROWS,
    GroupTile,
    RoutedTiles,
    choose_rest_tiles,
    choose_routed_tiles,
)
from isdaa_kernels.backends.triton.shapes import OPTIONS, multiprocessors
from isdaa_kernels.dispatch import device_arch

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_PROGRAMS = 2  # a multiprocessor


class RoutedKernels:
    def block_mass(self, *, partial_max, partial_sum, rows, count, lse, log_mass, first, slots) -> None:
        (S, T), (B, N) = partial_max.shape, log_mass.shape
        block_mass_kernel[(cdiv(T, MASS_TOKENS), B)](
            partial_max, partial_sum, rows, count, lse, log_mass, first, T, S, N, SLOTS=slots, M=MASS_TOKENS, **OPTIONS
        )

    def route(self, *, log_mass, rows, count, size, target_block, rules, route, bisections, by_row) -> None:
        (B, L), N = route.shape, log_mass.shape[1]
        route_kernel[(B,)](
            log_mass, rows, count, size, target_block, rules, route, N, L, BISECTIONS=bisections, BY_ROW=by_row, M=ROUTE_TOKENS,
            **OPTIONS,
        )  # fmt: skip

    def list_tokens(self, *, route, lists, places, starts, counts, begin, first, step) -> None:
        T, L = lists.shape[1], route.shape[1]
        list_kernel[(len(counts),)](route, lists, places, starts, counts, begin, first, T, L, M=step, **OPTIONS)

    def routed_gradient(
        self, *, hidden, weight, bias, targets, tokens, log_mass, rows, lists, counts, ends, out, mean_sums, bias_sums, first, begin,
        logit_scale,
    ) -> None:  # fmt: skip
        (T, D), (C, _), b, block = hidden.shape, weight.shape, len(counts), out.shape[2]
        tiles = _tiles(block, hidden)
        tile = tiles.gradient
        count = b * cdiv(T, tile.M) * (block // tile.N)
        routed_gradient_kernel[(min(count, _PROGRAMS * multiprocessors(hidden.device)),)](
            hidden, weight, bias, targets, tokens, log_mass, rows, lists, counts, ends, out, mean_sums, bias_sums, first, T, D,
            log_mass.shape[1], begin, C, b, hidden.stride(0), *weight.stride(), logit_scale, HAS_BIAS=bias is not None,
            BIAS_SUMS=bias_sums is not None, EVEN_D=D % tile.K == 0, BLOCK=block, SEARCH=triton.next_power_of_2(len(lists)),
            PIECE=tiles.piece, **_product(tile),
        )  # fmt: skip

    def routed_weight(self, *, g, hidden, lists, counts, sums, skip, C, is_first) -> None:
        (_, T, block), (R, D), tile = g.shape, sums.shape, _tiles(g.shape[2], g).weight
        parts = cdiv(R, block) * (block // tile.M)
        routed_weight_kernel[(cdiv(D, tile.N), parts)](
            g,
            hidden,
            lists,
            counts,
            sums,
            skip,
            T,
            D,
            C,
            hidden.stride(0),
            FIRST=is_first,
            BLOCK=block,
            **_product(tile),
        )

    def routed_hidden(self, *, g, weight, count, lists, places, starts, sums, first, step) -> None:
        (_, T, block), (C, D), steps = g.shape, weight.shape, starts.shape[1] - 1
        tile = _tiles(block, g).hidden
        columns = cdiv(D, tile.N)
        span = cdiv(steps * columns, _PROGRAMS * multiprocessors(g.device))
        routed_hidden_kernel[(columns, cdiv(steps, span))](
            g, weight, count, lists, places, starts, sums, cdiv(C, block), first, T, D, C, steps, *weight.stride(), sums.stride(0),
            SPAN=span, STEP=step, GROUP=GROUP_ROWS // block, DENSE=DENSE_PERCENT, BLOCK=block, **_product(tile),
        )  # fmt: skip

    def rest_weight(
        self, *, route, log_mass, rows, count, tokens, hidden, poison, sums, first, logit_scale, is_first
    ) -> None:  # fmt: skip
        (T, D), (B, L), N = hidden.shape, route.shape, log_mass.shape[1]
        tile = _narrowed(choose_rest_tiles(hidden.dtype, _arch(hidden))[0], D)
        rest_weight_kernel[(cdiv(D, tile["N"]), cdiv(B, tile["M"]))](
            route, log_mass, rows, count, tokens, hidden, poison, sums, first, T, D, L, N, B, hidden.stride(0), logit_scale,
            FIRST=is_first, **tile, **OPTIONS,
        )  # fmt: skip

    def rest_hidden(self, *, route, log_mass, rows, count, tokens, mean, sums, first, logit_scale, dtype) -> None:
        (T, D), (B, L), N = sums.shape, route.shape, log_mass.shape[1]
        tile = _narrowed(choose_rest_tiles(dtype, _arch(sums))[1], D)
        rest_hidden_kernel[(cdiv(D, tile["N"]), cdiv(T, tile["M"]))](
            route, log_mass, rows, count, tokens, mean, sums, first, T, D, L, N, B, sums.stride(0), logit_scale,
            HALVES=_DTYPES[dtype], **tile, **OPTIONS,
        )  # fmt: skip

    def block_sums(self, *, mean_sums, bias_sums, counts, mean, bias, block, rows, is_first, is_last) -> None:
        block_sums_kernel[(len(counts),)](
            mean_sums, bias_sums, counts, mean, bias, len(mean), FIRST=is_first, LAST=is_last, BIAS_SUMS=bias is not None, BLOCK=block,
            TILE=rows, R=SUM_ROWS, **OPTIONS,
        )  # fmt: skip

    def block_mean(self, *, weight, mean, out, block) -> None:
        (C, D), b = weight.shape, len(out)
        block_mean_kernel[(b, cdiv(D, MEAN_COLUMNS))](
            weight, mean, out, D, C, *weight.stride(), BLOCK=block, M=MEAN_ROWS, K=MEAN_COLUMNS, **OPTIONS
        )


def _arch(tensor: Tensor) -> str:
    return device_arch(tensor.device) or "interpreter"


def _tiles(block: int, factor: Tensor) -> RoutedTiles:
    return choose_routed_tiles(block, factor.dtype, _arch(factor))


def _product(tile: GroupTile) -> dict:
    return {"PRECISION": "ieee", **asdict(tile), **OPTIONS}


def _narrowed(tile: GroupTile, D: int) -> dict[str, int]:
    """The tile as arguments of a kernel, no wider than D."""
    return asdict(replace(tile, N=min(tile.N, max(16, triton.next_power_of_2(D)))))
