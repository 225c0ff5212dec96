"""Objectives of groups of completions of one prompt."""

from isdaa_kernels.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = ()
