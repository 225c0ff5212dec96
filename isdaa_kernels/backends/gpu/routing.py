"""The routing plan, made and kept on the device: which blocks of vocabulary each live token is routed to, and the blocks' lists.

N tokens of the call, L live ones at most, T tokens of a slab, B blocks, V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import Kernels, RoutedSizes
from isdaa_kernels.backends.gpu.slabs import LiveTokens
from isdaa_kernels.routing import BISECTIONS, Routed, faint_tokens, mean_size
from isdaa_kernels.stats import TokenGradient
from isdaa_kernels.workspace import ceil_div


class Routing:
    """`route` uint8 [B, L], as `Kernels.route` writes it, of the live tokens in their order.

    faint_L: tokens whose coefficients count as 0 beside the largest.
    lost_L: tokens with a coefficient or a log-sum-exp that is not finite: routed nowhere, seen by no other token's rule.
    poison: fp32 [1], NaN where there is such a token.
    """

    def __init__(
        self,
        kernels: Kernels,
        routed: Routed,
        grad: TokenGradient,
        live: LiveTokens,
        placed_N: Tensor,
        lse_N: Tensor,
        log_mass_BN: Tensor,
    ):
        self.kernels, self.log_mass_BN, self.live = kernels, log_mass_BN, live
        rows_L, device = live.rows_M, placed_N.device
        g_L, *others = (term_N.index_select(0, rows_L).float() for term_N in grad.terms())
        coefficient_L = sum(others, -g_L)
        finite_L = g_L.isfinite() & coefficient_L.isfinite() & lse_N.index_select(0, rows_L).isfinite()
        live_L = torch.arange(live.capacity, device=device) < live.count
        self.lost_L = live_L & ~finite_L
        largest_L = torch.stack([term.abs() for term in (g_L, *others)]).amax(0)
        self.faint_L = faint_tokens(torch.where(live_L & finite_L, largest_L, 0.0))
        self.poison = torch.where(self.lost_L.any(), float("nan"), 0.0).to(torch.float32).reshape(1)
        use_L = live_L & finite_L & ~self.faint_L
        self.size_L, rules = _rules(routed, torch.where(use_L, coefficient_L.abs(), 0.0))
        target_block_L = torch.where(use_L, placed_N.index_select(0, rows_L) // routed.block, -1).to(torch.int32)
        self.route_BL = torch.empty(len(log_mass_BN), live.capacity, dtype=torch.uint8, device=device)
        kernels.route(
            log_mass=log_mass_BN, rows=rows_L, count=live.count, size=self.size_L, target_block=target_block_L, rules=rules,
            route=self.route_BL, bisections=BISECTIONS, by_row=routed.row_share > 0,
        )  # fmt: skip


def _rules(routed: Routed, size_L: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes of the coefficients times a power of two that keeps products with masses normal numbers, and the rules in that unit."""
    size_L = size_L.double()
    power = torch.exp2(-torch.frexp(size_L.amax()).exponent.double())
    size_L = (size_L * power).float()
    scale = mean_size(size_L).double() if routed.scale is None else routed.scale * power
    return size_L, torch.stack([scale * routed.tolerance, torch.full_like(power, routed.row_share)])


class RouteLists:
    """The lists of one chunk's blocks for one slab of tokens, in buffers of the walk."""

    def __init__(self, routing: Routing, sizes: RoutedSizes, T: int, blocks: int):
        self.routing, self.sizes = routing, sizes
        device = routing.route_BL.device
        self.lists = torch.empty(blocks, T, dtype=torch.int32, device=device)
        self.places = torch.empty(blocks, T, dtype=torch.int32, device=device)
        self.starts = torch.empty(blocks, ceil_div(T, sizes.step) + 1, dtype=torch.int32, device=device)
        self.all_counts = torch.empty(blocks, dtype=torch.int32, device=device)

    def make(self, begin: int, blocks: int, first: int) -> None:
        """Of the blocks [begin, begin + blocks) and the tokens from `first` on."""
        self.blocks, self.counts = blocks, self.all_counts[:blocks]
        self.routing.kernels.list_tokens(
            route=self.routing.route_BL, lists=self.lists, places=self.places, starts=self.starts, counts=self.counts, begin=begin,
            first=first, step=self.sizes.step,
        )  # fmt: skip
        M = self.sizes.gradient_rows
        self.ends = ((self.counts + (M - 1)) // M).cumsum(0, dtype=torch.int32)
