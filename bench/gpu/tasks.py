"""The rows of a run in the order of their worth: what comes last is what a short budget leaves out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.gpu.entry import (
    CURVE,
    DIVERGENCE,
    FIRST,
    FROZEN,
    LAST,
    LATE_PAIR,
    LATE_STEP,
    LONG,
    OTHERS,
    PAIR,
    STEP,
    Entry,
)
from bench.gpu.settings import ProblemSet, Shape

ORDINARY, FROZEN_HEAD = "ordinary", "frozen head"
FORWARD, FULL = "forward", "full"
BITWISE, NO_WAIT = "bitwise", "no wait"
CHECKS = (BITWISE, NO_WAIT)


@dataclass(frozen=True)
class Task:
    """One row: a contender on a problem. mode: forward, full (forward and backward), or one of CHECKS."""

    shape: Shape
    contender: str
    mode: str
    case: str = ORDINARY

    @property
    def key(self) -> str:
        return f"{self.shape} | {self.contender} | {self.case} | {self.mode}"


def make_tasks(problems: ProblemSet, entries: Sequence[Entry]) -> list[Task]:
    """Each row once, at its first place."""
    first, *others = problems.shapes
    groups = (FIRST, OTHERS, CURVE, FROZEN, LONG, PAIR, LATE_PAIR, DIVERGENCE, STEP, LATE_STEP, LAST)
    members = {group: [entry for entry in entries if group in entry.groups] for group in groups}
    tasks = _both(first, members[FIRST])
    tasks += _each(first, members[FROZEN][:1], (FULL,), FROZEN_HEAD)
    tasks += _each(first, members[FIRST][:1], CHECKS)
    tasks += _each(problems.long, _own(members[LONG]), (FULL,))
    tasks += _each(problems.pair, members[PAIR], (FULL,))
    tasks += _each(first, members[FROZEN][1:], (FULL,), FROZEN_HEAD)
    tasks += _both(first, members[DIVERGENCE])
    tasks += _each(first, _own(members[DIVERGENCE]), CHECKS)
    tasks += _each(first, members[STEP], (FULL,))
    for shape in others:
        tasks += _both(shape, members[OTHERS])
    tasks += _each(problems.shapes[-1], members[DIVERGENCE], (FULL,))
    tasks += _each(problems.pair, members[LATE_PAIR], (FULL,))
    tasks += _each(first, members[LATE_STEP], (FULL,))
    for tokens in problems.curve:
        tasks += _each(first._replace(N=tokens), members[CURVE], (FULL,))
    tasks += _each(problems.long, members[LONG], (FULL,))
    tasks += _each(first, members[FROZEN], CHECKS)
    for shape in others:
        tasks += _both(shape, members[LAST])
    return list(dict.fromkeys(tasks))


def _both(shape: Shape, entries: Iterable[Entry]) -> list[Task]:
    return _each(shape, entries, (FULL, FORWARD))


def _each(shape: Shape, entries: Iterable[Entry], modes: Iterable[str], case: str = ORDINARY) -> list[Task]:
    return [Task(shape, entry.name, mode, case) for entry in entries for mode in modes]


def _own(entries: Iterable[Entry]) -> Iterator[Entry]:
    return (entry for entry in entries if entry.backend is not None)
