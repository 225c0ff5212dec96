"""Partial log-sum-exps and statistics of a slab, one slot a tile of vocabulary, and their sum.

T tokens of a slab, B slots, N tokens of the call, S statistics asked for.
"""

import torch
import triton
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.routes import block_mass_kernel
from isdaa_kernels.backends.triton.kernels.tokens import combine_kernel
from isdaa_kernels.backends.triton.routed_tiles import MASS_TOKENS
from isdaa_kernels.backends.triton.slabs import OPTIONS, LiveTokens
from isdaa_kernels.stats import StatsRequest

_COMBINE_TOKENS, _COMBINE_SLOTS = 8, 64  # of a program at once


class Partials:
    """Buffers that the fold writes; None where a statistic was not asked for."""

    def __init__(self, T: int, slots: int, stats: StatsRequest, device: torch.device):
        def buffer(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(slots, T, dtype=dtype, device=device) if wanted else None

        self.stats, self.T, self.slots = stats, T, slots
        self.entropy, self.total, self.squares = (
            name in stats.names for name in ("entropy", "mean_logit", "log_sum_sq_prob")
        )
        self.tensors = {
            "partial_max": buffer(True),
            "partial_sum": buffer(True, torch.float64),
            "partial_entropy": buffer(self.entropy),
            "partial_total": buffer(self.total),
            "partial_squares": buffer(self.squares),
            "target_logit": torch.empty(T, dtype=torch.float32, device=device),
        }

    def arguments(self, slot: int = 0) -> dict:
        """Those of a fold whose first tile is `slot`."""
        tensors = {
            name: tensor[slot:] if tensor is not None and tensor.dim() == 2 else tensor
            for name, tensor in self.tensors.items()
        }
        return {**tensors, "ENTROPY": self.entropy, "TOTAL": self.total, "SQUARES": self.squares}

    def combine(
        self, targets_T: Tensor, live: LiveTokens, first: int, V: int, logprob_N: Tensor, lse_N: Tensor, stats_SN
    ):
        rows = {name: stats_SN[s] for s, name in enumerate(self.stats.names)}
        combine_kernel[(triton.cdiv(self.T, _COMBINE_TOKENS),)](
            targets=targets_T, rows=live.rows_M, count=live.count, logprob=logprob_N, lse=lse_N, entropy=rows.get("entropy"),
            lse_stat=rows.get("lse"), mean_logit=rows.get("mean_logit"), log_sum_sq=rows.get("log_sum_sq_prob"),
            is_top1=rows.get("is_top1"), first=first, T=self.T, V=V, B=self.slots, LSE="lse" in rows, TOP1="is_top1" in rows,
            M=_COMBINE_TOKENS, SLOTS=_COMBINE_SLOTS, **self.arguments(), **OPTIONS,
        )  # fmt: skip

    def write_masses(self, live: LiveTokens, first: int, lse_N: Tensor, slots: int, log_mass_BN: Tensor) -> None:
        """log_mass_BN of the slab's tokens, from `slots` partial results a block; after `combine`."""
        B, N = log_mass_BN.shape
        block_mass_kernel[(triton.cdiv(self.T, MASS_TOKENS), B)](
            self.tensors["partial_max"], self.tensors["partial_sum"], live.rows_M, live.count, lse_N, log_mass_BN, first, self.T,
            self.slots, N, SLOTS=slots, M=MASS_TOKENS, **OPTIONS,
        )  # fmt: skip


def outputs(scored_N: Tensor, stats: StatsRequest) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], stats [S, N], lse [N]: 0 where nothing is scored, NaN until a scored token has its number, and for ever where more
    are scored than `max_scored` promised."""
    N = len(scored_N)
    start_N = torch.where(scored_N, float("nan"), 0.0).to(torch.float32)
    stats_SN = start_N.expand(len(stats.names), N).contiguous()
    return start_N.clone(), stats_SN, start_N.double()
