"""Shapes of the Triton kernels that do not depend on a table, and what the passes of `backends.gpu` plan with. Needs no triton."""

from functools import cache
from typing import Literal

import torch

from isdaa_kernels.backends.gpu.call import product_dtype
from isdaa_kernels.backends.gpu.kernels import RoutedSizes
from isdaa_kernels.backends.triton.routed_tiles import SLOT_COLUMNS, choose_routed_tiles
from isdaa_kernels.backends.triton.tile_config import TileConfig, arch_of, choose_tile_config
from isdaa_kernels.dispatch import Problem

LOGITS_TILE = 2048  # columns of logits that are read from memory, where no block's mass is kept
OPTIONS = {"enable_fp_fusion": True}  # said outright: versions of Triton differ in their default
# Constants of the kernels whose work goes by token or by entry of logits in memory.
CONSTANTS = {
    "gather": {"M": 16, "K": 256},
    "combine": {"M": 8, "SLOTS": 64},
    "token": {"M": 128},
    "finish_hidden": {"M": 16, "K": 256},
    "finish_weight": {"R": 16, "M": 16, "K": 256},
    "fold_logits": {"M": 4, "N": LOGITS_TILE},
    "gradient_logits": {"M": 16, "N": 512},
}


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class TritonShapes:
    name = "triton"
    narrows_in_place = False  # the programs of a row run in any order
    gradient_rows = CONSTANTS["gradient_logits"]["M"]

    def products(self, problem: Problem, aligned: bool) -> Literal["fused", "library"]:
        """Fused for 16-bit factors of one dtype: tiles of logits never leave the registers. fp32 or mixed factors go to the library: full
        fp32 products run without tensor cores, where its kernels are several times faster than what Triton makes of `tl.dot`, and
        writing and reading the chunk is nothing beside them."""
        return "library" if product_dtype(problem) == torch.float32 else "fused"

    def slab_step(self, problem: Problem) -> int:
        return 32 if arch_of(problem) == "interpreter" else 256

    def fused_tile(self, problem: Problem, kernel: str, rich: bool, aligned: bool) -> TileConfig:
        kind = "rich" if rich else "plain"
        return choose_tile_config(problem, arch_of(problem), kernel, kind if aligned else "unaligned")

    def fold_columns(self, problem: Problem) -> int:
        return LOGITS_TILE if problem.routed is None else SLOT_COLUMNS

    def routed_sizes(self, problem: Problem) -> RoutedSizes:
        tiles = choose_routed_tiles(problem.routed.block, product_dtype(problem), arch_of(problem))
        return RoutedSizes(tiles.gradient.M, tiles.step)
