"""Routed backward as its definition says it, over all logits in chunks of tokens: what saves no work, but what others are held against.

N tokens, D hidden size, V vocabulary, B blocks, C tokens of a chunk. The columns stand in the order of the blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from isdaa_kernels.dispatch import Problem
from isdaa_kernels.routing import Routed, choose_routes, faint_tokens
from isdaa_kernels.stats import TokenGradient


def block_logsumexp(z_CV: Tensor, block: int) -> Tensor:
    """[C, B]"""
    C, V = z_CV.shape
    padded_CV = F.pad(z_CV, (0, -V % block), value=float("-inf"))
    return padded_CV.view(C, -1, block).logsumexp(-1)


class RoutedGradient:
    """The gradient of the final logits of any chunk, after one pass over all chunks for the blocks' mean distributions."""

    def __init__(
        self, problem: Problem, grad: TokenGradient, targets_N: Tensor, active_N: Tensor, logprob_N, lse_N, block_lse_NB
    ):
        """targets_N: places in the order of the blocks. active_N: tokens that carry a gradient."""
        self.routed: Routed = problem.routed
        self.V, dtype = problem.V, problem.compute_dtype
        self.targets_N, self.lse_N = targets_N, lse_N
        g_N = grad.logprob_N.to(dtype)
        prob_N = torch.zeros_like(g_N) if grad.prob_N is None else grad.prob_N.to(dtype)
        finite_N = g_N.isfinite() & prob_N.isfinite() & lse_N.isfinite()
        use_N = active_N & finite_N
        size_N = torch.where(use_N, torch.maximum(g_N.abs(), prob_N.abs()), 0)
        counted_N = ~faint_tokens(size_N)
        use_N, g_N, prob_N = use_N & counted_N, g_N.where(counted_N, 0), prob_N.where(counted_N, 0)
        coefficient_N = torch.where(use_N, prob_N - g_N, 0)
        routes = choose_routes(
            torch.where(use_N[:, None], block_lse_NB, 0), torch.where(use_N, lse_N, 0), coefficient_N,
            targets_N.clamp(0, self.V - 1) // self.routed.block, self.routed,
        )  # fmt: skip
        self.mass_NB = torch.where(use_N[:, None], routes.mass_BN.T, 0)
        self.hidden_NB, self.weight_NB = (
            mask_BN.T & use_N[:, None] for mask_BN in (routes.hidden_BN, routes.weight_BN)
        )
        self.block_lse_NB = block_lse_NB
        self.coefficient_N = torch.where(finite_N, prob_N - g_N, float("nan"))  # a non-finite number stays in its row
        self.entry_N = -g_N * logprob_N.to(dtype).expm1() + prob_N * logprob_N.to(dtype).exp()
        self.sum_V = torch.zeros(self.V, dtype=dtype, device=targets_N.device)
        self.mean_V: Tensor | None = None

    def collect(self, z_CV: Tensor, rows_C: Tensor) -> None:
        """Add the distributions within their block of the routed (token, block) pairs of a chunk."""
        counted_CB = self.weight_NB[rows_C] & (self.block_lse_NB[rows_C] > float("-inf"))
        within_CV = (z_CV - self._spread(self.block_lse_NB[rows_C])).exp()
        self.sum_V += torch.where(self._spread(counted_CB), within_CV, 0).sum(0)

    def finish_means(self) -> None:
        block = self.routed.block
        padded_Bb = F.pad(self.sum_V, (0, -self.V % block)).view(-1, block)
        total_B1 = padded_Bb.sum(1, keepdim=True)
        sizes_B1 = F.pad(torch.ones_like(self.sum_V), (0, -self.V % block)).view(-1, block).sum(1, keepdim=True)
        self.mean_V = torch.where(total_B1 > 0, padded_Bb / total_B1, 1 / sizes_B1).flatten()[: self.V]

    def logit_gradients(self, z_CV: Tensor, rows_C: Tensor) -> tuple[Tensor, Tensor]:
        """That which d_hidden is made from, and that which d_weight and d_bias are made from."""
        p_CV, mean_CV = self._p(z_CV, rows_C), self._spread(self.mass_NB[rows_C]) * self.mean_V
        target_C1 = self.targets_N[rows_C, None].clamp(0, self.V - 1)
        for_hidden, for_weight = (
            (torch.where(self._spread(routed_NB[rows_C]), p_CV, mean_CV) * self.coefficient_N[rows_C, None]).scatter_(
                1, target_C1, self.entry_N[rows_C, None]
            )
            for routed_NB in (self.hidden_NB, self.weight_NB)
        )
        return for_hidden, for_weight

    def _p(self, z_CV: Tensor, rows_C: Tensor) -> Tensor:
        return (z_CV.double() - self.lse_N[rows_C, None]).exp().to(z_CV.dtype)

    def _spread(self, values_CB: Tensor) -> Tensor:
        return values_CB.repeat_interleave(self.routed.block, dim=1)[:, : self.V]
