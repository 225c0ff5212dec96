"""Pairwise objectives on the policy's own log-probs: no reference model."""

from isdaa_kernels.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = ()
