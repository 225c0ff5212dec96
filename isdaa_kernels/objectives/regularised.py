"""Pairwise objectives on log-ratios that add a term, a gate, a margin or a scale of its own to each pair."""

from isdaa_kernels.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = ()
