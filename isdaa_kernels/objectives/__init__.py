"""The registry of objectives: one pure function each, found by name.

A new objective is a function in the file of its kind, a name in the tuple below, and a golden row in its test.
"""

from isdaa_kernels.objectives.importance import ImportanceWeight
from isdaa_kernels.objectives.objective import Objective, importance_sampled, make_objective
from isdaa_kernels.objectives.pair import Pair, PairLogprob
from isdaa_kernels.objectives.pairwise import dpo, ipo, ipo_mean, slic

__all__ = ["OBJECTIVES", "ImportanceWeight", "Objective", "Pair", "PairLogprob", "get_objective", "importance_sampled"]

_BASES = tuple(make_objective(function) for function in (dpo, ipo, ipo_mean, slic))

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (*_BASES, *(importance_sampled(base) for base in _BASES))
}


def get_objective(objective: str | Objective) -> Objective:
    """The objective of that name, or an `Objective` of the caller's own as it is; ValueError for another name."""
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return OBJECTIVES[objective]
