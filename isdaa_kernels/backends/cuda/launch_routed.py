"""The kernels of routed gradients in the CUDA kernel set. Contracts: `isdaa_kernels.backends.gpu.kernels`.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size, N tokens of the call, L live ones, B blocks, S slots of partial results.
"""

from isdaa_kernels.backends.cuda.extension import dtype_of, launch, multiprocessors
from isdaa_kernels.workspace import ceil_div

_PROGRAMS = 2  # a multiprocessor


class RoutedKernels:
    def block_mass(self, *, partial_max, log_mass, **rest) -> None:
        (S, T), (B, N) = partial_max.shape, log_mass.shape
        launch("block_mass", log_mass.device, partial_max=partial_max, log_mass=log_mass, T=T, S=S, N=N, B=B, **rest)

    def route(self, *, log_mass, route, **rest) -> None:
        (B, L), N = route.shape, log_mass.shape[1]
        launch("route", route.device, log_mass=log_mass, route=route, N=N, L=L, B=B, **rest)

    def list_tokens(self, *, route, lists, counts, **rest) -> None:
        T, L = lists.shape[1], route.shape[1]
        launch(
            "list_tokens", route.device, route=route, lists=lists, counts=counts, blocks=len(counts), T=T, L=L, **rest
        )

    def routed_gradient(self, *, hidden, weight, bias, log_mass, counts, out, **rest) -> None:
        (T, D), N, block = hidden.shape, log_mass.shape[1], out.shape[2]
        launch(
            "routed_gradient", hidden.device, hidden=hidden, weight=weight, dtype=hidden.dtype, bias=bias, bias_dtype=dtype_of(bias),
            log_mass=log_mass, counts=counts, out=out, T=T, D=D, N=N, C=len(weight), blocks=len(counts), block=block,
            stride_hidden=hidden.stride(0), stride_weight_v=weight.stride(0), stride_weight_d=weight.stride(1),
            programs=_PROGRAMS * multiprocessors(hidden.device), **rest,
        )  # fmt: skip

    def routed_weight(self, *, g, hidden, sums, **rest) -> None:
        (_, T, block), (R, D) = g.shape, sums.shape
        launch(
            "routed_weight", g.device, g=g, hidden=hidden, dtype=g.dtype, sums=sums, T=T, D=D, R=R, block=block,
            stride_hidden=hidden.stride(0), **rest,
        )  # fmt: skip

    def routed_hidden(self, *, g, weight, starts, sums, **rest) -> None:
        (_, T, block), (C, D) = g.shape, weight.shape
        launch(
            "routed_hidden", g.device, g=g, weight=weight, dtype=g.dtype, starts=starts, sums=sums, blocks=ceil_div(C, block),
            block=block, T=T, D=D, C=C, stride_weight_v=weight.stride(0), stride_weight_d=weight.stride(1),
            stride_sums=sums.stride(0), programs=_PROGRAMS * multiprocessors(g.device), **rest,
        )  # fmt: skip

    def rest_weight(self, *, route, log_mass, hidden, **rest) -> None:
        (T, D), (B, L), N = hidden.shape, route.shape, log_mass.shape[1]
        launch(
            "rest_weight", hidden.device, route=route, log_mass=log_mass, hidden=hidden, hidden_dtype=hidden.dtype, T=T, D=D, L=L,
            N=N, B=B, stride_hidden=hidden.stride(0), **rest,
        )  # fmt: skip

    def rest_hidden(self, *, route, log_mass, sums, **rest) -> None:
        (T, D), (B, L), N = sums.shape, route.shape, log_mass.shape[1]
        launch(
            "rest_hidden", sums.device, route=route, log_mass=log_mass, sums=sums, T=T, D=D, L=L, N=N, B=B,
            stride_sums=sums.stride(0), **rest,
        )  # fmt: skip

    def block_sums(self, *, mean, **rest) -> None:
        launch("block_sums", mean.device, mean=mean, C=len(mean), **rest)

    def block_mean(self, *, weight, out, **rest) -> None:
        C, D = weight.shape
        launch(
            "block_mean", out.device, weight=weight, weight_dtype=weight.dtype, out=out, D=D, C=C, stride_weight_v=weight.stride(0),
            stride_weight_d=weight.stride(1), **rest,
        )  # fmt: skip
