"""Shapes of the Triton kernels that do not depend on a table, and what the passes of `backends.gpu` plan with. Needs no triton."""

from dataclasses import replace
from functools import cache
from typing import Literal

import torch

from isdaa_kernels.backends.gpu.call import fusable, product_dtype
from isdaa_kernels.backends.gpu.kernels import RoutedSizes
from isdaa_kernels.backends.triton.routed_tiles import SLOT_COLUMNS, choose_routed_tiles
from isdaa_kernels.backends.triton.tile_config import TileConfig, arch_of, choose_tile_config, heads_kind
from isdaa_kernels.dispatch import Problem

LOGITS_TILE = 2048  # columns of logits that are read from memory, where no block's mass is kept
OPTIONS = {"enable_fp_fusion": True}  # said outright: versions of Triton differ in their default
KL_OPTIONS = {"enable_fp_fusion": False}  # what a difference of two heads' logits rounds off must come out exactly
# Constants of the kernels whose work goes by token or by entry of logits in memory.
CONSTANTS = {
    "gather": {"M": 16, "K": 256},
    "combine": {"M": 8, "SLOTS": 64},
    "token": {"M": 128},
    "finish_hidden": {"M": 16, "K": 256},
    "finish_weight": {"R": 16, "M": 16, "K": 256},
    "fold_logits": {"M": 4, "N": LOGITS_TILE},
    "gradient_logits": {"M": 16, "N": 512},
    "kl_fold_logits": {"M": 16, "N": 512, "num_warps": 16},
    "kl_gradient_logits": {"M": 16, "N": 512, "num_warps": 16},
    "kl_combine": {"M": 8, "SLOTS": 64},
    "kl_combine_mixture": {"M": 8, "SLOTS": 64},
}


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def programs(tile: TileConfig, tiles: int, device: torch.device) -> tuple[int]:
    """The grid of a persistent kernel."""
    return (max(1, min(tiles, multiprocessors(device) * tile.programs)),)


class TritonShapes:
    name = "triton"
    narrows_in_place = False  # the programs of a row run in any order
    gradient_rows = CONSTANTS["gradient_logits"]["M"]
    kl_gradient_rows = CONSTANTS["kl_gradient_logits"]["M"]

    def kl_partial_rows(self, direction: str) -> int:
        return 6 if direction == "jsd" else 10

    def products(self, problem: Problem, aligned: bool) -> Literal["fused", "library"]:
        """Fused for 16-bit factors of one dtype, those of both heads where there are two: tiles of logits never leave the registers. fp32
        or mixed factors go to the library: full fp32 products run without tensor cores, where its kernels are several times faster than
        what Triton makes of `tl.dot`, and writing and reading the chunk is nothing beside them."""
        return "fused" if fusable(problem) else "library"

    def slab_step(self, problem: Problem) -> int:
        return 32 if arch_of(problem) == "interpreter" else 256

    def fused_tile(self, problem: Problem, kernel: str, rich: bool, aligned: bool) -> TileConfig:
        heads = problem.divergence is not None
        one = "unaligned" if not aligned else "rich" if rich else "plain"
        kind = heads_kind(kernel, aligned) if heads else one
        tile = choose_tile_config(problem, arch_of(problem), kernel, kind)
        return replace(tile, pieces=1) if heads else tile  # a slot of partial results each

    def fold_columns(self, problem: Problem) -> int:
        if problem.divergence is not None:
            return CONSTANTS["kl_fold_logits"]["N"]
        return LOGITS_TILE if problem.routed is None else SLOT_COLUMNS

    def routed_sizes(self, problem: Problem) -> RoutedSizes:
        tiles = choose_routed_tiles(problem.routed.block, product_dtype(problem), arch_of(problem))
        return RoutedSizes(tiles.gradient.M, tiles.step)
