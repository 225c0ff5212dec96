"""Shapes of the routed kernels' tiles: a pure function of the block, the factors' dtype and the GPU. D hidden size."""

from dataclasses import dataclass
from functools import cache

import torch

from isdaa_kernels.backends.triton.tile_config import family

SLOT_COLUMNS, SLOT_ROWS = 64, 32  # of a tile of logits that are read from memory, where the blocks' masses are kept


@dataclass(frozen=True)
class GroupTile:
    """M x N of the product, K a step along the sum."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RoutedTiles:
    gradient: GroupTile  # tokens x rows of the block, along D
    weight: GroupTile  # rows of the block x D, along the tokens
    hidden: GroupTile  # tokens x D, along the rows of the block
    rest_weight: GroupTile  # blocks x D, along the tokens
    rest_hidden: GroupTile  # tokens x D, along the blocks
    piece: int  # columns of a tile of logits that become their gradient at once
    step: int  # tokens that the lists are made of at once


# Gathered rows are read through the L2 cache: tiles of 128 x 128 do 64 flop a byte. That of d_hidden is short of neither flop nor stages:
# what it waits for is its sums' rows, and more warps wait better. fp32 factors are multiplied without tensor cores.
_STAGES = {"sm_80": 3, "sm_86": 2, "sm_90": 3, "sm_100": 3, "gfx942": 2}
_WHOLE = ("sm_86", "gfx942")  # elsewhere pieces of 64 columns take fewer registers
_FP32 = GroupTile(64, 64, 16, 8, 2), GroupTile(64, 64, 16, 8, 2), GroupTile(32, 64, 16, 8, 1)
_FP32_REST = GroupTile(32, 64, 16, 8, 1), GroupTile(32, 64, 16, 8, 1)
_REST = GroupTile(32, 128, 64, 8, 2), GroupTile(64, 128, 32, 8, 2)
_INTERPRETER = GroupTile(32, 64, 32, 4, 1), GroupTile(64, 64, 32, 4, 1), GroupTile(16, 64, 64, 4, 1)
# Columns of blocks whose products are summed in registers before they are added to d_hidden, where so many of their pairs are routed:
# reading and writing a row of sums costs as much as multiplying it with three blocks.
GROUP_ROWS, DENSE_PERCENT = 1024, 40
MASS_TOKENS, ROUTE_TOKENS = 256, 1024
SUM_ROWS, MEAN_ROWS, MEAN_COLUMNS = 8, 16, 256


@cache
def choose_routed_tiles(block: int, dtype: torch.dtype, arch: str) -> RoutedTiles:
    """arch: "sm_90", "gfx942", ..., or "interpreter"."""
    rest = choose_rest_tiles(dtype, arch)
    if arch == "interpreter":
        return RoutedTiles(*_INTERPRETER, *rest, piece=64, step=32)
    if dtype == torch.float32:
        return RoutedTiles(*_FP32, *rest, piece=64, step=256)
    row = family(arch)
    rows, stages = min(block, 128), _STAGES[row]
    piece = rows if row in _WHOLE else 64
    gradient, weight = GroupTile(128, rows, 64, 8, stages), GroupTile(rows, 128, 64, 8, stages)
    return RoutedTiles(gradient, weight, GroupTile(64, 128, 64, 8, 2), *rest, piece, step=256)


def choose_rest_tiles(dtype: torch.dtype, arch: str) -> tuple[GroupTile, GroupTile]:
    """Of `rest_weight` and `rest_hidden`, which know no block."""
    return _FP32_REST if dtype == torch.float32 and arch != "interpreter" else _REST
