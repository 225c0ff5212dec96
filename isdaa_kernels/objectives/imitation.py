"""Terms that imitate a completion, and sums of objectives."""

from isdaa_kernels.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = ()
