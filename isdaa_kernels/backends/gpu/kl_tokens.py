"""Each token's numbers as the kernels of `linear_kl` read them: PyTorch operations on a few numbers a token, on the device.

A 16-bit gradient chunk is fp16: the entries of each token times a power of two, 2 ** of_entries, so that its largest may come near
2 ** 14. In d_weight's product a hidden state is fp16 too, times 2 ** of_hidden, and the sum of both exponents is the same for all tokens:
what a token is fainter than the call's largest is taken from its hidden states first, as far as the digits of bf16 are safe, then from
its entries, as far as a flat softmax over 128 k rows is, then from its hidden states, so that its d_hidden never suffers. bf16 weights
are multiplied as fp16 times one power of two, so that those below 2 ** -29 of the weight's largest number lose digits in d_hidden, and
those below 2 ** -39 vanish from it. fp32 chunks are in units of a token's largest coefficient, and its hidden states bear the
rest.

N tokens of the call, T tokens of a slab, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import Kernels
from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens
from isdaa_kernels.divergence import Divergence, KlGradient

# Rows of tokens fp32 [17, T]: inverse temperature; 2 ** -exponent of the hidden states in the logits' product; log-sum-exp of the policy
# in two parts; coefficient of the divergence; log-sum-exp of the reference in two parts; 2 ** exponent of an entry in the sums for the
# bias; 0; exponent of d_hidden; difference of the log-sum-exps, of reverse plus the mean of log(p / q), in two parts; mean of log(p / m) in
# two parts; coefficient of the log-prob, and times 1 - p of the target; 2 ** exponent of the hidden states in d_weight's product.
KL_TOKEN_ROWS = 17
# Exponents of the largest numbers in a chunk (rounding may double them), and in its factors.
_ENTRY_TOP, _FACTOR_TOP = 13, 15
_HIDDEN_ROOM, _ENTRY_ROOM = 24, 10  # bits below them that hidden states and entries can spare
_LEAST_BOUND = 2.0**-12  # of an entry: below it the rounding of the logits may outweigh the divergence
_LEAST_EXPONENT = -64  # of hidden states beside an fp32 chunk


class KlUpstream:
    """Coefficients of the backward and powers of two: each slab's numbers are made once and stay."""

    def __init__(
        self, divergence: Divergence, grad: KlGradient, live: LiveTokens, head: Head, numbers_4N: Tensor, logprob_2N: Tensor,
        hidden_ND: Tensor, narrow: bool, weight_exponent: Tensor,
    ):  # fmt: skip
        """narrow: the chunk is fp16. weight_exponent int64 []: of the power of two that the weight is multiplied by."""
        self.direction, self.head, self.numbers_4N = divergence.direction, head, numbers_4N
        self.scales_hidden = not narrow
        self.grad = grad.map(lambda term_N: term_N.float())
        rest_N = None if grad.logprob_N is None else -logprob_2N[0].double().expm1()
        self.at_target_N = None if rest_N is None else rest_N * self.grad.logprob_N
        largest_N = self._bound(divergence, rest_N)
        known_N = largest_N.isfinite()
        entry_N = _exponents(torch.where((live.slot_N < live.capacity) & known_N, largest_N, 0.0))
        top = entry_N.amax() if len(entry_N) else torch.full((), -150, dtype=torch.int64, device=entry_N.device)
        entry_N = torch.where(known_N, entry_N, top)
        if narrow:
            self._narrow(
                entry_N, known_N & (largest_N > 0) & (live.slot_N < live.capacity), hidden_ND, weight_exponent, top
            )
        else:
            back_N = (entry_N - top).clamp(min=_LEAST_EXPONENT)
            self.of_entries_N, self.of_hidden_N, self.of_bias_N = -top - back_N, back_N, back_N
            self.weight_units = self.bias_units = _int32(top), 0
            self.exponent_N = top + back_N
        self.slabs: dict[int, Tensor] = {}

    def _bound(self, divergence: Divergence, rest_N: Tensor | None) -> Tensor:
        """fp32 [N]: no entry of a token's gradient of the product is larger. Of a log-prob |onehot - p| <= 1 - p of the target."""
        bound_N = bound_of_entries(divergence, self.numbers_4N[3].float())
        of_divergence_N, of_logprob_N = self.grad
        size_N = torch.where(of_divergence_N == 0, 0.0, of_divergence_N.abs() * bound_N.clamp(min=_LEAST_BOUND))
        if rest_N is not None:
            size_N = size_N + torch.where(
                of_logprob_N == 0, 0.0, of_logprob_N.abs() * rest_N.float().clamp(min=_LEAST_BOUND)
            )
        transform = self.head.transform
        return size_N * (abs(transform.logit_scale) * transform.inverse_temperature(None, torch.float32))

    def _narrow(
        self, entry_N: Tensor, counts_N: Tensor, hidden_ND: Tensor, weight_exponent: Tensor, top: Tensor
    ) -> None:
        largest_N = largest_of_rows(hidden_ND)
        hidden_N, there_N = _exponents(largest_N).clamp(min=-100), largest_N.isfinite() & (largest_N > 0)
        reach_N = torch.where(counts_N & there_N, entry_N + hidden_N, -1000)
        reach = reach_N.amax() if len(reach_N) else torch.zeros_like(top)
        reach = torch.where(reach > -1000, reach, 0)
        faint_N = torch.where(there_N, reach - entry_N - hidden_N, 0).clamp(min=0)
        given_N = (faint_N - _HIDDEN_ROOM).clamp(0, _ENTRY_ROOM)
        self.of_entries_N = _ENTRY_TOP - entry_N - given_N
        of_hidden_N = torch.minimum(_FACTOR_TOP + _ENTRY_TOP - reach - self.of_entries_N, _FACTOR_TOP - hidden_N)
        self.of_hidden_N = torch.where(there_N, of_hidden_N, 0)
        self.of_bias_N = entry_N - top + given_N
        self.weight_units, self.bias_units = (_int32(reach), _FACTOR_TOP + _ENTRY_TOP), (_int32(top), _ENTRY_TOP)
        self.exponent_N = -self.of_entries_N - weight_exponent

    def tokens(self, first: int, T: int, rows_T: Tensor) -> Tensor:
        if first not in self.slabs:
            of = lambda x_N: x_N.index_select(0, rows_T)  # noqa: E731
            scale_T = power_of_two(of(self.of_entries_N))
            rows = kl_token_rows(
                self.numbers_4N.index_select(1, rows_T), self.head.inverse_temperature(rows_T), self.direction
            )
            if self.scales_hidden:
                rows[1] = power_of_two(-of(self.of_hidden_N))
            rows[4] = of(self.grad.divergence_N) * scale_T
            rows[7] = power_of_two(of(self.of_bias_N))
            rows[9] = of(self.exponent_N)
            if self.at_target_N is not None:
                rows[14], rows[15] = of(self.grad.logprob_N) * scale_T, of(self.at_target_N) * scale_T
            rows[16] = power_of_two(of(self.of_hidden_N))
            self.slabs[first] = rows
        return self.slabs[first]


def bound_of_entries(divergence: Divergence, mean_N: Tensor) -> Tensor:
    """[N]: what no entry of the divergence's gradient of z exceeds. mean_N: KL of the two models, of jsd KL(p || m).

    Terms of a divergence K = KL(p || q) are p excess(-r) >= 0 with r = log(p / q), so that none is above K, and as
    excess(-r) >= r ** 2 / (2 + max(r, 0)), |p r| <= (K + sqrt(K ** 2 + 8 K)) / 2. Pinsker: |p - q| <= sqrt(K / 2)."""
    if divergence.direction == "forward":
        return (mean_N / 2).sqrt().clamp(max=1.0)
    bound_N = torch.minimum(mean_N + 1, mean_N + (mean_N + (mean_N * mean_N + 8 * mean_N).sqrt()) / 2)
    return bound_N * (1 - divergence.jsd_weight) if divergence.direction == "jsd" else bound_N


def kl_token_rows(numbers_4T: Tensor, inverse_T: Tensor, direction: str) -> Tensor:
    """[17, T] of tokens whose entries, of coefficient 1, and hidden states are not scaled."""
    lse_T, other_T, gap_T, mean_T = numbers_4T
    rows = torch.zeros(KL_TOKEN_ROWS, len(inverse_T), dtype=torch.float32, device=inverse_T.device)
    rows[0] = inverse_T
    for row in (1, 4, 7, 16):
        rows[row] = 1.0
    rows[2], rows[3] = _halves(lse_T)
    rows[5], rows[6] = _halves(other_T)
    rows[10], rows[11] = _halves(gap_T + mean_T if direction == "reverse" else gap_T)
    rows[12], rows[13] = _halves(mean_T)
    return rows


def weight_exponent(weight_VD: Tensor) -> Tensor:
    """int64 []: the weight times 2 ** it is as large as fp16 holds; 0 where there is no largest number."""
    largest = largest_of_rows(weight_VD.reshape(1, -1) if weight_VD.is_contiguous() else weight_VD).amax()
    exponent = _FACTOR_TOP - _exponents(largest).clamp(min=-100)
    return torch.where(largest.isfinite() & (largest > 0), exponent, 0)


class NarrowRows:
    """bf16 vocabulary rows as fp16, times a power of two, in one buffer."""

    def __init__(self, kernels: Kernels, weight_VD: Tensor, C: int, exponent: Tensor):
        V, D = weight_VD.shape
        self.kernels, self.weight_VD, device = kernels, weight_VD, weight_VD.device
        self.rows_V, self.count = torch.arange(V, device=device), torch.full((1,), V, dtype=torch.int32, device=device)
        self.scale_C = power_of_two(exponent).float().expand(C).contiguous()
        self.buffer_CD = torch.empty(C, -(-D // 8) * 8, dtype=torch.float16, device=device)[:, :D]

    def load(self, begin: int, end: int) -> Tensor:
        """[end - begin, D]. The next call overwrites it."""
        out_CD = self.buffer_CD[: end - begin]
        self.kernels.gather(
            hidden=self.weight_VD, rows=self.rows_V, count=self.count, scale=self.scale_C, out=out_CD, first=begin
        )
        return out_CD


def largest_of_rows(x_ND: Tensor) -> Tensor:
    """fp32 [N]: the largest magnitude of each row, NaN where there is one."""
    return torch.linalg.vector_norm(x_ND, float("inf"), dim=1).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """fp64 2 ** exponent for whole numbers from -1022 to 1023, exact."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exponents(x: Tensor) -> Tensor:
    """int64: floor(log2(x)) of positive finite numbers; -150 of 0."""
    return torch.where(x > 0, torch.frexp(x).exponent - 1, -150).to(torch.int64)


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).reshape(1)


def _halves(x_T: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 numbers in two fp32 parts; infinite ones have no second."""
    high_T = x_T.float()
    low_T = x_T - high_T.double()
    return high_T, torch.where(low_T == low_T, low_T, 0.0).float()
