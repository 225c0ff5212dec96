"""What beta-DPO takes from its batch: beta, and which pairs are left out.

Letters: P pairs of this rank, C pairs of a rank after padding, B pairs of all ranks (padding among them).
"""

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.options import NONNEGATIVE, POSITIVE, number
from isdaa_kernels.objectives.state import GatheringState

LEAST_BETA = 1e-3  # the authors'
LEAST_STD = 1e-6


class BetaState(GatheringState):
    """`beta` and `keep` of `beta_dpo`, Wu et al. 2024 (arXiv 2407.08639) and the authors' code, made from each batch in this order:

    1. M and sigma, the running mean and standard deviation of Delta, move by 1 - decay to those of the batch (the std over its n pairs
       divides by n - 1). Both start at 0, where policy and reference agree.
    2. floor((1 - filtered_share) n) of the pairs, at least one, are drawn without replacement with probabilities proportional to
       exp(-((Delta - M) / sigma)^2 / 2).
    3. beta = max(1e-3, beta_0 (1 + strength (mean Delta of the pairs drawn - M))), and keep = (pairs of the batch) / (pairs drawn) for
       these, 0 for the others: the loss with its default denominator is the mean over the pairs drawn.

    beta              beta_0, above 0.
    strength          how far beta follows the margins, at least 0; their alpha (in their code `a`), 0.6 in their experiments.
    filtered_share    of pairs left out, in [0, 1); their rho.
    decay             of the running numbers, in [0, 1).
    seed              of the draws, which depend on it, on how many batches came before and on the place of a pair in the batch: they are
                      the same on every device and for every split of a batch over ranks.
    pairs_per_rank, process_group    as in `GatheringState`: the batch is that of all ranks.

    Where a batch has fewer than two pairs sigma stays as it is, and without a pair so does M, and beta is beta_0. A pair with an empty
    completion, or with a Delta that is not finite, is left out (a NaN reaches the loss all the same). In `eval()` step 1 is skipped and
    the draws do not go on; the authors' code makes no such difference. It takes the mean over the pairs kept on each rank by itself, and
    so weighs pairs unequally where one rank keeps more.
    """

    gives = frozenset({"beta", "keep"})

    def __init__(
        self,
        beta: float = 0.1,
        strength: float = 0.6,
        filtered_share: float = 0.2,
        decay: float = 0.9,
        seed: int = 0,
        pairs_per_rank: int | None = None,
        process_group: object | None = None,
    ) -> None:
        super().__init__(pairs_per_rank, process_group)
        below_1 = number("a number in [0, 1)", lambda value: 0 <= value < 1)
        domains = {"beta": POSITIVE, "strength": NONNEGATIVE, "filtered_share": below_1, "decay": below_1}
        values = {"beta": beta, "strength": strength, "filtered_share": filtered_share, "decay": decay}
        for name, value in values.items():
            if not domains[name].accepts(value):
                raise ValueError(f"BetaState: {name}: expected {domains[name].sentence}, got {value!r}")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"BetaState: seed: expected a whole number in [0, 2**63), got {seed!r}")
        self.beta, self.strength, self.filtered_share, self.decay = beta, strength, filtered_share, decay
        self.seed = seed
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("std", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, batch: PairLogprob) -> dict[str, Tensor]:
        local_P = batch.margin
        if self.mean.device != local_P.device:
            self.to(local_P.device)
        counts_P = local_P.isfinite() if batch.present is None else local_P.isfinite() & batch.present
        rows_P = torch.stack([torch.where(counts_P, local_P, 0), counts_P.double(), torch.ones_like(local_P)])
        rows_B, start = self.gather(rows_P)
        margin_B, counts_B = rows_B[0], rows_B[1] > 0

        if self.training:
            self._move(margin_B, counts_B)
        drawn_B = self._draw(margin_B, counts_B)
        if self.training:
            self.batches += 1
        number = drawn_B.sum()
        shift = torch.where(number > 0, (margin_B * drawn_B).sum() / number.clamp(min=1) - self.mean, 0)
        keep_B = drawn_B * (rows_B[2].sum() / number.clamp(min=1))
        beta = (self.beta * (1 + self.strength * shift)).clamp(min=LEAST_BETA)
        return {"beta": beta, "keep": keep_B[start : start + len(local_P)]}

    def _move(self, margin_B: Tensor, counts_B: Tensor) -> None:
        """Step 1, in the memory of the buffers; a compiled graph keeps `+=` of them, while it may lose `copy_`."""
        number = counts_B.sum()
        mean = margin_B.sum() / number.clamp(min=1)
        squares = torch.where(counts_B, margin_B - mean, 0).square().sum()
        std = (squares / (number - 1).clamp(min=1)).sqrt()
        self.mean += (1 - self.decay) * torch.where(number >= 1, mean - self.mean, 0)
        self.std += (1 - self.decay) * torch.where(number >= 2, std - self.std, 0)

    def _draw(self, margin_B: Tensor, counts_B: Tensor) -> Tensor:
        """Step 2, as fp64 0 and 1: the largest of log-weight plus Gumbel noise are such a draw."""
        place_B = counts_B.cumsum(0) - 1
        noise_B = -(-_uniform(self.seed, self.batches, place_B).log()).log()
        log_weight_B = -((margin_B - self.mean) / self.std.clamp(min=LEAST_STD)).square() / 2
        order_B = torch.where(counts_B, log_weight_B + noise_B, -torch.inf).argsort(descending=True, stable=True)
        number = (counts_B.sum().double() * (1 - self.filtered_share)).floor().clamp(min=1)
        return (counts_B & (order_B.argsort() < number)).double()


def _uniform(seed: int, batches: Tensor, place_B: Tensor) -> Tensor:
    """Numbers in (0, 1), fp64 [B], that depend on these three alone: the hash SplitMix64 (Steele et al. 2014) of each in turn."""
    bits_B = _mix(_mix(_mix(torch.zeros_like(place_B) + seed) + batches) + place_B)
    # 52 bits and a half: one more bit, and the largest would be rounded to 1
    return (_shift(bits_B, 12).double() + 0.5) * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    """int64 in, int64 out; products wrap, and the constants are those of the unsigned hash less 2^64."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
