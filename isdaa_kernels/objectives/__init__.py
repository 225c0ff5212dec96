"""The registry of objectives: one pure function each, found by name.

A new objective is a function in the file of its family, a name in the tuple at the end of that file, and a golden row of its test.
"""

from isdaa_kernels.objectives import (
    clipped_ratio,
    divergences,
    games,
    imitation,
    listwise,
    offline_rl,
    pairwise,
    policy_gradient,
    reference_free,
    regularised,
    token_level,
    unpaired,
)
from isdaa_kernels.objectives.advantages import group_advantages, rto_rewards
from isdaa_kernels.objectives.batch import CompletionLogprob, GroupLogprob, Pair, PairLogprob, SequenceInputs
from isdaa_kernels.objectives.imitation import weighted_sum
from isdaa_kernels.objectives.importance import ImportanceWeight, SelfWeight, Weighting
from isdaa_kernels.objectives.objective import Objective, importance_sampled, make_objective, token_weighted
from isdaa_kernels.objectives.sampler import SamplerCorrection
from isdaa_kernels.objectives.state import BatchState
from isdaa_kernels.objectives.token_batch import TokenLogprob
from isdaa_kernels.objectives.tokens import chosen_tokens, divergent_tokens, guidance_weight, step_cu_seqlens

__all__ = [
    "OBJECTIVES",
    "BatchState",
    "CompletionLogprob",
    "GroupLogprob",
    "ImportanceWeight",
    "Objective",
    "Pair",
    "PairLogprob",
    "SamplerCorrection",
    "SelfWeight",
    "SequenceInputs",
    "TokenLogprob",
    "Weighting",
    "chosen_tokens",
    "divergent_tokens",
    "get_objective",
    "group_advantages",
    "guidance_weight",
    "importance_sampled",
    "make_objective",
    "rto_rewards",
    "step_cu_seqlens",
    "token_weighted",
    "weighted_sum",
]

FAMILIES = (
    pairwise,
    divergences,
    regularised,
    token_level,
    reference_free,
    imitation,
    games,
    unpaired,
    listwise,
    clipped_ratio,
    policy_gradient,
    offline_rl,
)
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
