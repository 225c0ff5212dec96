"""The registry of objectives: one pure function each, found by name.

A new objective is a function in the file of its family, a name in the tuple at the end of that file, and a golden row of its test.
"""

from isdaa_kernels.objectives import (
    divergences,
    games,
    imitation,
    listwise,
    pairwise,
    reference_free,
    regularised,
    unpaired,
)
from isdaa_kernels.objectives.batch import CompletionLogprob, GroupLogprob, Pair, PairLogprob, SequenceInputs
from isdaa_kernels.objectives.imitation import weighted_sum
from isdaa_kernels.objectives.importance import ImportanceWeight, SelfWeight, Weighting
from isdaa_kernels.objectives.objective import Objective, importance_sampled, make_objective, token_weighted
from isdaa_kernels.objectives.state import BatchState

__all__ = [
    "OBJECTIVES",
    "BatchState",
    "CompletionLogprob",
    "GroupLogprob",
    "ImportanceWeight",
    "Objective",
    "Pair",
    "PairLogprob",
    "SelfWeight",
    "SequenceInputs",
    "Weighting",
    "get_objective",
    "importance_sampled",
    "make_objective",
    "token_weighted",
    "weighted_sum",
]

FAMILIES = (pairwise, divergences, regularised, reference_free, imitation, games, unpaired, listwise)
_BASES = tuple(objective for family in FAMILIES for objective in family.OBJECTIVES)
_WEIGHTED = tuple(importance_sampled(base) for base in _BASES if base.has_importance_ratio)

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (*_BASES, *_WEIGHTED)}


def get_objective(objective: str | Objective) -> Objective:
    """The objective of that name, or an `Objective` of the caller's own as it is; ValueError for another name."""
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return OBJECTIVES[objective]
