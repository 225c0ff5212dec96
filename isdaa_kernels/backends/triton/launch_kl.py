"""The kernels of `linear_kl` in the Triton kernel set: grids, constants, descriptors. Contracts: `backends.gpu.kl_kernels`.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size (E that of the reference), V vocabulary, S slots of partial results.
"""

from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from isdaa_kernels.backends.gpu.kernels import LOW_SCALE
from isdaa_kernels.backends.triton.kernels.kl_logits import (
    kl_combine_kernel,
    kl_combine_mixture_kernel,
    kl_fold_logits_kernel,
    kl_gradient_logits_kernel,
)
from isdaa_kernels.backends.triton.kernels.linear_kl import linear_kl_backward_kernel, linear_kl_forward_kernel
from isdaa_kernels.backends.triton.shapes import CONSTANTS, KL_OPTIONS, programs
from isdaa_kernels.backends.triton.tile_config import TileConfig, heads_pieces
from isdaa_kernels.divergence import DIRECTIONS


class KlKernels:
    def linear_kl_forward(
        self, *, policy_hidden, reference_hidden, policy_weight, reference_weight, tokens, targets, target_logit, count, partial, tile,
        inverse_temperature, first, **heads,
    ) -> None:  # fmt: skip
        T, V = len(policy_hidden), len(policy_weight)
        tiles = cdiv(T, tile.M) * cdiv(V, tile.N)
        linear_kl_forward_kernel[programs(tile, tiles, policy_hidden.device)](
            inverse_temperature=inverse_temperature, tokens=tokens, targets=targets, target_logit=target_logit, count=count,
            partial=partial, first=first, T=T, S=partial.shape[1], V=V, MIXTURE=tokens is not None, LOGPROBS=targets is not None,
            EVEN_V=V % tile.N == 0, **_heads(**heads),
            **_factors(tile, policy_hidden, policy_weight, reference_hidden, reference_weight),
        )  # fmt: skip

    def linear_kl_backward(
        self, *, policy_hidden, reference_hidden, policy_weight, reference_weight, tokens, count, first, begin, end, tile, **rest,
    ) -> None:  # fmt: skip
        T = len(policy_hidden)
        tiles = cdiv(T, tile.M) * cdiv(end - begin, tile.N)
        linear_kl_backward_kernel[programs(tile, tiles, policy_hidden.device)](
            tokens=tokens, count=count, first=first, T=T, V=len(policy_weight), begin=begin, end=end, EVEN_V=(end - begin) % tile.N == 0,
            **_gradient(**rest),
            **_factors(tile, policy_hidden, policy_weight, reference_hidden, reference_weight),
        )  # fmt: skip

    def kl_fold_logits(
        self, *, policy, reference, inverse_temperature, tokens, targets, target_logit, count, partial, first, begin, end, **heads,
    ) -> None:  # fmt: skip
        T, shape = len(policy), CONSTANTS["kl_fold_logits"]
        kl_fold_logits_kernel[(cdiv(T, shape["M"]), cdiv(end - begin, shape["N"]))](
            policy=policy, reference=reference, inverse_temperature=inverse_temperature, tokens=tokens, targets=targets,
            target_logit=target_logit, count=count, partial=partial, first=first, T=T, S=partial.shape[1], begin=begin, end=end,
            stride_policy=policy.stride(0), stride_reference=reference.stride(0), MIXTURE=tokens is not None,
            LOGPROBS=targets is not None, **_heads(**heads), **shape, **KL_OPTIONS,
        )  # fmt: skip

    def kl_gradient_logits(self, *, policy, reference, tokens, live, begin, end, **rest) -> None:
        T, shape = len(policy), CONSTANTS["kl_gradient_logits"]
        kl_gradient_logits_kernel[(cdiv(T, shape["M"]), cdiv(end - begin, shape["N"]))](
            policy=policy, reference=reference, tokens=tokens, live=live, T=T, begin=begin, end=end, stride_policy=policy.stride(0),
            stride_reference=reference.stride(0), **_gradient(**rest), **shape, **KL_OPTIONS,
        )  # fmt: skip

    def kl_combine(
        self, *, partial, rows, count, targets, target_logit, value, numbers, logprob, first, direction
    ) -> None:
        (_, S, T), shape = partial.shape, CONSTANTS["kl_combine"]
        kl_combine_kernel[(cdiv(T, shape["M"]),)](
            partial, rows, count, targets, target_logit, value, numbers, logprob, first, T, S, numbers.shape[1],
            DIRECTION=DIRECTIONS.index(direction), LOGPROBS=targets is not None, **shape, **KL_OPTIONS,
        )  # fmt: skip

    def kl_combine_mixture(self, *, partial, rows, count, value, numbers, first, jsd_weight) -> None:
        (_, S, T), shape = partial.shape, CONSTANTS["kl_combine_mixture"]
        kl_combine_mixture_kernel[(cdiv(T, shape["M"]),)](
            partial, rows, count, value, numbers, first, T, S, numbers.shape[1], 1.0 - jsd_weight, jsd_weight, **shape, **KL_OPTIONS
        )  # fmt: skip


def _heads(direction: str, jsd_weight: float, **heads) -> dict:
    arguments = {"DIRECTION": DIRECTIONS.index(direction), "rest": 1.0 - jsd_weight, "weight": jsd_weight, **heads}
    for name in ("policy", "reference"):
        softcap = heads[f"{name}_softcap"]
        arguments |= {
            f"{name.upper()}_BIAS": heads[f"{name}_bias"] is not None,
            f"{name.upper()}_SOFTCAP": softcap is not None,
            f"{name}_softcap": 1.0 if softcap is None else softcap,
        }
    return arguments


def _gradient(out: Tensor, low: Tensor | None, targets: Tensor | None, bias_sums: Tensor | None, **heads) -> dict:
    """Where a gradient goes: low has the strides of out."""
    assert low is None or low.stride() == out.stride()
    return {
        "out": out, "low": low, "stride_out": out.stride(0), "PARTS": 1 if low is None else 2, "LOW": LOW_SCALE, "targets": targets,
        "LOGPROBS": targets is not None, "bias_sums": bias_sums, "BIAS_SUMS": bias_sums is not None, **_heads(**heads),
    }  # fmt: skip


def _factors(tile: TileConfig, hidden_TD: Tensor, weight_VD: Tensor, other_TE: Tensor, other_VE: Tensor) -> dict:
    """Operands of a fused kernel, as descriptors where the tile wants them, and the tile's constants."""
    arguments = {}
    for name, hidden, weight in (("policy", hidden_TD, weight_VD), ("reference", other_TE, other_VE)):
        arguments |= {
            f"{name}_hidden": TensorDescriptor.from_tensor(hidden, [tile.M, tile.K]) if tile.tma else hidden,
            f"{name}_weight": TensorDescriptor.from_tensor(weight, [tile.N, tile.K]) if tile.tma else weight,
            f"stride_{name}_hidden": hidden.stride(0), f"stride_{name}_weight_v": weight.stride(0),
            f"stride_{name}_weight_d": weight.stride(1),
        }  # fmt: skip
    D, E = weight_VD.shape[1], other_VE.shape[1]
    return arguments | {
        "D": D, "E": E, "TMA": tile.tma, "EVEN_D": D % tile.K == 0, "EVEN_E": E % tile.K == 0, "PRECISION": "ieee", "M": tile.M,
        "N": tile.N, "K": tile.K, "GROUP": tile.group, "PIECES": heads_pieces(tile), "num_warps": tile.num_warps,
        "num_stages": tile.num_stages, **KL_OPTIONS,
    }  # fmt: skip
