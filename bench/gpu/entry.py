"""A contender's place in a run on a device: which groups of rows it takes part in."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.contenders import Contender

FIRST, OTHERS, CURVE, FROZEN = "first", "others", "curve", "frozen"
LONG, PAIR, LATE_PAIR, LAST = "long", "pair", "late pair", "last"
DIVERGENCE, STEP, LATE_STEP = "divergence", "step", "late step"


@dataclass(frozen=True)
class Entry:
    """A contender and the groups of rows it takes part in; `max_workspace_mb` and `backend` are for its plan, where it is ours."""

    contender: Contender
    groups: frozenset[str]
    backend: str | None = None
    workspace_of: Callable[[int], float] | None = None  # tokens -> MiB

    @property
    def name(self) -> str:
        return self.contender.name
