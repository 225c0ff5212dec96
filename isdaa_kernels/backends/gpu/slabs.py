"""What forward and backward share on the host: the live tokens found on the device, and one slab of them at a time in fixed buffers.

N tokens of the call, M that may be live (max_scored), T tokens of a slab, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import Kernels
from isdaa_kernels.lm_head import Transform


class LiveTokens:
    """Indices of the tokens of `mask_N` in their order, the first `capacity` of them, and their number, all on the device: no sync."""

    def __init__(self, mask_N: Tensor, capacity: int):
        position_N = mask_N.cumsum(0) - 1
        self.slot_N = torch.where(mask_N & (position_N < capacity), position_N, capacity)
        token_N = torch.arange(len(mask_N), device=mask_N.device)
        rows = torch.zeros(capacity + 1, dtype=torch.int64, device=mask_N.device)
        self.rows_M = rows.scatter_(0, self.slot_N, token_N)[:capacity]
        self.count = mask_N.sum().clamp(max=capacity).to(torch.int32).reshape(1)
        self.capacity = capacity

    def slabs(self, T: int) -> list[int]:
        return list(range(0, self.capacity, T))

    def spread(self, values_M: Tensor, others_N: Tensor) -> Tensor:
        """[N]: each live token's value, and what `others_N` says of the rest."""
        if self.capacity == 0:
            return others_N
        found_N = values_M.index_select(0, self.slot_N.clamp(max=self.capacity - 1))
        return torch.where(self.slot_N < self.capacity, found_N, others_N)


def clean_targets(targets_N: Tensor, V: int) -> Tensor:
    """int32 [N], -1 for whatever is no vocabulary row."""
    return torch.where((targets_N >= 0) & (targets_N < V), targets_N, -1).to(torch.int32)


class HiddenSlab:
    """Rows of hidden gathered into one aligned buffer, zeros past the last live token."""

    def __init__(self, kernels: Kernels, hidden_ND: Tensor, live: LiveTokens, T: int, dtype: torch.dtype):
        self.kernels, self.hidden_ND, self.live = kernels, hidden_ND, live
        D = hidden_ND.shape[1]
        aligned = -(-D // 8) * 8
        self.buffer_TD = torch.empty(T, aligned, dtype=dtype, device=hidden_ND.device)[:, :D]

    def load(self, first: int, scale_T: Tensor | None = None) -> Tensor:
        self.kernels.gather(
            hidden=self.hidden_ND, rows=self.live.rows_M, count=self.live.count, scale=scale_T, out=self.buffer_TD, first=first
        )  # fmt: skip
        return self.buffer_TD


class Head:
    """The head's transform as kernel arguments, and its per-token parts for a slab."""

    def __init__(self, transform: Transform):
        bias_V = transform.bias_V
        if bias_V is not None and bias_V.dtype == torch.float64:  # which no kernel reads
            bias_V = bias_V.float()
        self.bias_V = None if bias_V is None else bias_V.contiguous()
        self.transform = transform
        softcap = None if transform.softcap is None else float(transform.softcap)
        self.scalars = {"logit_scale": float(transform.logit_scale), "softcap": softcap}
        self.rich = self.bias_V is not None or softcap is not None

    def inverse_temperature(self, rows_T: Tensor) -> Tensor:
        inverse = self.transform.inverse_temperature(rows_T, torch.float32)
        if isinstance(inverse, float):
            return torch.full((len(rows_T),), inverse, dtype=torch.float32, device=rows_T.device)
        return inverse


def padded_rows(live: LiveTokens, first: int, T: int) -> Tensor:
    """Token indices [T] of a slab; past the end of the call some valid index stands."""
    rows_T = live.rows_M[first : first + T]
    return rows_T if len(rows_T) == T else torch.nn.functional.pad(rows_T, (0, T - len(rows_T)))
