"""The routed kernels as `aot` compiles them: which there are, the types of their own arguments, the constants that calls give them."""

import torch

from isdaa_kernels.backends.triton.routed_tiles import (
    DENSE_PERCENT,
    GROUP_ROWS,
    MASS_TOKENS,
    MEAN_COLUMNS,
    MEAN_ROWS,
    ROUTE_TOKENS,
    SLOT_COLUMNS,
    SUM_ROWS,
    GroupTile,
    choose_routed_tiles,
)

PRODUCTS = (
    "routed_gradient",
    "routed_weight",
    "routed_hidden",
)  # whose factors run on tensor cores where they have 16 bits
KERNELS = (*PRODUCTS, "rest_weight", "rest_hidden", "block_sums", "block_mean", "block_mass", "route", "list")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pointers(kernel: str, own: str) -> dict[str, str]:
    """Types by the names of the arguments; own: of hidden, weight and the gradient of their product."""
    types = dict.fromkeys(("log_mass", "mean", "rest", "mean_sums", "poison", "size"), "*fp32")
    types |= dict.fromkeys(("lists", "places", "counts", "ends", "target_block"), "*i32")
    types |= {"route": "*u8", "rules": "*fp64", "vocab_order": "*i64", "g": own}
    if kernel == "block_mean":
        types["out"] = "*fp32"
    if kernel == "block_sums":
        types["bias"] = "*fp32"
    return types


def optional(kernel: str) -> dict[str, str]:
    """The flags without which an argument is None."""
    return {"mean": "REST", "rest": "REST", "vocab_order": "ORDER"} if kernel == "finish_weight" else {}


def constants(kernel: str, arch: str, dtype: str, block: int, rich: bool) -> dict:
    """rich: a bias, and sums that are added to."""
    import triton.language as tl

    tiles = choose_routed_tiles(block, DTYPES[dtype], arch)
    flags = {
        "BLOCK": block, "FIRST": not rich, "LAST": True, "REST": rich, "ORDER": rich, "PRECISION": "ieee", "EVEN_D": True,
        "SPAN": 4, "STEP": tiles.step,         "GROUP": GROUP_ROWS // block, "DENSE": DENSE_PERCENT,
        "PIECE": tiles.piece,
        "SEARCH": 16384 // block, "TILE": tiles.gradient.M, "BISECTIONS": 20, "BY_ROW": True,
        "HALVES": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype],
    }  # fmt: skip
    shapes = {
        "block_sums": {"R": SUM_ROWS}, "block_mean": {"M": MEAN_ROWS, "K": MEAN_COLUMNS},
        "block_mass": {"M": MASS_TOKENS, "SLOTS": block // SLOT_COLUMNS}, "route": {"M": ROUTE_TOKENS}, "list": {"M": tiles.step},
    }  # fmt: skip
    tile = _tile(kernel, arch, dtype, block)
    if tile is not None:
        shapes[kernel] = {"M": tile.M, "N": tile.N, "K": tile.K}
    return flags | shapes.get(kernel, {})


def options(kernel: str, arch: str, dtype: str, block: int) -> dict[str, int]:
    tile = _tile(kernel, arch, dtype, block)
    return {"num_warps": 4} if tile is None else {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _tile(kernel: str, arch: str, dtype: str, block: int) -> GroupTile | None:
    tiles = choose_routed_tiles(block, DTYPES[dtype], arch)
    return {
        "routed_gradient": tiles.gradient, "routed_weight": tiles.weight, "routed_hidden": tiles.hidden,
        "rest_weight": tiles.rest_weight, "rest_hidden": tiles.rest_hidden,
    }.get(kernel)  # fmt: skip
