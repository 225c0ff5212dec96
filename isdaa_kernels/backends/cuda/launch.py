"""The CUDA kernel set: the compiled kernels on tensors. Contracts: `isdaa_kernels.backends.gpu.kernels`.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, N tokens of the call, S slots of partial results.
"""

from isdaa_kernels.backends.cuda.extension import dtype_of, launch, multiprocessors
from isdaa_kernels.backends.cuda.launch_kl import KlKernels
from isdaa_kernels.backends.cuda.launch_routed import RoutedKernels
from isdaa_kernels.backends.cuda.shapes import CudaShapes


class CudaKernels(KlKernels, RoutedKernels, CudaShapes):
    # ---- tokens

    def gather(self, *, hidden, rows, count, scale, out, first) -> None:
        T, D = out.shape
        launch(
            "gather", out.device, source=hidden, source_dtype=hidden.dtype, rows=rows, count=count, scale=scale, out=out,
            out_dtype=out.dtype, first=first, T=T, D=D, stride_n=hidden.stride(0), stride_d=hidden.stride(1),
            stride_out=out.stride(0),
        )  # fmt: skip

    def combine(self, *, partial_max, first, V, **tensors) -> None:
        S, T = partial_max.shape
        launch("combine", partial_max.device, partial_max=partial_max, first=first, T=T, V=V, S=S, **tensors)

    def token(self, *, inverse_temperature, softcap, **rest) -> None:
        launch(
            "token", inverse_temperature.device, inverse_temperature=inverse_temperature, T=len(inverse_temperature),
            softcap=softcap or 0.0, **rest,
        )  # fmt: skip

    def finish_hidden(self, *, sums, weight, d_hidden, **rest) -> None:
        T, D = sums.shape
        launch(
            "finish_hidden", sums.device, sums=sums, weight=weight, weight_dtype=weight.dtype, d_hidden=d_hidden,
            d_hidden_dtype=d_hidden.dtype, T=T, D=D, V=len(weight), stride_sums=sums.stride(0), stride_weight_v=weight.stride(0),
            stride_weight_d=weight.stride(1), **rest,
        )  # fmt: skip

    def finish_weight(self, *, sums, targets, hidden, d_weight, **rest) -> None:
        C, D = sums.shape  # the kernel reads no targets: `starts` tells whose tokens they are
        launch(
            "finish_weight", sums.device, sums=sums, hidden=hidden, hidden_dtype=hidden.dtype, d_weight=d_weight,
            d_weight_dtype=d_weight.dtype, C=C, D=D, stride_sums=sums.stride(0), stride_n=hidden.stride(0),
            stride_d=hidden.stride(1), **rest,
        )  # fmt: skip

    # ---- logits in memory

    def fold_logits(self, *, logits, bias, targets, softcap, columns, **rest) -> None:
        launch(
            "fold_logits", logits.device, logits=logits, logits_dtype=logits.dtype, bias=bias, bias_dtype=dtype_of(bias),
            targets=targets, T=len(targets), stride_n=logits.stride(0), stride_v=logits.stride(1), softcap=softcap or 0.0,
            slot_columns=columns, **rest,
        )  # fmt: skip

    def gradient_logits(self, *, logits, out, bias, targets, softcap, log_prob, flat, **rest) -> None:
        # log_prob, flat: the kernel multiplies by what stands in `tokens`, 0 where nothing was asked for
        launch(
            "gradient_logits", logits.device, logits=logits, logits_dtype=logits.dtype, out=out, out_dtype=out.dtype, bias=bias,
            bias_dtype=dtype_of(bias), targets=targets, T=len(targets), stride_n=logits.stride(0), stride_v=logits.stride(1),
            stride_out_n=out.stride(0), stride_out_v=out.stride(1), softcap=softcap or 0.0, **rest,
        )  # fmt: skip

    # ---- fused with the product

    def linear_logprob_forward(self, *, hidden, weight, bias, softcap, tile, **rest) -> None:
        T, D = hidden.shape
        launch(
            "linear_logprob_forward_hopper", hidden.device, hidden=hidden, weight=weight, dtype=hidden.dtype, bias=bias,
            bias_dtype=dtype_of(bias), T=T, D=D, V=len(weight), stride_hidden=hidden.stride(0), stride_weight=weight.stride(0),
            softcap=softcap or 0.0, programs=multiprocessors(hidden.device), **rest,
        )  # fmt: skip

    def linear_logprob_backward(self, *, hidden, weight, bias, out, softcap, tile, **rest) -> None:
        T, D = hidden.shape
        launch(
            "linear_logprob_backward_hopper", hidden.device, hidden=hidden, weight=weight, dtype=hidden.dtype, bias=bias,
            bias_dtype=dtype_of(bias), out=out, T=T, D=D, V=len(weight), stride_hidden=hidden.stride(0),
            stride_weight=weight.stride(0), stride_out=out.stride(0), softcap=softcap or 0.0,
            programs=multiprocessors(hidden.device), **rest,
        )  # fmt: skip
