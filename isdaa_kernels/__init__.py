"""Token log-probs, importance-weighted preference losses and exact gradients from hidden states and an LM head, without the logits."""

from isdaa_kernels.dispatch import NoBackend, Problem
from isdaa_kernels.explain import explain_backends, plan
from isdaa_kernels.linear_logprob import linear_logprob
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.targets import check, shift_targets
from isdaa_kernels.workspace import Plan

__version__ = "0.1.0"
__all__ = [
    "LMHead",
    "NoBackend",
    "Plan",
    "Problem",
    "check",
    "explain_backends",
    "linear_logprob",
    "plan",
    "shift_targets",
]
