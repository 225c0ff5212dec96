"""What losses of single completions keep or take from the other ranks: the mean reward of BCO, the KL estimate of KTO."""

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import CompletionLogprob, Pair, PairLogprob
from isdaa_kernels.objectives.options import is_finite_number
from isdaa_kernels.objectives.state import BatchState


class RewardMean(BatchState):
    """`baseline`: the mean of beta * log-ratio over all completions seen, this batch's among them.

    The running mean of BCO (Jung et al. 2024, arXiv 2404.04656, where it is called delta). Of pairs it takes both completions. Give it
    the `beta` of the loss. It keeps the mean log-ratio, so that another `beta`, which may be set at any time, holds for the past too.
    Every completion counts the same; TRL 0.24 and LLaMA-Factory average the means of batches, which is the same where all batches are
    equally large. A completion that is empty or whose log-ratio is not finite is left out. In `eval()` nothing is added. Before the
    first completion the baseline is 0.
    """

    gives = frozenset({"baseline"})

    def __init__(self, beta: float, process_group: object | None = None) -> None:
        super().__init__(process_group)
        if not is_finite_number(beta) or beta <= 0:
            raise ValueError(f"RewardMean: beta: expected a finite number above 0, got {beta!r}")
        self.beta = beta
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, batch: PairLogprob | CompletionLogprob) -> dict[str, Tensor]:
        ratio = batch.log_ratio
        ratio = torch.stack(ratio) if isinstance(ratio, Pair) else ratio
        self.to(ratio.device)
        if self.training:
            counts = ratio.isfinite() if batch.present is None else ratio.isfinite() & batch.present
            total, added = self.reduce_sum(torch.stack([torch.where(counts, ratio, 0).sum(), counts.sum().double()]))
            self.count += added
            self.mean += (total - added * self.mean) / self.count.clamp(min=1)
        return {"baseline": self.beta * self.mean}


class MismatchedMean(BatchState):
    """`kl`: max(0, mean of `mismatched` over the completions of this batch on all ranks), KTO's estimate of KL(policy || reference).

    Ethayarajh et al. 2024 (arXiv 2402.01306), where it is called z_0. Without it `kto` takes the mean over its own process. Nothing is
    kept from batch to batch.
    """

    gives = frozenset({"kl"})

    @torch.no_grad()
    def forward(self, batch: CompletionLogprob) -> dict[str, Tensor]:
        counts_S = torch.ones_like(batch.mismatched, dtype=torch.bool) if batch.present is None else batch.present
        total, count = self.reduce_sum(
            torch.stack([torch.where(counts_S, batch.mismatched, 0).sum(), counts_S.sum().double()])
        )
        return {"kl": (total / count.clamp(min=1)).clamp(min=0)}
