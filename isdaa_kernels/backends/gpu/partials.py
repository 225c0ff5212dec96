"""Partial log-sum-exps and statistics of a slab, one slot a tile of vocabulary, and their sum.

T tokens of a slab, B slots, N tokens of the call, S statistics asked for.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import Kernels
from isdaa_kernels.backends.gpu.slabs import LiveTokens
from isdaa_kernels.stats import StatsRequest


class Partials:
    """Buffers that the fold writes; None where a statistic was not asked for."""

    def __init__(self, kernels: Kernels, T: int, slots: int, stats: StatsRequest, device: torch.device):
        def buffer(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.empty(slots, T, dtype=dtype, device=device) if wanted else None

        self.kernels, self.stats = kernels, stats
        self.tensors = {
            "partial_max": buffer(True),
            "partial_sum": buffer(True, torch.float64),
            "partial_entropy": buffer("entropy" in stats.names),
            "partial_total": buffer("mean_logit" in stats.names),
            "partial_squares": buffer("log_sum_sq_prob" in stats.names),
            "target_logit": torch.empty(T, dtype=torch.float32, device=device),
        }

    def arguments(self, slot: int) -> dict[str, Tensor | None]:
        """Those of a launch whose first slot is `slot`."""
        return {
            name: tensor[slot:] if tensor is not None and tensor.dim() == 2 else tensor
            for name, tensor in self.tensors.items()
        }

    def combine(
        self, targets_T: Tensor, live: LiveTokens, first: int, V: int, logprob_N: Tensor, lse_N: Tensor, stats_SN
    ):
        rows = {name: stats_SN[s] for s, name in enumerate(self.stats.names)}
        self.kernels.combine(
            **self.tensors, targets=targets_T, rows=live.rows_M, count=live.count, logprob=logprob_N, lse=lse_N,
            entropy=rows.get("entropy"), lse_stat=rows.get("lse"), mean_logit=rows.get("mean_logit"),
            log_sum_sq=rows.get("log_sum_sq_prob"), is_top1=rows.get("is_top1"), first=first, V=V,
        )  # fmt: skip

    def write_masses(self, live: LiveTokens, first: int, lse_N: Tensor, slots: int, log_mass_BN: Tensor) -> None:
        """log_mass_BN of the slab's tokens, from `slots` partial results a block; after `combine`."""
        self.kernels.block_mass(
            partial_max=self.tensors["partial_max"], partial_sum=self.tensors["partial_sum"], rows=live.rows_M, count=live.count,
            lse=lse_N, log_mass=log_mass_BN, first=first, slots=slots,
        )  # fmt: skip


def outputs(scored_N: Tensor, stats: StatsRequest) -> tuple[Tensor, Tensor, Tensor]:
    """logprob [N], stats [S, N], lse [N]: 0 where nothing is scored, NaN until a scored token has its number, and for ever where more
    are scored than `max_scored` promised."""
    N = len(scored_N)
    start_N = torch.where(scored_N, float("nan"), 0.0).to(torch.float32)
    stats_SN = start_N.expand(len(stats.names), N).contiguous()
    return start_N.clone(), stats_SN, start_N.double()
