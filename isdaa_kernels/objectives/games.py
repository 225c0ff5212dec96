"""Losses of methods that look for the equilibrium of a preference game, each one iteration of it."""

from isdaa_kernels.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = ()
