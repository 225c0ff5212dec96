"""Time in units. A unit is `torch.mm(hidden, weight.T, out=preallocated)` on the same shapes, run just before each timed call.
Seconds are the host's clock, or what a `Stopwatch` for a device says.

N tokens, D hidden size, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]


class Unit:
    """The product that gives the unit of time, with its output made in advance: 2 N V D flop. `rows` tokens at a time where the
    whole output would be too large (default: all at once)."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, rows: int | None = None) -> None:
        self.parts, self.weight_VD = hidden_ND.split(rows or hidden_ND.shape[0]), weight_VD
        self.out_NV = hidden_ND.new_zeros(self.parts[0].shape[0], weight_VD.shape[0])

    def __call__(self) -> None:
        for hidden_nD in self.parts:
            torch.mm(hidden_nD, self.weight_VD.T, out=self.out_NV[: hidden_nD.shape[0]])


@dataclass
class Timed:
    """A call and its unit, the seconds that both took in turn; own_unit is the same product at the call's own 16-bit dtype."""

    call: Call
    unit: Call
    own_unit: Call | None = None
    stopwatch: Stopwatch | None = None  # default: `clock`
    seconds: list[float] = field(default_factory=list)
    unit_seconds: list[float] = field(default_factory=list)
    own_unit_seconds: list[float] = field(default_factory=list)

    def measure_once(self) -> None:
        self.measure_units()
        self.measure_call()

    def measure_units(self) -> None:
        if self.own_unit is not None:
            self.own_unit_seconds.append(self._measure(self.own_unit))
        self.unit_seconds.append(self._measure(self.unit))

    def measure_call(self) -> None:
        self.seconds.append(self._measure(self.call))

    def _measure(self, call: Call) -> float:
        return (self.stopwatch or clock)(call)

    def figures(self) -> dict[str, float | int | None]:
        """Ratio of medians, with the 20 and 80 % quantiles of the ratios to the unit run just before, and the seconds themselves."""
        ratios = [a / b for a, b in zip(self.seconds, self.unit_seconds, strict=True)]
        median = statistics.median(self.seconds)
        own = statistics.median(self.own_unit_seconds) if self.own_unit_seconds else None
        return {
            "units": median / statistics.median(self.unit_seconds),
            "units_20": quantile(ratios, 0.2),
            "units_80": quantile(ratios, 0.8),
            "seconds": median,
            "seconds_20": quantile(self.seconds, 0.2),
            "seconds_80": quantile(self.seconds, 0.8),
            "unit_seconds": statistics.median(self.unit_seconds),
            "own_dtype_units": median / own if own else None,
            "own_dtype_unit_seconds": own,
            "repeats": len(self.seconds),
        }


def measure_rounds(timed: Sequence[Timed], repeats: int, limit_seconds: float) -> Iterator[None]:
    """Every call once a round, in turn, so that a slow minute of the machine falls on all alike; yields after each call.

    A call whose next run would bring it above limit_seconds in all sits out, but every call runs once.
    """
    for clock_warm in {id(unit): unit for item in timed for unit in (item.unit, item.own_unit) if unit}.values():
        clock_warm()
    for _ in range(repeats):
        for item in timed:
            if not item.seconds or sum(item.seconds) + item.seconds[-1] <= limit_seconds:
                item.measure_once()
            yield


def clock(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered, position = sorted(values), share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
