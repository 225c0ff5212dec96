"""Coefficients of the backward on the device, scaled by powers of two: 16-bit gradients neither underflow nor lose their digits.

N tokens of the call, T tokens of a slab.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import Kernels
from isdaa_kernels.backends.gpu.plan import TOKEN_ROWS
from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens
from isdaa_kernels.stats import TokenGradient

# fp16 holds 2 ** -24 to 2 ** 16: gradients of up to 5 are shifted up, hidden states are left alone.
SHIFT = {torch.float16: 12}
LEAST_EXPONENT = {torch.float16: 0}


Units = tuple[Tensor, int]  # (top int32 [1], shift): of sums in units of 2 ** (top - shift)


class Upstream:
    """The exponent of the call's largest coefficient, and each slab's rows of coefficients (`Kernels.token`)."""

    def __init__(
        self, kernels: Kernels, grad: TokenGradient, live: LiveTokens, head: Head, logprob_N, lse_N, dtype: torch.dtype | None
    ):  # fmt: skip
        """dtype: of the gradient chunk; None leaves all coefficients as they are."""
        terms = (grad.logprob_N, grad.prob_N, grad.log_prob_N, grad.flat_N)
        self.terms = [None if term is None else term.float().contiguous() for term in terms]
        self.kernels, self.live, self.head, self.logprob_N, self.lse_N = kernels, live, head, logprob_N, lse_N
        self.scaled = dtype is not None
        self.shift, self.least = SHIFT.get(dtype, 0), LEAST_EXPONENT.get(dtype, -64)
        self.scales_hidden = self.least < 0
        self.top = _top_exponent(self.terms, live, head)
        self.weight_units = self.bias_units = self.top, self.shift

    def flags(self) -> dict[str, bool]:
        return {"log_prob": self.terms[2] is not None, "flat": self.terms[3] is not None}

    def tokens(self, first: int, T: int, rows_T: Tensor) -> Tensor:
        out = torch.empty(TOKEN_ROWS, T, dtype=torch.float32, device=rows_T.device)
        self._launch(first, rows_T, out, None)
        return out

    def weight_entries(self) -> Tensor:
        """fp32 [capacity]: of each live token the target's own entry, in the units of the sums of d_weight."""
        out = torch.empty(self.live.capacity, dtype=torch.float32, device=self.live.rows_M.device)
        if len(out):
            self._launch(0, self.live.rows_M, None, out)
        return out

    def _launch(self, first: int, rows_T: Tensor, out: Tensor | None, entry: Tensor | None) -> None:
        logprob, prob, log_prob, flat = self.terms
        self.kernels.token(
            rows=self.live.rows_M, count=self.live.count, top=self.top, logprob_gradient=logprob, prob_gradient=prob,
            log_prob_gradient=log_prob, flat_gradient=flat, logprob=self.logprob_N, lse=self.lse_N,
            inverse_temperature=self.head.inverse_temperature(rows_T), out=out, weight_entry=entry, first=first, least=self.least,
            shift=self.shift, scaled=self.scaled, **self.head.scalars,
        )  # fmt: skip


def _top_exponent(terms: list[Tensor | None], live: LiveTokens, head: Head) -> Tensor:
    """int32 [1]: floor(log2) of the largest finite coefficient of a live token times the slope of its z, -150 where there is none."""
    live_N = live.slot_N < live.capacity
    slope = abs(head.transform.logit_scale) * head.transform.inverse_temperature(None, torch.float32)
    largest = torch.zeros((), dtype=torch.float32, device=live_N.device)
    for term in terms:
        if term is not None and len(term):
            size_N = term.abs() * slope
            largest = torch.maximum(largest, torch.where(live_N & size_N.isfinite(), size_N, 0.0).amax())
    return torch.where(largest > 0, torch.frexp(largest).exponent - 1, -150).to(torch.int32).reshape(1)
