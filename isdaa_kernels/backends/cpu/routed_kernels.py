"""The C++ kernels of the routed backward with the arguments that stay the same over a call.

N tokens that carry a finite gradient, B blocks of vocabulary, C vocabulary rows of a block, T of the tokens routed to
it, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu.tiles import RowKernels, address, native
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.routing import Routed, mean_size


@dataclass(frozen=True)
class BlockRoutes:
    """`routing.Routes` as the kernels hold them."""

    route_BN: Tensor  # uint8: 0 nowhere, 1 for weight alone, 2 for weight and hidden
    rest_BN: Tensor  # mass * coefficient * slope where the route is 0, else 0
    weight_counts: list[int]  # of each block
    hidden_counts: list[int]


class RoutedKernels:
    def __init__(
        self, tokens, row_N, transform: Transform, targets_N: Tensor, block_lse_BN: Tensor, routed: Routed, dtype: torch.dtype
    ):  # fmt: skip
        """row_N: where a token's row stands in what `gather` reads and `add_rows` adds to."""
        self.tokens, self.row_N, self.block_lse_BN, self.dtype = tokens, row_N, block_lse_BN, dtype
        self.rows = RowKernels(transform, tokens.rows_N, targets_N, dtype)
        self.suffix, self.threads = self.rows.suffix, self.rows.threads
        self.token = self._native("RoutedTokens")(
            block_lse=block_lse_BN.data_ptr(),
            block_lse_stride=block_lse_BN.stride(0),
            row=row_N.data_ptr(),
            position=tokens.position_N.data_ptr(),
            lse=tokens.lse_N.data_ptr(),
            coefficient=tokens.coefficient_N.data_ptr(),
            slope=tokens.slope_N.data_ptr(),
            target=tokens.target_N.data_ptr(),
            tokens=len(tokens.rows_N),
            block=routed.block,
        )
        self.block = routed.block
        self.sums_TC = torch.empty(self.threads, routed.block, dtype=dtype)  # one row a thread

    def _native(self, name: str):
        return getattr(native, f"{name}_{self.suffix}")

    def choose_routes(self, routed: Routed) -> BlockRoutes:
        B, N = len(self.block_lse_BN), len(self.tokens.rows_N)
        route_BN, rest_BN = torch.empty(B, N, dtype=torch.uint8), torch.empty(B, N, dtype=self.dtype)
        counts_2B = torch.empty(2, B, dtype=torch.int64)
        if routed.scale is None:
            scale = float(mean_size(self.tokens.coefficient_N.abs()))
        else:
            scale = routed.scale * 2.0**-self.tokens.upstream.top
        self._native("route_blocks")(
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

    def begin_block(self, routes: BlockRoutes, b: int, rows_N: Tensor) -> None:
        """Writes the tokens routed to block b, those whose hidden state is routed there first. The sum of distributions is 0."""
        self.sums_TC[0].zero_()
        native.list_tokens(
            route=routes.route_BN[b].data_ptr(),
            tokens=len(self.tokens.rows_N),
            hidden_count=routes.hidden_counts[b],
            listed=rows_N.data_ptr(),
        )

    def gather(self, hidden_ND: Tensor, rows_T: Tensor, out_TD: Tensor) -> None:
        """hidden_ND: rows as `row_N` counts them, with columns side by side."""
        self._native("gather_rows")(
            token=self.token,
            listed=rows_T.data_ptr(),
            count=len(rows_T),
            values=hidden_ND.data_ptr(),
            stride=hidden_ND.stride(0),
            width=hidden_ND.shape[1],
            out=out_TD.data_ptr(),
            threads=self.threads,
        )

    def gradient(self, routes: BlockRoutes, b: int, rows_T: Tensor, to_hidden: int, product_TC: Tensor) -> None:
        """The gradient of the product in its place; the sum over the tokens of exp(z - block_lse) joins `sums_TC[0]`. The first
        `to_hidden` tokens are routed here in the gradient of hidden; the mass of the others joins `rest_BN`."""
        C, bias_V = product_TC.shape[1], self.rows.bias_V
        self._native("routed_tile")(
            token=self.token,
            listed=rows_T.data_ptr(),
            count=len(rows_T),
            to_hidden=to_hidden,
            columns=C,
            b=b,
            product=product_TC.data_ptr(),
            entry=self.tokens.entry_N.data_ptr(),
            rest=routes.rest_BN[b].data_ptr(),
            sums=self.sums_TC.data_ptr(),
            bias=address(bias_V, b * self.block),
            inverse_temperature=address(self.rows.inverse_N),
            threads=self.threads,
            **self.rows.head,
        )

    def finish_block(
        self, C: int, d_CD: Tensor | None, rest_hidden_D: Tensor, where_C: Tensor | None, out_VD: Tensor | None
    ) -> Tensor:
        """The block's mean distribution [C], which takes the place of the sums. With it the rest joins d_CD, which goes, in the unit of
        the result, to the rows `where_C` of out_VD; d_CD itself where that is None."""
        limit, first, second = self.tokens.upstream.unscaling()
        self._native("finish_block")(
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

    def add_rows(self, values_TD: Tensor, rows_T: Tensor, out_ND: Tensor) -> None:
        """out[token] += values, for as many of the tokens as there are values. out_ND: rows as `row_N` counts them."""
        self._native("add_rows")(
            token=self.token,
            listed=rows_T.data_ptr(),
            count=len(values_TD),
            values=values_TD.data_ptr(),
            width=out_ND.shape[1],
            out=out_ND.data_ptr(),
            threads=self.threads,
        )
