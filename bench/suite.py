"""A whole run: gate, memory, time, for every row whose contender is installed. The result is one dictionary, as results.json has it.

N tokens, V vocabulary.
"""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tqdm import tqdm

from bench import device, gate, memory
from bench.contenders import Outcome, Row, make_run
from bench.problem import CASES, Problem, count_sequences, make_problem
from bench.states import States, load_states
from bench.timing import Timed, Unit, measure_rounds


@dataclass(frozen=True)
class Settings:
    states: str = "smollm2"
    tokens: int = 3900
    dtype: str = "float32"
    repeats: int = 7
    limit_seconds: float = 150.0  # of one call over all its repeats
    memory: bool = True


class Lab:
    """Problems, units and truths, each made once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._problems: dict[tuple, Problem] = {}
        self._units: dict[tuple, Unit] = {}
        self._truth: tuple[tuple, Outcome] | None = None

    @cached_property
    def states(self) -> States:
        return load_states(self.settings.states, self.tokens())

    def tokens(self, row: Row | None = None) -> int:
        """Tokens of a row, or the most that any row has: what fills sequences of equal length."""
        most = min(self.settings.tokens, row.max_tokens or self.settings.tokens) if row else self.settings.tokens
        return most - most % count_sequences(most)

    def problem(self, row: Row) -> Problem:
        key = (row.case, self.tokens(row))
        if key not in self._problems:
            plain = make_problem(self.states.first(self.tokens(row))).to(getattr(torch, self.settings.dtype))
            self._problems[key] = CASES[row.case](plain)
        return self._problems[key]

    def unit(self, row: Row, dtype: torch.dtype = torch.float32) -> Unit:
        problem = self.problem(row)
        key = (problem.tokens, dtype)
        if key not in self._units:
            self._units[key] = Unit(problem.hidden_ND.to(dtype), problem.weight_VD.to(dtype))
        return self._units[key]

    def truth(self, row: Row) -> Outcome:
        """The last one is kept: rows that share a truth should come one after the other."""
        key = truth_key(row, self.tokens(row))
        if self._truth is None or self._truth[0] != key:
            self._truth = (key, gate.truth(self.problem(row), row.contender.objective))
        return self._truth[1]

    def forget_truth(self) -> None:
        """Frees its memory."""
        self._truth = None

    def check(self, row: Row, mode: str) -> tuple[dict[str, float], str | None]:
        """One call, warm-up and gate at once: its errors, and the reason why the gate is red or None."""
        problem, true = self.problem(row), self.truth(row)
        try:
            outcome = make_run(row.contender, problem, mode)()
        except Exception as error:  # whatever a contender dies of is its result and must not cost the others theirs
            return {}, f"{row.contender.name}: {type(error).__name__}: {error}"
        found = gate.errors(outcome, true)
        return found, gate.red(row.contender, problem, mode, outcome, found)

    def timed(self, row: Row, mode: str) -> Timed:
        problem = self.problem(row)
        own = problem.hidden_ND.dtype
        own_unit = None if own == torch.float32 else self.unit(row, own)
        return Timed(make_run(row.contender, problem, mode), self.unit(row), own_unit)


def truth_key(row: Row, tokens: int) -> tuple:
    """A frozen head changes which gradients are wanted, not what they are."""
    return (row.contender.objective or "", tokens, "ordinary" if row.case == "frozen head" else row.case)


def run_suite(settings: Settings, rows: Sequence[Row]) -> dict[str, object]:
    begin = time.perf_counter()
    lab = Lab(settings)
    missing = {row.contender.name: row.contender.missing() for row in rows}
    missing = {name: reason for name, reason in missing.items() if reason is not None}
    results = [_empty_result(lab, row) for row in rows]
    present = [(row, result) for row, result in zip(rows, results, strict=True) if row.contender.name not in missing]
    about = {"device": device.describe_device(), "versions": device.describe_versions(), "date": device.now()}
    green = _pass_gate(lab, present)
    lab.forget_truth()
    if settings.memory:
        _measure_memory(lab, green)
    _measure_time(lab, green)
    V, D = lab.states.weight_VD.shape
    return {
        **about,
        "commit": device.describe_commit(),
        "settings": vars(settings),
        "states": {"source": lab.states.source, "tokens": lab.tokens(), "vocabulary": V, "hidden_size": D},
        "seconds": time.perf_counter() - begin,
        "missing": missing,
        "rows": [result for row, result in present],
    }


def _empty_result(lab: Lab, row: Row) -> dict:
    about = row.contender
    named = {"title": row.title, "contender": about.name, "provider": about.provider, "note": about.note}
    modes = {mode: {} for mode in row.modes}
    return {
        **named,
        "case": row.case,
        "objective": about.objective,
        "tokens": lab.tokens(row),
        "red": None,
        "modes": modes,
    }


def _pass_gate(lab: Lab, present: list[tuple[Row, dict]]) -> list[tuple[Row, dict]]:
    """The rows that may be measured, their errors filled in; a red row keeps the sentence and nothing else."""
    by_truth = sorted(present, key=lambda item: truth_key(item[0], lab.tokens(item[0])))
    for row, result in tqdm(by_truth, desc="gate", unit="row"):
        for mode in row.modes:
            found, reason = lab.check(row, mode)
            result["modes"][mode] = {"error": found}
            result["red"] = result["red"] or reason
        if result["red"]:
            result["modes"] = {}
            tqdm.write(f"red: {result['red']}")
    return [(row, result) for row, result in present if not result["red"]]


def _measure_memory(lab: Lab, green: list[tuple[Row, dict]]) -> None:
    """Extra bytes at the peak on all tokens, and in full mode their growth from half as many."""
    jobs = [(row, result["modes"][mode], mode) for row, result in green for mode in row.modes if row.max_tokens is None]
    for row, figures, mode in tqdm(jobs, desc="memory", unit="run"):
        tokens = lab.tokens(row)
        half_tokens = tokens // 2 - tokens // 2 % count_sequences(tokens // 2)
        extra = _extra_bytes(lab, row, mode, tokens, figures)
        half = _extra_bytes(lab, row, mode, half_tokens, figures) if mode == "full" and extra is not None else None
        figures["extra_bytes"] = extra
        figures["extra_bytes_half"] = half
        figures["bytes_a_token"] = None if half is None else (extra - half) / (tokens - half_tokens)


def _extra_bytes(lab: Lab, row: Row, mode: str, tokens: int, figures: dict) -> int | None:
    chosen = lab.settings
    job = memory.Job(row.contender.name, row.case, mode, chosen.states, tokens, chosen.dtype, torch.get_num_threads())
    try:
        return memory.measure_in_process(job)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        # one contender that runs out of memory must not cost the others their figures
        figures["memory_error"] = str(error)
        tqdm.write(str(error))
        return None


def _measure_time(lab: Lab, green: list[tuple[Row, dict]]) -> None:
    cells = [(row, mode, result["modes"][mode]) for row, result in green for mode in row.modes]
    timed = [lab.timed(row, mode) for row, mode, _ in cells]
    rounds = measure_rounds(timed, lab.settings.repeats, lab.settings.limit_seconds)
    for _ in tqdm(rounds, desc="time", total=len(timed) * lab.settings.repeats, unit="run"):
        pass
    for item, (_, _, figures) in zip(timed, cells, strict=True):
        figures.update(item.figures())
