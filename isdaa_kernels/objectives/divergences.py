"""Pairwise objectives that measure the distance to the reference by another divergence than the reverse KL."""

from isdaa_kernels.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = ()
