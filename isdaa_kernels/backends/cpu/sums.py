"""The gradients as they are summed tile by tile, in fp32 (fp64), rounded once; and the powers of two that keep them clear of denormals.

N tokens that carry a gradient, D hidden size, V vocabulary, T tokens and C vocabulary rows of a tile.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu import products
from isdaa_kernels.backends.cpu.tiles import HiddenTiles, WeightTiles
from isdaa_kernels.divergence import KlGradient
from isdaa_kernels.routing import FAINT
from isdaa_kernels.stats import TokenGradient

# A token that FAINT counts out adds 0 to d_weight and d_bias (it keeps its own d_hidden). With the floor on p in the row kernels, no
# product is a denormal number then.
_NO_EXPONENT = -(1 << 20)  # of a coefficient 0


class Upstream:
    """Coefficients of the tokens: grad = mantissa * 2 ** exponent, where the largest of a token's mantissas lies in [1, 2). Where one is
    not finite the token's mantissas are the coefficients themselves."""

    def __init__(self, grad: TokenGradient | KlGradient):
        first_N = grad.terms()[0]
        self.dtype, self.count = first_N.dtype, len(first_N)
        finite_N = torch.ones(self.count, dtype=torch.bool)
        exponent_N = torch.full((self.count,), _NO_EXPONENT, dtype=torch.int64)
        for term_N in grad.terms():
            finite_N &= torch.isfinite(term_N)
            own_N = torch.frexp(term_N).exponent.long() - 1
            exponent_N = torch.maximum(exponent_N, own_N.masked_fill_(term_N == 0, _NO_EXPONENT))
        self.mantissa = grad.map(lambda term_N: _mantissa(term_N, exponent_N, finite_N))
        self.top = int(exponent_N[finite_N].max()) if bool(finite_N.any()) else 0
        exponent_N = torch.where(finite_N, exponent_N, self.top)
        ones_N = torch.ones_like(first_N)
        self.scale_N = torch.ldexp(ones_N, exponent_N)
        relative_N = torch.ldexp(ones_N, exponent_N - self.top)
        self.relative_N = torch.where(exponent_N < self.top - FAINT[self.dtype], 0, relative_N)

    def unscaling(self) -> tuple[float, float, float]:
        """(limit, first, second): total * 2 ** top is total * first * second, and 0 up to the limit. Results below the smallest normal
        number are 0: making them would be slow on many processors."""
        info = torch.finfo(self.dtype)
        limit = min(info.smallest_normal * 2.0 ** min(-self.top, 1000), info.max) if self.top < -32 else 0.0
        half = self.top // 2  # in two steps: 2 ** top itself may be no number of this dtype
        return limit, 2.0**half, 2.0 ** (self.top - half)

    def unscale_(self, total: Tensor) -> Tensor:
        """total * 2 ** top in place."""
        limit, first, second = self.unscaling()
        if limit:
            torch.ops.aten.hardshrink.out(total, limit, out=total)
        return total.mul_(first).mul_(second) if self.top else total


def _mantissa(term_N: Tensor, exponent_N: Tensor, finite_N: Tensor) -> Tensor:
    """term * 2 ** -exponent; 0 where that is nothing beside the token's largest term, and would be a denormal number at last."""
    fraction_N, own_N = torch.frexp(term_N)
    below_N = own_N.long() - 1 - exponent_N
    mantissa_N = torch.ldexp(fraction_N * 2, below_N.clamp(-FAINT[term_N.dtype], 0))
    mantissa_N = torch.where(below_N < -FAINT[term_N.dtype], 0, mantissa_N)
    return torch.where(finite_N, mantissa_N, term_N).contiguous()


class HiddenSum:
    """d_hidden. Sums stand in the output's own first rows where the dtype allows it, else in a buffer: for all tokens, or for one
    tile of `tile` tokens when the walk finishes a tile before it goes on."""

    def __init__(self, hidden_ND: Tensor, rows_N: Tensor, upstream: Upstream, tile: int | None):
        dtype = upstream.dtype
        self.out_ND = torch.empty(hidden_ND.shape, dtype=hidden_ND.dtype)
        self.rows_N, self.upstream = rows_N, upstream
        self.one_tile = tile is not None
        in_place = hidden_ND.dtype == dtype
        count = tile if self.one_tile else len(rows_N)
        self.sum_ND = (
            self.out_ND if in_place and not self.one_tile else torch.empty(count, hidden_ND.shape[1], dtype=dtype)
        )
        self.done: list[tuple[int, int]] = []

    def _sum(self, token: tuple[int, int]) -> Tensor:
        return self.sum_ND[: token[1] - token[0]] if self.one_tile else self.sum_ND[slice(*token)]

    def add(
        self, token: tuple[int, int], column: tuple[int, int], g_TC: Tensor, weight: WeightTiles, last: bool
    ) -> None:
        products.multiply(g_TC, weight.rows_of(*column), self._sum(token), add=column[0] > 0)
        if last and self.one_tile:
            self._write(token)
        elif last:
            self.done.append(token)

    def _write(self, token: tuple[int, int]) -> None:
        rows_TD = self._sum(token) * self.upstream.scale_N[slice(*token), None]
        self.out_ND.index_copy_(0, self.rows_N[slice(*token)], rows_TD.to(self.out_ND.dtype))

    def finish(self) -> Tensor:
        # From the last tile to the first: rows_N ascends, so a row is written only where no unread sum stands.
        for token in reversed(self.done):
            self._write(token)
        idle_N = torch.ones(len(self.out_ND), dtype=torch.bool)
        idle_N[self.rows_N] = False
        self.out_ND[idle_N] = 0
        return self.out_ND


class WeightSum:
    """d_weight, one vocabulary tile after the other: summed in the output itself, or in one tile of fp32 beside a 16-bit output."""

    def __init__(self, weight_VD: Tensor, tile: int, upstream: Upstream):
        dtype = upstream.dtype
        nothing = upstream.count == 0
        make = torch.zeros if nothing else torch.empty
        self.out_VD = make(weight_VD.shape, dtype=weight_VD.dtype)
        self.in_place = weight_VD.dtype == dtype
        self.buffer_CD = None if self.in_place else torch.empty(tile, weight_VD.shape[1], dtype=dtype)
        self.upstream = upstream

    def add(
        self, token: tuple[int, int], column: tuple[int, int], g_TC: Tensor, hidden: HiddenTiles, last: bool
    ) -> None:
        out_CD = self.out_VD[slice(*column)]
        sum_CD = out_CD if self.in_place else self.buffer_CD[: len(out_CD)]
        hidden_TD = hidden.right(*token, self.upstream.relative_N)
        products.multiply(g_TC, hidden_TD, sum_CD, add=token[0] > 0, left_transposed=True)
        if last:
            self.upstream.unscale_(sum_CD)
            if not self.in_place:
                out_CD.copy_(sum_CD)

    def finish(self) -> Tensor:
        return self.out_VD


class BiasSum:
    """d_bias: column sums of the gradient of the product."""

    def __init__(self, bias_V: Tensor, upstream: Upstream):
        self.dtype, self.upstream = bias_V.dtype, upstream
        self.sum_V = torch.zeros(bias_V.shape, dtype=upstream.dtype)

    def add(self, token: tuple[int, int], column: tuple[int, int], g_TC: Tensor) -> None:
        self.sum_V[slice(*column)].addmv_(g_TC.T, self.upstream.relative_N[slice(*token)])

    def finish(self) -> Tensor:
        return self.upstream.unscale_(self.sum_V).to(self.dtype)
