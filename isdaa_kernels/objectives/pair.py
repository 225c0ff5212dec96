"""What a pairwise objective sees: the log-probs of preference pairs, fp64 on any device.

Letters: P preference pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    """One value for the chosen and one for the rejected completion of each pair, both [P]."""

    chosen: Tensor
    rejected: Tensor

    def minus(self, other: "Pair") -> "Pair":
        return Pair(self.chosen - other.chosen, self.rejected - other.rejected)

    def over(self, other: "Pair") -> "Pair":
        return Pair(self.chosen / other.chosen, self.rejected / other.rejected)


@dataclass(frozen=True)
class PairLogprob:
    """Sums of token log-probs over each completion, in nats.

    Only `policy` carries a gradient. `reference` and `lengths` (counts of scored tokens) are there when the objective
    `needs` them. `behaviour` is the policy that wrote the completions; it enters importance weights and never the
    margin.
    """

    policy: Pair
    reference: Pair | None = None
    behaviour: Pair | None = None
    lengths: Pair | None = None

    @property
    def log_ratio(self) -> Pair:
        """a = log policy - log reference of the chosen completion, and b of the rejected one."""
        return self.policy.minus(self.reference)

    @property
    def mean_log_ratio(self) -> Pair:
        """a / |chosen| and b / |rejected|: nats per scored token."""
        return self.log_ratio.over(self.lengths)

    @property
    def margin(self) -> Tensor:
        """Delta = a - b."""
        a, b = self.log_ratio
        return a - b
