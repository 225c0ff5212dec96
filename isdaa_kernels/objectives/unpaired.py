"""Objectives of single completions, each labelled desirable or not."""

from isdaa_kernels.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = ()
