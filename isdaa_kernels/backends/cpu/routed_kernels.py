"""The C++ kernels of the routed backward with the arguments that stay the same over a call.

N tokens that carry a finite gradient, B blocks of vocabulary, C vocabulary rows of a block, T of the tokens routed to
it, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu.extension import address, kernel
from isdaa_kernels.backends.cpu.products import PanelBuffer
from isdaa_kernels.backends.cpu.tiles import RowKernels, WeightTiles
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.routing import Routed, mean_size


@dataclass(frozen=True)
class BlockRoutes:
    """`routing.Routes` as the kernels hold them."""

    route_BN: Tensor  # uint8: 0 nowhere, 1 for weight alone, 2 for weight and hidden
    rest_BN: Tensor  # mass * coefficient * slope where the route is 0, else 0
    weight_counts: list[int]  # of each block
    hidden_counts: list[int]


class Scratch:
    """Of the tokens of a block, T at a time."""

    def __init__(self, N: int, T: int, D: int, block: int, dtype: torch.dtype):
        self.listed_N, self.where_N = torch.empty(2, N, dtype=torch.int64)
        self.product_TC = torch.empty(T, block, dtype=dtype)
        self.hidden = PanelBuffer(T, D, dtype)


class RoutedKernels:
    def __init__(
        self, tokens, transform: Transform, targets_N: Tensor, block_lse_BN: Tensor, routed: Routed, dtype: torch.dtype
    ):  # fmt: skip
        self.tokens, self.block_lse_BN, self.dtype = tokens, block_lse_BN, dtype
        self.rows = RowKernels(transform, tokens.rows_N, targets_N, dtype)
        self.threads = self.rows.threads
        self.token = kernel("RoutedTokens", self.dtype)(
            block_lse=block_lse_BN.data_ptr(),
            block_lse_stride=block_lse_BN.stride(0),
            position=tokens.position_N.data_ptr(),
            lse=tokens.lse_N.data_ptr(),
            coefficient=tokens.coefficient_N.data_ptr(),
            slope=tokens.slope_N.data_ptr(),
            target=tokens.target_N.data_ptr(),
            tokens=len(tokens.rows_N),
            block=routed.block,
        )
        self.block = routed.block
        self.sums_TC, self.bias_TC = torch.empty(2, self.threads, routed.block, dtype=dtype)  # a row for each thread

    def choose_routes(self, routed: Routed) -> BlockRoutes:
        B, N = len(self.block_lse_BN), len(self.tokens.rows_N)
        route_BN, rest_BN = torch.empty(B, N, dtype=torch.uint8), torch.empty(B, N, dtype=self.dtype)
        counts_2B = torch.empty(2, B, dtype=torch.int64)
        if routed.scale is None:
            scale = float(mean_size(self.tokens.coefficient_N.abs()))
        else:
            scale = routed.scale * 2.0**-self.tokens.upstream.top
        kernel("route_blocks", self.dtype)(
            token=self.token,
            limit=routed.tolerance * scale,
            row_share=routed.row_share,
            blocks=B,
            route=route_BN.data_ptr(),
            rest=rest_BN.data_ptr(),
            weight_count=counts_2B[0].data_ptr(),
            hidden_count=counts_2B[1].data_ptr(),
            threads=self.threads,
        )
        return BlockRoutes(route_BN, rest_BN, *counts_2B.tolist())

    def block_gradient(
        self,
        routes: BlockRoutes,
        b: int,
        C: int,
        hidden_ND: Tensor,
        row_N: Tensor,
        weight: WeightTiles,
        scratch: "Scratch",
        d_hidden_ND: Tensor | None,
        d_CD: Tensor | None,
        need_bias: bool,
    ) -> None:
        """The tokens routed to block b: the gradient of their products with its C vocabulary rows joins d_hidden and becomes d_CD, and
        its column sums the first row of `bias_TC`; their distributions within the block are summed in the first row of `sums_TC`. The
        mass of those routed for weight alone joins `rest_BN`. Token n is row row_N[n] of hidden and d_hidden."""
        begin, end = b * self.block, b * self.block + C
        columns = rows = 0
        if routes.weight_counts[b]:
            columns = weight.columns_of(begin, end).numbers.data_ptr()
            rows = 0 if d_hidden_ND is None else weight.rows_of(begin, end).numbers.data_ptr()
        kernel("routed_block", self.dtype)(
            threads=self.threads,
            token=self.token,
            route=routes.route_BN[b].data_ptr(),
            weight_count=routes.weight_counts[b],
            hidden_count=routes.hidden_counts[b],
            columns=C,
            b=b,
            bias=address(self.rows.bias_V, begin),
            inverse_temperature=address(self.rows.inverse_N),
            entry=self.tokens.entry_N.data_ptr(),
            rest=routes.rest_BN[b].data_ptr(),
            hidden=hidden_ND.data_ptr(),
            row=row_N.data_ptr(),
            hidden_stride=hidden_ND.stride(0),
            width=hidden_ND.shape[1],
            weight_columns=columns,
            weight_rows=rows,
            d_hidden=address(d_hidden_ND),
            d_weight=address(d_CD),
            d_bias=address(self.bias_TC) if need_bias else 0,
            sums=self.sums_TC.data_ptr(),
            piece=len(scratch.product_TC),
            listed=scratch.listed_N.data_ptr(),
            where=scratch.where_N.data_ptr(),
            product=scratch.product_TC.data_ptr(),
            hidden_panels=scratch.hidden.numbers.data_ptr(),
            **self.rows.head,
        )

    def finish_block(
        self, C: int, d_CD: Tensor | None, rest_hidden_D: Tensor, where_C: Tensor | None, out_VD: Tensor | None
    ) -> Tensor:
        """The block's mean distribution [C], which takes the place of the sums. With it the rest joins d_CD, which goes, in the unit of
        the result, to the rows `where_C` of out_VD; d_CD itself where that is None."""
        limit, first, second = self.tokens.upstream.unscaling()
        kernel("finish_block", self.dtype)(
            sums=self.sums_TC.data_ptr(),
            columns=C,
            width=len(rest_hidden_D),
            gradient=address(d_CD),
            rest_hidden=rest_hidden_D.data_ptr(),
            row=address(where_C),
            out=address(d_CD if out_VD is None else out_VD),
            limit=limit,
            first=first,
            second=second,
            threads=self.threads,
        )
        return self.sums_TC.view(-1)[:C]
