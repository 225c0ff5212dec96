"""The routed backward's rules: which blocks of vocabulary each token's gradient is computed in, and what stands for the rest.

N tokens, V vocabulary, B blocks of it, p the probabilities of a token, mass[n, b] the probability of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = (32, 64, 128, 256)
BISECTIONS = 20
# A token whose coefficients are this many powers of two below the largest of the call counts as one without a gradient.
FAINT = {torch.float32: 48, torch.float64: 300}


@dataclass(frozen=True)
class Routed:
    """A gradient that is computed where the probability is. For `gradient=` of `linear_logprob` and what is built on it.

    With a the coefficient of p in the gradient of the final logits (minus the upstream gradient of the log-prob, plus that of lse), the
    exact gradient of token n is a[n] p[n, j], plus the upstream gradient in the target's column. The forward keeps the log-sum-exp of
    every block of `block` vocabulary rows (4 bytes a token and block), so mass[n, b] is known before the backward does any work. Token n
    is routed to block b, and its gradient there is exact,

        where |a[n]| mass[n, b] > tolerance * scale,  scale = mean |a| over the tokens with a finite coefficient other than 0
        where b holds the target
        where n is among the tokens that carry the first `row_share` of the block's sum over n of |a[n]| mass[n, b]; the gradients of
        weight and bias alone need these, so that of hidden leaves them out

    Elsewhere p[n, j] is replaced by mass[n, b] q[b, j], q[b] being the mean over the tokens that are routed to the block of their
    distribution within it, p[n, j] / mass[n, b] (uniform where none is routed). The sum over j stays what it was, so every row of the
    gradient of the logits still sums to what the exact one does.

    What it costs: |p - mass q| summed over a block is at most 2 mass, so the L1 error of token n is at most 2 |a[n]| times its mass that
    is not routed, and at most 2 tolerance * scale in every block: no single (token, block) that is left out is larger than that share
    of an average token's whole gradient. Tolerance 0 is exact. Where the probability is so flat that most pairs are routed, a backend may
    make the exact gradient instead, if that takes less time.

    tolerance: 0 or more. scale: a number in place of the mean, so that micro-batches of one step are routed alike. block: 32, 64, 128 or
    256. row_share: 0 to 1; keeps the direction of rarely used vocabulary rows honest, which Adam normalises row by row.
    A token whose coefficient is 2^48 (fp64: 2^300) times smaller than the largest counts as one without a gradient. A coefficient N times
    the others' size doubles the mean, and with it what is left out of everyone's gradient: pass `scale` where that can be.
    Raises ValueError for values outside these ranges.
    """

    tolerance: float = 5e-4
    scale: float | None = None
    block: int = 128
    row_share: float = 0.87

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance: expected a finite number from 0 on, got {self.tolerance}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale: expected a positive finite number or None, got {self.scale}")
        if self.block not in BLOCKS:
            raise ValueError(f"block: expected one of {', '.join(map(str, BLOCKS))}, got {self.block}")
        if not 0 <= self.row_share <= 1:
            raise ValueError(f"row_share: expected a number from 0 to 1, got {self.row_share}")

    def blocks(self, V: int) -> int:
        return -(-V // self.block)

    def pack(self) -> list[float]:
        """As the operators take it; `unpack` is its inverse, None stands for no routing."""
        return [self.tolerance, -1.0 if self.scale is None else self.scale, float(self.block), self.row_share]

    @classmethod
    def unpack(cls, numbers: Sequence[float] | None) -> "Routed | None":
        if numbers is None:
            return None
        tolerance, scale, block, row_share = numbers
        return cls(tolerance, None if scale < 0 else scale, int(block), row_share)


@dataclass(frozen=True)
class Routes:
    """Which blocks each token is routed to in the gradient of hidden, and in that of weight and bias: the same and those of the block's
    own rule."""

    mass_BN: Tensor
    hidden_BN: Tensor  # bool
    weight_BN: Tensor  # bool


def choose_routes(
    block_lse_NB: Tensor, lse_N: Tensor, coefficient_N: Tensor, target_block_N: Tensor, routed: Routed
) -> Routes:
    """The rules of `Routed` for tokens with finite coefficients and log-sum-exps. No random choice, no sort: the same on every run."""
    mass_BN = (block_lse_NB.double() - lse_N[:, None]).exp_().to(coefficient_N.dtype).T.contiguous()
    size_N = coefficient_N.abs()
    weighted_BN = mass_BN * size_N
    limit = routed.tolerance * (mean_size(size_N) if routed.scale is None else routed.scale)
    hidden_BN = (weighted_BN > limit).scatter_(0, target_block_N[None], True)
    weight_BN = hidden_BN
    if routed.row_share > 0 and len(size_N):
        weight_BN = hidden_BN | (weighted_BN > _row_threshold(weighted_BN, routed.row_share))
    return Routes(mass_BN, hidden_BN, weight_BN)


def faint_tokens(size_N: Tensor) -> Tensor:
    """bool [N], of the size of each token's largest coefficient, 0 for one that does not count."""
    if len(size_N) == 0:
        return torch.zeros_like(size_N, dtype=torch.bool)
    return torch.frexp(size_N).exponent < torch.frexp(size_N.amax()).exponent - FAINT[size_N.dtype]


def check_gradient(gradient: object) -> None:
    """ValueError for what is neither "exact" nor a Routed."""
    if not isinstance(gradient, Routed) and gradient != "exact":
        raise ValueError(f"gradient: expected 'exact' or Routed(...), got {gradient!r}")


def mean_size(size_N: Tensor) -> Tensor:
    """Of the coefficients' sizes, over the tokens where it is not 0."""
    counted_N = size_N > 0
    return (size_N.double().sum() / counted_N.sum().clamp_min(1)).to(size_N.dtype)


def _row_threshold(weighted_BN: Tensor, share: float) -> Tensor:
    """[B, 1]: the largest of a bisection's numbers above which at least `share` of each row's sum lies."""
    wanted_B1 = share * weighted_BN.sum(1, keepdim=True, dtype=torch.float64)
    low_B1, high_B1 = torch.zeros_like(weighted_BN[:, :1]), weighted_BN.amax(1, keepdim=True)
    for _ in range(BISECTIONS):
        middle_B1 = (low_B1 + high_B1) / 2
        above_B1 = torch.where(weighted_BN > middle_B1, weighted_BN, 0).sum(1, keepdim=True, dtype=torch.float64)
        enough_B1 = above_B1 >= wanted_B1
        low_B1, high_B1 = torch.where(enough_B1, middle_B1, low_B1), torch.where(enough_B1, high_B1, middle_B1)
    return low_B1
