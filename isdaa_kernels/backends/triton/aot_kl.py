"""The kernels of `linear_kl` as `aot` compiles them: their names, the types of their own arguments, their constants."""

from isdaa_kernels.backends.gpu.kernels import LOW_SCALE
from isdaa_kernels.backends.triton.shapes import CONSTANTS
from isdaa_kernels.backends.triton.tile_config import TileConfig, heads_pieces
from isdaa_kernels.divergence import DIRECTIONS

PRODUCTS = ("linear_kl_forward", "linear_kl_backward")  # fused with both heads' products
KERNELS = (*PRODUCTS, "kl_fold_logits", "kl_gradient_logits", "kl_combine", "kl_combine_mixture")
OPTIONAL = {
    "policy_bias": "POLICY_BIAS", "reference_bias": "REFERENCE_BIAS", "tokens": "MIXTURE", "bias_sums": "BIAS_SUMS", "low": "LOW_PART",
    "targets": "LOGPROBS", "target_logit": "LOGPROBS", "logprob": "LOGPROBS",
}  # fmt: skip
FLOATS = ("policy_scale", "policy_softcap", "reference_scale", "reference_softcap", "rest", "weight")
SIZES = ("E", "stride_policy", "stride_reference", *(f"stride_{name}_{part}" for name in ("policy", "reference")
         for part in ("hidden", "weight_v")))  # fmt: skip


def pointers(kernel: str, own: str, tile: TileConfig, dtype: str, tma: bool) -> dict[str, str]:
    """Types by the names of the arguments; own: of hidden and weight, whose gradient's chunk is fp16."""
    types = dict.fromkeys(("value", "partial", "policy", "reference", "target_logit", "logprob"), "*fp32")
    types |= {"numbers": "*fp64", "targets": "*i32", "out": "*fp16", "low": own}
    for name in ("policy", "reference"):
        types |= {f"{name}_bias": own, f"{name}_hidden": own, f"{name}_weight": own}
        if tma and kernel in PRODUCTS:
            types[f"{name}_hidden"] = f"tensordesc<{dtype}[{tile.M},{tile.K}]>"
            types[f"{name}_weight"] = f"tensordesc<{dtype}[{tile.N},{tile.K}]>"
    return types


def constants(
    kernel: str, direction: str, mixture: bool, logprobs: bool, parts: int, rich: bool, even: bool, tma: bool, tile: TileConfig
) -> dict:  # fmt: skip
    flags = dict.fromkeys(("POLICY_BIAS", "POLICY_SOFTCAP", "REFERENCE_BIAS", "REFERENCE_SOFTCAP", "BIAS_SUMS"), rich)
    flags |= {"DIRECTION": DIRECTIONS.index(direction), "EVEN_E": even, "LOGPROBS": logprobs}
    flags |= {"PARTS": parts, "LOW_PART": parts == 2, "LOW": LOW_SCALE}
    if kernel in ("linear_kl_forward", "kl_fold_logits"):
        flags["MIXTURE"] = mixture
    if kernel in PRODUCTS:
        return flags | {
            "TMA": tma, "EVEN_D": even, "EVEN_V": even, "PRECISION": "ieee", "M": tile.M, "N": tile.N, "K": tile.K, "GROUP": tile.group,
            "PIECES": heads_pieces(tile),
        }  # fmt: skip
    return flags | {name: value for name, value in CONSTANTS[kernel].items() if name != "num_warps"}


def options(kernel: str, tile: TileConfig) -> dict[str, int]:
    if kernel in PRODUCTS:
        return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {"num_warps": CONSTANTS[kernel].get("num_warps", 4)}
