"""Each token's numbers as the kernels of `linear_kl` read them: PyTorch operations on a few numbers a token, on the device.

N tokens of the call, T tokens of a slab.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens
from isdaa_kernels.backends.gpu.upstream import LEAST_EXPONENT, SHIFT
from isdaa_kernels.divergence import Divergence

KL_TOKEN_ROWS = 13  # `kl_kernels` says which


def kl_token_rows(
    numbers_4T: Tensor, inverse_T: Tensor, direction: str, coefficient_T: Tensor | float = 1.0, back_T: Tensor | None = None,
    exponent_T: Tensor | float = 0.0,
) -> Tensor:  # fmt: skip
    """[13, T]. The hidden states were multiplied by 2 ** back."""
    lse_T, _, gap_T, mean_T = numbers_4T
    one_T = torch.ones_like(inverse_T)
    rows = torch.empty(KL_TOKEN_ROWS, len(inverse_T), dtype=torch.float32, device=inverse_T.device)
    rows[0] = inverse_T
    rows[1] = one_T if back_T is None else power_of_two(-back_T)
    rows[2], rows[3] = _halves(lse_T)
    rows[4] = coefficient_T
    rows[5], rows[6] = _halves(lse_T - gap_T)
    rows[7] = one_T if back_T is None else power_of_two(back_T)
    rows[8] = 0.0
    rows[9] = exponent_T
    rows[10], rows[11] = _halves(gap_T + mean_T if direction == "reverse" else gap_T)
    rows[12] = mean_T
    return rows


class KlUpstream:
    """Coefficients of the backward, scaled by powers of two as `Kernels.token` scales those of `linear_logprob`, and the targets' entries,
    which the gradients leave behind: each slab's numbers are made once and stay."""

    scales_hidden: bool

    def __init__(
        self, divergence: Divergence, grad_N: Tensor, live: LiveTokens, head: Head, numbers_4N: Tensor, dtype: torch.dtype, T: int
    ):  # fmt: skip
        """dtype: of the gradient chunk."""
        self.direction, self.live, self.head, self.numbers_4N = divergence.direction, live, head, numbers_4N
        self.shift, self.least = SHIFT.get(dtype, 0), LEAST_EXPONENT.get(dtype, -64)
        self.scales_hidden = self.least < 0
        self.coefficient_N = grad_N.float()
        slope = abs(head.transform.logit_scale) * head.transform.inverse_temperature(None, torch.float32)
        largest_N = self.coefficient_N.abs() * slope
        if (
            divergence.direction == "reverse"
        ):  # |p (log(p / q) - its mean)| < KL + 1; an entry of the others is at most 1
            largest_N = largest_N * (1 + numbers_4N[3]).float()
        live_N = live.slot_N < live.capacity
        self.known_N = largest_N.isfinite()
        largest_N = torch.where(live_N & self.known_N, largest_N, 0.0)
        self.exponent_N = torch.where(largest_N > 0, torch.frexp(largest_N).exponent - 1, -150)
        top = self.exponent_N.amax() if len(largest_N) else torch.full((), -150, device=grad_N.device)
        self.top = top.to(torch.int32).reshape(1)
        self.slabs: dict[int, Tensor] = {}
        self.entry_L = torch.zeros(len(live.slabs(T)) * T, dtype=torch.float32, device=grad_N.device)

    def tokens(self, first: int, T: int, rows_T: Tensor) -> Tensor:
        if first not in self.slabs:
            exponent_T = torch.where(
                self.known_N.index_select(0, rows_T), self.exponent_N.index_select(0, rows_T), self.top
            )
            back_T = (exponent_T - self.top).clamp(min=self.least)
            scale_T = power_of_two(self.shift - self.top - back_T)
            self.slabs[first] = kl_token_rows(
                self.numbers_4N.index_select(1, rows_T), self.head.inverse_temperature(rows_T), self.direction,
                self.coefficient_N.index_select(0, rows_T).double() * scale_T, back_T, self.top + back_T - self.shift,
            )  # fmt: skip
        return self.slabs[first]

    def weight_entries(self) -> Tensor:
        """fp32 [>= capacity], in the units of the sums of d_weight: 0 until the gradient's chunk is made in which the target lies."""
        return self.entry_L


def power_of_two(exponent: Tensor) -> Tensor:
    """fp64 2 ** exponent for whole numbers from -1022 to 1023, exact."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _halves(x_T: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 numbers in two fp32 parts; infinite ones have no second."""
    high_T = x_T.float()
    low_T = x_T - high_T.double()
    return high_T, torch.where(low_T == low_T, low_T, 0.0).float()
