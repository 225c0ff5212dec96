"""The Triton kernel set: grids, constants, descriptors. The contract of each kernel is in `backends.gpu.kernels`.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, N tokens of the call, S slots of partial results.
"""

import triton
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from isdaa_kernels.backends.triton.kernels.logits import fold_logits_kernel, gradient_logits_kernel
from isdaa_kernels.backends.triton.kernels.products import linear_logprob_backward_kernel, linear_logprob_forward_kernel
from isdaa_kernels.backends.triton.kernels.tokens import (
    combine_kernel,
    finish_hidden_kernel,
    finish_weight_kernel,
    gather_kernel,
    token_kernel,
)
from isdaa_kernels.backends.triton.launch_kl import KlKernels
from isdaa_kernels.backends.triton.launch_routed import RoutedKernels
from isdaa_kernels.backends.triton.routed_tiles import SLOT_COLUMNS, SLOT_ROWS
from isdaa_kernels.backends.triton.shapes import CONSTANTS, OPTIONS, TritonShapes, programs
from isdaa_kernels.backends.triton.tile_config import TileConfig


class TritonKernels(TritonShapes, RoutedKernels, KlKernels):
    def gather(self, *, hidden, rows, count, scale, out, first) -> None:
        (T, D), shape = out.shape, CONSTANTS["gather"]
        gather_kernel[(cdiv(T, shape["M"]), cdiv(D, shape["K"]))](
            hidden, rows, count, scale, out, first, T, D, *hidden.stride(), out.stride(0), SCALED=scale is not None, **shape, **OPTIONS,
        )  # fmt: skip

    def combine(self, *, targets, entropy, lse_stat, mean_logit, log_sum_sq, is_top1, partial_max, **arguments) -> None:
        (S, T), shape = partial_max.shape, CONSTANTS["combine"]
        combine_kernel[(cdiv(T, shape["M"]),)](
            targets=targets, entropy=entropy, lse_stat=lse_stat, mean_logit=mean_logit, log_sum_sq=log_sum_sq, is_top1=is_top1,
            partial_max=partial_max, **arguments, T=T, B=S, ENTROPY=entropy is not None, LSE=lse_stat is not None,
            TOTAL=mean_logit is not None, SQUARES=log_sum_sq is not None, TOP1=is_top1 is not None, **shape, **OPTIONS,
        )  # fmt: skip

    def token(
        self, *, prob_gradient, log_prob_gradient, flat_gradient, inverse_temperature, out, weight_entry, softcap, least, shift, scaled,
        **arguments,
    ) -> None:  # fmt: skip
        T, shape = len(inverse_temperature), CONSTANTS["token"]
        token_kernel[(cdiv(T, shape["M"]),)](
            prob_gradient=prob_gradient, log_prob_gradient=log_prob_gradient, flat_gradient=flat_gradient,
            inverse_temperature=inverse_temperature, out=out, weight_entry=weight_entry, T=T, PROB=prob_gradient is not None,
            LOG_PROB=log_prob_gradient is not None, FLAT=flat_gradient is not None, LEAST=least, SHIFT=shift, SCALED=scaled,
            TILE=out is not None, ENTRY=weight_entry is not None, **arguments, **_softcap(softcap), **shape, **OPTIONS,
        )  # fmt: skip

    def finish_hidden(self, *, sums, tokens, targets, weight, rows, count, d_hidden, first) -> None:
        (T, D), shape = sums.shape, CONSTANTS["finish_hidden"]
        finish_hidden_kernel[(cdiv(T, shape["M"]), cdiv(D, shape["K"]))](
            sums, tokens, targets, weight, rows, count, d_hidden, first, T, D, len(weight), sums.stride(0), *weight.stride(), **shape,
            **OPTIONS,
        )  # fmt: skip

    def finish_weight(
        self, *, sums, order, starts, targets, rows, weight_entry, hidden, top, d_weight, mean, rest, vocab_order, begin, shift, block
    ) -> None:  # fmt: skip
        (C, D), shape = sums.shape, CONSTANTS["finish_weight"]
        K = min(shape["K"], max(16, triton.next_power_of_2(D)))
        finish_weight_kernel[(cdiv(C, shape["R"]), cdiv(D, K))](
            sums, order, starts, targets, rows, weight_entry, hidden, top, d_weight, mean, rest, vocab_order, begin, C, D, sums.stride(0),
            *hidden.stride(), shift, REST=rest is not None, ORDER=vocab_order is not None, BLOCK=block, **{**shape, "K": K}, **OPTIONS,
        )  # fmt: skip

    def fold_logits(self, *, logits, rows, targets, softcap, bias, columns, **arguments) -> None:
        T, C = len(targets), arguments["end"] - arguments["begin"]
        shape = {"M": SLOT_ROWS, "N": SLOT_COLUMNS} if columns == SLOT_COLUMNS else CONSTANTS["fold_logits"]
        fold_logits_kernel[(cdiv(T, shape["M"]), cdiv(C, shape["N"]))](
            logits=logits, rows=rows, targets=targets, bias=bias, T=T, stride_n=logits.stride(0), stride_v=logits.stride(1),
            GATHER=rows is not None, HAS_BIAS=bias is not None, **arguments, **_softcap(softcap), **_wanted(arguments), **shape, **OPTIONS,
        )  # fmt: skip

    def gradient_logits(
        self, *, logits, out, bias, targets, bias_sums, softcap, log_prob, flat, target_entry, **arguments
    ) -> None:  # fmt: skip
        T, C, shape = len(targets), arguments["end"] - arguments["begin"], CONSTANTS["gradient_logits"]
        gradient_logits_kernel[(cdiv(T, shape["M"]), cdiv(C, shape["N"]))](
            logits=logits, out=out, bias=bias, targets=targets, bias_sums=bias_sums, T=T, stride_n=logits.stride(0),
            stride_v=logits.stride(1), stride_out_n=out.stride(0), stride_out_v=out.stride(1), HAS_BIAS=bias is not None,
            BIAS_SUMS=bias_sums is not None, LOG_PROB=log_prob, FLAT=flat, TARGET=target_entry, **arguments, **_softcap(softcap),
            **shape, **OPTIONS,
        )  # fmt: skip

    def linear_logprob_forward(self, *, hidden, weight, bias, softcap, tile, **arguments) -> None:
        tiles = cdiv(len(hidden), tile.M) * cdiv(len(weight), tile.N)
        linear_logprob_forward_kernel[programs(tile, tiles, hidden.device)](
            bias=bias, T=len(hidden), HAS_BIAS=bias is not None, **arguments, **_softcap(softcap), **_wanted(arguments),
            **_factors(tile, hidden, weight),
        )  # fmt: skip

    def linear_logprob_backward(
        self, *, hidden, weight, bias, out, bias_sums, softcap, log_prob, flat, tile, **arguments
    ) -> None:  # fmt: skip
        tiles = cdiv(len(hidden), tile.M) * cdiv(arguments["end"] - arguments["begin"], tile.N)
        linear_logprob_backward_kernel[programs(tile, tiles, hidden.device)](
            bias=bias, out=out, bias_sums=bias_sums, T=len(hidden), stride_out=out.stride(0), HAS_BIAS=bias is not None,
            BIAS_SUMS=bias_sums is not None, LOG_PROB=log_prob, FLAT=flat, **arguments, **_softcap(softcap),
            **_factors(tile, hidden, weight),
        )  # fmt: skip


KERNELS = TritonKernels()


def _softcap(softcap: float | None) -> dict:
    return {"softcap": 1.0 if softcap is None else softcap, "HAS_SOFTCAP": softcap is not None}


def _wanted(arguments: dict) -> dict[str, bool]:
    """Which statistics are asked for."""
    names = ("entropy", "total", "squares")
    return {name.upper(): arguments[f"partial_{name}"] is not None for name in names}


def _factors(tile: TileConfig, hidden_TD: Tensor, weight_CD: Tensor) -> dict:
    """Operands of a fused kernel, as descriptors where the tile wants them, and the tile's constants."""
    (C, D), hidden, weight = weight_CD.shape, hidden_TD, weight_CD
    if tile.tma:
        hidden = TensorDescriptor.from_tensor(hidden_TD, [tile.M, tile.K])
        weight = TensorDescriptor.from_tensor(weight_CD, [tile.N, tile.K])
    return {
        "hidden": hidden, "weight": weight, "D": D, "V": C, "stride_hidden": hidden_TD.stride(0),
        "stride_weight_v": weight_CD.stride(0), "stride_weight_d": weight_CD.stride(1), "TMA": tile.tma,
        "EVEN_D": D % tile.K == 0, "EVEN_V": C % tile.N == 0, "PRECISION": "ieee",
        "M": tile.M, "N": tile.N, "K": tile.K, "GROUP": tile.group, "PIECES": tile.pieces, "FLATTEN": tile.flatten,
        "SPECIALIZE": tile.specialize, "num_warps": tile.num_warps, "num_stages": tile.num_stages, **OPTIONS,
    }  # fmt: skip
