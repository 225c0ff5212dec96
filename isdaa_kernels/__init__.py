"""Token log-probs, importance-weighted preference losses and exact gradients from hidden states and an LM head, without the logits."""

from isdaa_kernels import monitors
from isdaa_kernels.dispatch import NoBackend, Problem
from isdaa_kernels.explain import explain_backends, plan
from isdaa_kernels.linear_kl import KlLogprobs, linear_kl
from isdaa_kernels.linear_logprob import linear_logprob, linear_logprob_stats
from isdaa_kernels.linear_policy_loss import linear_policy_loss
from isdaa_kernels.linear_preference_loss import linear_preference_loss
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.logprob_from_logits import logprob_from_logits, logprob_stats_from_logits
from isdaa_kernels.objectives import (
    OBJECTIVES,
    BatchState,
    ImportanceWeight,
    Objective,
    SamplerCorrection,
    SelfWeight,
    chosen_tokens,
    divergent_tokens,
    group_advantages,
    guidance_weight,
    importance_sampled,
    rto_rewards,
    step_cu_seqlens,
    weighted_sum,
)
from isdaa_kernels.objectives.names import NamedObjective, objective_of
from isdaa_kernels.policy_loss import PolicyLoss, policy_loss
from isdaa_kernels.preference_loss import PreferenceLoss, preference_loss
from isdaa_kernels.routing import Routed
from isdaa_kernels.sequence_logprob import sequence_logprob
from isdaa_kernels.stats import VocabStats
from isdaa_kernels.targets import check, shift_targets
from isdaa_kernels.vocab_order import VocabOrder, make_vocab_order
from isdaa_kernels.workspace import Plan

__version__ = "0.1.0"
__all__ = [
    "OBJECTIVES",
    "BatchState",
    "ImportanceWeight",
    "KlLogprobs",
    "LMHead",
    "NamedObjective",
    "NoBackend",
    "Objective",
    "Plan",
    "PolicyLoss",
    "PreferenceLoss",
    "Problem",
    "Routed",
    "SamplerCorrection",
    "SelfWeight",
    "VocabOrder",
    "VocabStats",
    "check",
    "chosen_tokens",
    "divergent_tokens",
    "explain_backends",
    "group_advantages",
    "guidance_weight",
    "importance_sampled",
    "linear_kl",
    "linear_logprob",
    "linear_logprob_stats",
    "linear_policy_loss",
    "linear_preference_loss",
    "logprob_from_logits",
    "logprob_stats_from_logits",
    "make_vocab_order",
    "monitors",
    "objective_of",
    "plan",
    "policy_loss",
    "preference_loss",
    "rto_rewards",
    "sequence_logprob",
    "shift_targets",
    "step_cu_seqlens",
    "weighted_sum",
]
