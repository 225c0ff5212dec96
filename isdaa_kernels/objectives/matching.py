"""What AOT matches by rank: the pairs of a batch, and those of the batches of all ranks.

Letters: P preference pairs of this process, N those of all processes. A quantile is the k-th smallest of the pairs that are present.
"""

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.state import GatheringState


def same_rank(value_P: Tensor, other_P: Tensor, present_P: Tensor | None) -> Tensor:
    """For each pair the k-th smallest of `other`, k the place of its own `value`, both among the pairs that are present; 0 for the others.

    Equal values keep the order of the batch. The gradient goes to the element of `other` that is taken; the places have none.
    """
    if present_P is None:
        present_P = torch.ones_like(value_P, dtype=torch.bool)
    # what is not present comes last in both, and so meets its like
    order_P = torch.where(present_P, value_P.detach(), torch.inf).argsort(stable=True)
    sorted_P = torch.where(present_P, other_P, torch.inf).sort(stable=True).values
    return torch.where(present_P, torch.zeros_like(sorted_P).scatter(0, order_P, sorted_P), 0)


class QuantileMatch(GatheringState):
    """`partner`: for each pair the reference's margin of the same rank, ranks counted over the pairs of all processes.

    With it the losses of `aot` on all ranks are those of one rank that has the joined batch, and so are their gradients: what a pair is
    compared with has none. Nothing is kept from batch to batch.
    """

    gives = frozenset({"partner"})

    @torch.no_grad()
    def forward(self, batch: PairLogprob) -> dict[str, Tensor]:
        policy_P, reference_P = batch.policy.difference, batch.reference.difference
        present_P = torch.ones_like(policy_P) if batch.present is None else batch.present.to(policy_P)
        columns_3N, first = self.gather(torch.stack([policy_P, reference_P, present_P]))
        partner_N = same_rank(columns_3N[0], columns_3N[1], columns_3N[2] > 0)
        return {"partner": partner_N[first : first + len(policy_P)]}
