"""Tiles of hidden, weight and logits, in buffers that one call allocates once; and the calls into the C++ row kernels.

T tokens of a tile, C columns (vocabulary rows) of a tile, D hidden size.
"""

import torch
from torch import Tensor

from isdaa_kernels.lm_head import Transform

try:
    from isdaa_kernels import _cpu as native

    missing = ""
except ImportError as error:  # reported by refusal() and describe()
    native, missing = None, str(error)


# The height of every product of logits in the forward, and the least height in the backward: libraries take another path for a few
# rows, and then a saturated token's logit in the backward differs by a rounding from that in its log-sum-exp, which is all there is of
# its gradient. Few tokens, so that padding the last tile costs little: 128 reach the rate of a large product.
FORWARD_TOKENS = 128


def spans(total: int, tile: int) -> list[tuple[int, int]]:
    return [(start, min(start + tile, total)) for start in range(0, total, tile)]


def kept_block(kept_KV: Tensor, column: int, column_end: int) -> Tensor:
    """The kept logits [K, C] of one vocabulary tile. They stand together: a tile is then one stretch of memory, not K far rows."""
    K = len(kept_KV)
    return kept_KV.view(-1)[K * column : K * column_end].view(K, column_end - column)


class HiddenTiles:
    """Rows of hidden gathered and widened into one buffer. Its rows are 64-byte aligned: a library product then treats all alike."""

    def __init__(self, hidden_ND: Tensor, rows_N: Tensor, tile: int, dtype: torch.dtype):
        self.hidden_ND, self.rows_N, self.span = hidden_ND, rows_N, None
        D = hidden_ND.shape[1]
        self.buffer_TD = torch.zeros(max(tile, FORWARD_TOKENS), -(-D // 16) * 16, dtype=dtype)[:, :D]

    def load(self, start: int, stop: int) -> Tensor:
        """[T, D] with zeros behind the last token where there are fewer than FORWARD_TOKENS."""
        count = stop - start
        height = max(count, FORWARD_TOKENS)
        if self.span != (start, stop):
            self.buffer_TD[:count].copy_(self.hidden_ND.index_select(0, self.rows_N[start:stop]))
            self.buffer_TD[count:height].zero_()
            self.span = (start, stop)
        return self.buffer_TD[:height]


class WeightTiles:
    """Rows of weight, as a view where they already have the dtype, else widened into one buffer."""

    def __init__(self, weight_VD: Tensor, tile: int, dtype: torch.dtype):
        self.weight_VD, self.start = weight_VD, None
        same = weight_VD.dtype == dtype
        self.buffer_CD = None if same else torch.empty(tile, weight_VD.shape[1], dtype=dtype)

    def load(self, start: int, stop: int) -> Tensor:
        rows_CD = self.weight_VD[start:stop]
        if self.buffer_CD is None:
            return rows_CD
        if self.start != start:
            self.buffer_CD[: stop - start].copy_(rows_CD)
            self.start = start
        return self.buffer_CD[: stop - start]


class RowKernels:
    """The C++ row kernels with the arguments that stay the same over a call."""

    def __init__(self, transform: Transform, rows_N: Tensor, targets_N: Tensor, dtype: torch.dtype):
        self.transform = transform
        self.size = dtype.itemsize
        self.suffix = str(dtype).removeprefix("torch.")
        self.bias_V = None if transform.bias_V is None else transform.bias_V.to(dtype).contiguous()
        inverse = transform.inverse_temperature(rows_N, dtype)
        self.inverse_N = None if isinstance(inverse, float) else inverse
        self.head = {
            "constant_inverse_temperature": inverse if isinstance(inverse, float) else 0.0,
            "logit_scale": transform.logit_scale,
            "softcap": transform.softcap or 0.0,
        }
        self.targets_N = targets_N.index_select(0, rows_N).long()
        self.threads = torch.get_num_threads()

    def _tile(self, token: int, column: int, target_T: Tensor) -> dict:
        return {
            "bias": 0 if self.bias_V is None else self.bias_V.data_ptr() + column * self.size,
            "inverse_temperature": 0 if self.inverse_N is None else self.inverse_N.data_ptr() + token * self.size,
            "target": target_T.data_ptr(),
            "threads": self.threads,
            **self.head,
        }

    def forward_tile(self, logits_TC: Tensor, token: int, column: int, state: "State", kept_TC: Tensor | None) -> None:
        """Fold the tile into the state of its tokens. `logits_TC` is scratch afterwards; kept_TC receives a copy of it first."""
        target_T = self.targets_N[token : token + len(logits_TC)] - column
        getattr(native, f"forward_tile_{self.suffix}")(
            logits=logits_TC.data_ptr(),
            logits_stride=logits_TC.stride(0),
            rows=logits_TC.shape[0],
            columns=logits_TC.shape[1],
            running_max=state.max_N.data_ptr() + token * self.size,
            running_sum=state.sum_N.data_ptr() + token * 8,
            target_logit=state.target_N.data_ptr() + token * self.size,
            kept=0 if kept_TC is None else kept_TC.data_ptr(),
            kept_stride=0 if kept_TC is None else kept_TC.stride(0),
            **self._tile(token, column, target_T),
        )

    def backward_tile(
        self, source: Tensor, source_rows_T: Tensor | None, out_TC: Tensor, token: int, column: int, lse_N, c_N
    ):
        """The gradient of the product's tile, into out_TC, from the product's tile `source` (whose rows `source_rows_T` names)."""
        target_T = self.targets_N[token : token + len(out_TC)] - column
        getattr(native, f"backward_tile_{self.suffix}")(
            logits=source.data_ptr(),
            row_index=0 if source_rows_T is None else source_rows_T.data_ptr(),
            logits_stride=source.stride(0),
            gradient=out_TC.data_ptr(),
            gradient_stride=out_TC.stride(0),
            rows=out_TC.shape[0],
            columns=out_TC.shape[1],
            lse=lse_N.data_ptr() + token * 8,
            coefficient=c_N.data_ptr() + token * self.size,
            **self._tile(token, column, target_T),
        )


class State:
    """What the forward knows of each token so far: the online log-sum-exp and the target's logit."""

    def __init__(self, N: int, dtype: torch.dtype):
        self.max_N = torch.full((N,), float("-inf"), dtype=dtype)
        self.sum_N = torch.zeros(N, dtype=torch.float64)
        self.target_N = torch.full((N,), float("nan"), dtype=dtype)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(logprob, lse) in fp64; the difference of target and maximum is formed before the log of the sum is taken off."""
        log_sum_N, max_N = self.sum_N.log(), self.max_N.double()
        return (self.target_N.double() - max_N) - log_sum_N, max_N + log_sum_N
