"""Tiles of hidden, weight and logits, in buffers that one call allocates once; and the calls into the C++ row kernels.

T tokens of a tile, C columns (vocabulary rows) of a tile, D hidden size.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu.extension import address, kernel
from isdaa_kernels.backends.cpu.products import PanelBuffer, Panels
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.stats import StatsRequest, TokenGradient

# Rows that are gathered at a time in a dtype other than that of the arithmetic.
GATHERED_ROWS = 128


def spans(total: int, tile: int) -> list[tuple[int, int]]:
    return [(start, min(start + tile, total)) for start in range(0, total, tile)]


def kept_block(kept_KV: Tensor, column: int, column_end: int) -> Tensor:
    """The kept logits [K, C] of one vocabulary tile. They stand together: a tile is then one stretch of memory, not K far rows."""
    K = len(kept_KV)
    return kept_KV.view(-1)[K * column : K * column_end].view(K, column_end - column)


class HiddenTiles:
    """Rows of hidden as factors of products: where they stand, if their dtype and columns allow it, else widened into one buffer."""

    def __init__(self, hidden_ND: Tensor, rows_N: Tensor, tile: int, dtype: torch.dtype):
        self.hidden_ND, self.rows_N, self.span, self.dtype = hidden_ND, rows_N, None, dtype
        self.direct = hidden_ND.dtype == dtype and hidden_ND.stride(1) == 1
        self.shape = tile, hidden_ND.shape[1]
        self.buffer_TD = None if self.direct else torch.empty(self.shape, dtype=dtype)
        self.panels, self.packed = None, None

    def left(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """(matrix, its rows that are meant; None: all)."""
        rows_T = self.rows_N[start:stop]
        if self.direct:
            return self.hidden_ND, rows_T
        tile_TD = self.buffer_TD[: stop - start]
        if self.span != (start, stop):
            tile_TD.copy_(self.hidden_ND.index_select(0, rows_T))
            self.span = (start, stop)
        return tile_TD, None

    def right(self, start: int, stop: int, scale_N: Tensor) -> Panels:
        """hidden times `scale_N`, [T, D]."""
        if self.panels is None:
            self.panels = PanelBuffer(*self.shape, self.dtype)
        if self.packed is None or self.packed[0] != (start, stop):
            panels = self.panels.of_rows(*self.left(start, stop), scale_N[start:stop])
            self.packed = (start, stop), panels
        return self.packed[1]


class WeightTiles:
    """Rows of weight in the order of their blocks as factors of products, each copied once while the walk stays with a tile."""

    def __init__(self, weight_VD: Tensor, tile: int, dtype: torch.dtype, order_V: Tensor | None = None):
        self.weight_VD, self.order_V, self.tile, self.dtype = weight_VD, order_V, tile, dtype
        self.direct = weight_VD.dtype == dtype and weight_VD.stride(1) == 1
        self.buffer_CD = None if self.direct else torch.empty(tile, weight_VD.shape[1], dtype=dtype)
        self.start, self.columns, self.rows = None, None, None
        self.packed = {}

    def columns_of(self, start: int, stop: int) -> Panels:
        """weight.T [D, C], the right factor of logits."""
        if self.columns is None:
            self.columns = PanelBuffer(self.weight_VD.shape[1], self.tile, self.dtype)
        return self._once("columns", start, lambda: self.columns.of_columns(*self._source(start, stop)))

    def rows_of(self, start: int, stop: int) -> Panels:
        """weight [C, D], the right factor of d_hidden."""
        if self.rows is None:
            self.rows = PanelBuffer(self.tile, self.weight_VD.shape[1], self.dtype)
        return self._once("rows", start, lambda: self.rows.of_rows(*self._source(start, stop)))

    def _once(self, name: str, start: int, make) -> Panels:
        if self.packed.get(name, (None,))[0] != start:
            self.packed[name] = start, make()
        return self.packed[name][1]

    def _source(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        if self.direct and self.order_V is not None:
            return self.weight_VD, self.order_V[start:stop]
        if self.direct:
            return self.weight_VD[start:stop], None
        if self.start != start:
            self._widen(start, stop)
            self.start = start
        return self.buffer_CD[: stop - start], None

    def _widen(self, start: int, stop: int) -> None:
        """In pieces: what is gathered in another dtype lies beside the buffer for a moment."""
        if self.order_V is None:
            self.buffer_CD[: stop - start].copy_(self.weight_VD[start:stop])
            return
        for a, b in spans(stop - start, GATHERED_ROWS):
            rows = self.order_V[start + a : start + b]
            self.buffer_CD[a:b].copy_(self.weight_VD.index_select(0, rows))


class RowKernels:
    """The C++ row kernels with the arguments that stay the same over a call."""

    def __init__(self, transform: Transform, rows_N: Tensor, targets_N: Tensor, dtype: torch.dtype):
        self.transform = transform
        self.dtype, self.size = dtype, dtype.itemsize
        self.bias_V = None if transform.bias_V is None else transform.in_order(transform.bias_V).to(dtype).contiguous()
        inverse = transform.inverse_temperature(rows_N, dtype)
        self.inverse_N = None if isinstance(inverse, float) else inverse
        self.head = {
            "constant_inverse_temperature": inverse if isinstance(inverse, float) else 0.0,
            "logit_scale": transform.logit_scale,
            "softcap": transform.softcap or 0.0,
        }
        self.targets_N = transform.placed(targets_N.index_select(0, rows_N))
        self.threads = torch.get_num_threads()

    def slope(self) -> Tensor:
        """dz / d(product) of each token, where there is no softcap."""
        inverse = self.head["constant_inverse_temperature"] if self.inverse_N is None else self.inverse_N
        return torch.ones(len(self.targets_N), dtype=self.dtype).mul_(self.head["logit_scale"]).mul_(inverse)

    def _tile(self, token: int, column: int, target_T: Tensor) -> dict:
        return {
            "bias": 0 if self.bias_V is None else self.bias_V.data_ptr() + column * self.size,
            "inverse_temperature": 0 if self.inverse_N is None else self.inverse_N.data_ptr() + token * self.size,
            "target": target_T.data_ptr(),
            "threads": self.threads,
            **self.head,
        }

    def forward_tile(
        self,
        logits: Tensor,
        logits_rows_T: Tensor | None,
        scratch_TC: Tensor,
        token: int,
        column: int,
        state: "State",
        kept_TC: Tensor | None = None,
        block_lse_BT: Tensor | None = None,
        block: int = 0,
    ) -> None:
        """Fold a tile of logits (whose rows `logits_rows_T` names) into the state of its tokens. scratch_TC may be overwritten, and may
        be the logits; kept_TC receives a copy of them first; block_lse_BT, if given, the log-sum-exps of blocks of `block` columns."""
        target_T = self.targets_N[token : token + len(scratch_TC)] - column
        kernel("forward_tile", self.dtype)(
            logits=logits.data_ptr(),
            row_index=address(logits_rows_T),
            logits_stride=logits.stride(0),
            scratch=scratch_TC.data_ptr(),
            scratch_stride=scratch_TC.stride(0),
            rows=scratch_TC.shape[0],
            columns=scratch_TC.shape[1],
            kept=address(kept_TC),
            kept_stride=0 if kept_TC is None else kept_TC.stride(0),
            block_lse=0 if block_lse_BT is None else block_lse_BT.data_ptr(),
            block_lse_stride=0 if block_lse_BT is None else block_lse_BT.stride(0),
            block=block,
            **state.addresses(token),
            **self._tile(token, column, target_T),
        )

    def backward_tile(
        self,
        logits: Tensor,
        logits_rows_T: Tensor | None,
        out: Tensor,
        out_rows_T: Tensor | None,
        token: int,
        column: int,
        lse_N: Tensor,
        grad: TokenGradient,
        scale_N: Tensor | None = None,
    ) -> None:
        """The gradient of a tile of logits, by the formula of TokenGradient times `scale_N`, into `out`, which may be the logits. Their
        rows are those that `logits_rows_T` and `out_rows_T` name; not both None where neither is one tile high."""
        count = len(out) if out_rows_T is None else len(out_rows_T)
        target_T = self.targets_N[token : token + count] - column
        kernel("backward_tile", self.dtype)(
            logits=logits.data_ptr(),
            row_index=address(logits_rows_T),
            logits_stride=logits.stride(0),
            gradient=out.data_ptr(),
            gradient_index=address(out_rows_T),
            gradient_stride=out.stride(0),
            rows=count,
            columns=out.shape[1],
            lse=address(lse_N, token),
            coefficient=address(grad.logprob_N, token),
            prob=address(grad.prob_N, token),
            log_prob=address(grad.log_prob_N, token),
            flat=address(grad.flat_N, token),
            scale=address(scale_N, token),
            **self._tile(token, column, target_T),
        )


class State:
    """What the forward knows of each token so far: the online log-sum-exp, the target's logit, and the sums of the statistics."""

    def __init__(self, N: int, V: int, dtype: torch.dtype, stats: StatsRequest):
        self.V, self.stats = V, stats
        self.max_N = torch.full((N,), float("-inf"), dtype=dtype)
        self.sum_N = torch.zeros(N, dtype=torch.float64)
        self.target_N = torch.full((N,), float("nan"), dtype=dtype)
        zeros = lambda name: torch.zeros(N, dtype=torch.float64) if stats.wants(name) else None  # noqa: E731
        self.entropy_N, self.square_N, self.logit_N = map(zeros, ("entropy", "log_sum_sq_prob", "mean_logit"))
        self.top_NK = None
        if stats.wants("top_k_mass", "top_k_entropy"):
            self.top_NK = torch.full((N, min(stats.top_k, V)), float("-inf"), dtype=dtype)

    def addresses(self, token: int) -> dict:
        return {
            "running_max": address(self.max_N, token),
            "running_sum": address(self.sum_N, token),
            "target_logit": address(self.target_N, token),
            "entropy_sum": address(self.entropy_N, token),
            "square_sum": address(self.square_N, token),
            "logit_sum": address(self.logit_N, token),
            "top": address(self.top_NK, token),
            "top_k": 0 if self.top_NK is None else self.top_NK.shape[1],
        }

    def finish(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(logprob, lse, statistics) in fp64; the difference of target and maximum is formed before the log of the sum is taken off."""
        log_sum_N, max_N = self.sum_N.log(), self.max_N.double()
        logprob_N, lse_N = (self.target_N.double() - max_N) - log_sum_N, max_N + log_sum_N
        return logprob_N, lse_N, [self._statistic(name, log_sum_N, lse_N) for name in self.stats.names]

    def _statistic(self, name: str, log_sum_N: Tensor, lse_N: Tensor) -> Tensor:
        if name == "lse":
            return lse_N
        if name == "entropy":
            return log_sum_N + self.entropy_N / self.sum_N
        if name == "mean_logit":
            return self.logit_N / self.V
        if name == "log_sum_sq_prob":
            return self.square_N.log() - 2 * log_sum_N
        if name == "is_top1":
            return ((self.target_N >= self.max_N) & ~self.sum_N.isnan()).double()
        log_p_NK = (self.top_NK.double() - self.max_N.double()[:, None]) - log_sum_N[:, None]
        p_NK = log_p_NK.exp()
        return p_NK.sum(1) if name == "top_k_mass" else -(p_NK * log_p_NK.masked_fill(p_NK == 0, 0)).sum(1)


def scatter(number: Tensor, rows_N: Tensor, out_N: Tensor) -> Tensor:
    """out_N with the numbers of the tokens `rows_N`, 0 elsewhere."""
    return out_N.zero_().index_copy_(0, rows_N, number.to(out_N.dtype))


def finish(state: State, rows_N: Tensor, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [N], stats [S, N], lse fp64 [N]) of all tokens from the state of those scored."""
    logprob, lse, numbers = state.finish()
    stats_SN = torch.empty(len(numbers), N, dtype=dtype)
    for s, number in enumerate(numbers):
        scatter(number, rows_N, stats_SN[s])
    logprob_N = scatter(logprob, rows_N, torch.empty(N, dtype=dtype))
    return logprob_N, stats_SN, scatter(lse, rows_N, torch.empty(N, dtype=torch.float64))
