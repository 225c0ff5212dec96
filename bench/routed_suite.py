"""A whole run of `bench.routed`: routes, errors, flop, memory, time. The result is one dictionary, as report.json has it.

V vocabulary, D hidden size.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from bench import device, memory
from bench.contenders import BY_NAME, Outcome, make_run, ours
from bench.gpu.accelerator import describe_accelerator, make_stopwatch, measure_peak
from bench.problem import make_problem
from bench.routed_errors import formula_outcomes, judge, rounded, to_bf16
from bench.routed_lab import OWN, PREFERENCE, RANDOM, Case, Lab, Settings, all_cases, on_device
from bench.states import States, load_states
from bench.timing import Call, Stopwatch, Timed, Unit
from isdaa_kernels import Routed
from isdaa_kernels.testing import FlopCounter, make_sample

KINDS = (RANDOM, PREFERENCE)
CALLS_A_UNIT = 3  # timed after one run of the unit
FLAT = 1e-3  # what the head is multiplied by for probabilities that are flat
FLAT_TOKENS = 1024  # at most
UNIT_DRIFT = 0.15


def run_suite(settings: Settings) -> dict[str, object]:
    begin = time.perf_counter()
    about = {"device": device.describe_device(), "accelerator": describe_accelerator(torch.device(settings.device))}
    about |= {"versions": device.describe_versions(), "commit": device.describe_commit(), "date": device.now()}
    lab = Lab(settings)
    cases = all_cases(settings.order_states is not None)
    rows = [describe(case) for case in cases]
    lines = _judge(lab, cases, rows)
    spent = _measure_memory(lab) if settings.memory else None
    unit = _measure_time(lab, cases, rows, lines)
    V, D = lab.problem.weight_VD.shape
    return {
        **about,
        "settings": vars(settings),
        "states": {"source": lab.source, "tokens": lab.problem.tokens, "vocabulary": V, "hidden_size": D},
        "coefficients": {kind: describe_coefficients(lab.coefficients[kind]) for kind in KINDS},
        "unit": unit,
        "rows": rows,
        "reference_lines": lines,
        "memory": spent,
        "flat": _measure_flat(lab),
        "seconds": time.perf_counter() - begin,
    }


def describe(case: Case) -> dict:
    routed = case.routed
    numbers = {"tolerance": routed.tolerance, "row_share": routed.row_share, "block": routed.block}
    return {"order": case.order, **numbers, "default": case.is_default, RANDOM: {}, PREFERENCE: {}}


def describe_coefficients(coefficient_N: Tensor) -> dict[str, float]:
    size_N = coefficient_N.abs()
    return {"mean_size": float(size_N.mean()), "max_size": float(size_N.max()), "zeros": int((size_N == 0).sum())}


def _judge(lab: Lab, cases: list[Case], rows: list[dict]) -> dict[str, dict]:
    """Shares, flop and errors go into the rows; returns the lines to compare them with, by name and coefficients."""
    progress = tqdm(total=2 + len(KINDS) * (1 + len(cases)), desc="errors", unit="row")
    truth = formula_outcomes(lab.problem, lab.coefficients)
    progress.update()
    coarse = formula_outcomes(lab.problem, lab.coefficients, torch.float32, to_bf16)
    progress.update()
    lines: dict[str, dict] = {"ours, exact": {}, "exact, rounded to bf16": {}, "logits rounded to bf16": {}}
    for kind, true in truth.items():
        found = _counted(lab, lab.call(None, kind), true), judge(rounded(true), true), judge(coarse[kind], true)
        for line, errors in zip(lines.values(), found, strict=True):
            line[kind] = errors
        progress.update()
        for case, row in zip(cases, rows, strict=True):
            row[kind] = _routed(lab, case, kind, true, lines["ours, exact"][kind]["flop"])
            progress.update()
    progress.close()
    return lines


def _routed(lab: Lab, case: Case, kind: str, true: Outcome, exact_flop: float | None) -> dict[str, object]:
    shares = lab.shares(case, kind)
    formula = 1 + 2 * shares["share_weight"] + shares["share_hidden"]
    found = _counted(lab, lab.call(case, kind), true)
    made_exact = found["flop"] is not None and found["flop"] == exact_flop
    return {**shares, "flop_formula": formula, "made_exact": made_exact, **found}


def _counted(lab: Lab, call: Call, true: Outcome) -> dict[str, object]:
    """Matrix flop in units and errors of one call; None where a kernel makes the products, which no counter sees."""
    problem = lab.problem
    with FlopCounter() as counter:
        outcome = call()
    unit = 2 * problem.hidden_ND.numel() * problem.weight_VD.shape[0]
    return {"flop": counter.flop / unit if lab.device.type == "cpu" else None, **judge(outcome, true)}


def _measure_memory(lab: Lab) -> dict[str, int]:
    """Bytes at the peak beyond inputs, output and gradients."""
    settings, problem = lab.settings, lab.problem
    if lab.device.type != "cpu":
        calls = {"exact": lab.call(None, RANDOM), "routed": lab.call(Case(Routed(), OWN), RANDOM)}
        found = {name: measure_peak(lab.device, call) for name, call in calls.items()}
        return {name: growth - outcome.nbytes() for name, (outcome, growth) in found.items()}
    load_states(settings.states, problem.tokens)  # into the cache: the processes shall not run the model
    names = {"exact": "ours", "routed": "ours, routed"}
    fixed = ("ordinary", "full", settings.states, problem.tokens, "float32", torch.get_num_threads())
    return {name: memory.measure_in_process(memory.Job(contender, *fixed)) for name, contender in names.items()}


def _measure_time(lab: Lab, cases: list[Case], rows: list[dict], lines: dict[str, dict]) -> dict[str, float]:
    """Fills in the figures; returns the unit at the beginning and at the end, and the fastest and slowest in between."""
    settings, unit = lab.settings, Unit(lab.problem.hidden_ND, lab.problem.weight_VD)
    watch = make_stopwatch(lab.device)

    def timed(call: Call) -> Timed:
        return Timed(call, unit, stopwatch=watch)

    jobs = [(timed(lab.call(None, RANDOM)), lines["ours, exact"], "full")]
    jobs += [(timed(lab.forward(None)), lines["ours, exact"], "forward")]
    if settings.dense:
        lines["dense PyTorch"] = {}
        dense = make_run(BY_NAME["dense PyTorch"], lab.upstream(RANDOM), "full")
        jobs += [(timed(dense), lines["dense PyTorch"], "full")]
    jobs += [(timed(lab.call(case, RANDOM)), row, "full") for case, row in zip(cases, rows, strict=True)]
    for case, row in zip(cases, rows, strict=True):
        if case.is_default:
            jobs += [(timed(lab.forward(case)), row, "forward")]
            jobs += [(timed(lab.call(case, PREFERENCE)), row, "full, is_dpo")]
    items = [item for item, *_ in jobs]
    first = unit_seconds(unit, watch)
    for _ in tqdm(in_rounds(items, settings.repeats), desc="time", total=len(items) * settings.repeats, unit="run"):
        pass
    last = unit_seconds(unit, watch)
    for item, line, mode in jobs:
        line.setdefault("time", {})[mode] = item.figures()
    within = [seconds for item in items for seconds in item.unit_seconds]
    figures = {"first": first, "last": last, "least": min(within), "median": statistics.median(within)}
    return {**figures, "most": max(within), "drifted": abs(last / first - 1) > UNIT_DRIFT}


def in_rounds(items: list[Timed], repeats: int) -> Iterator[None]:
    """Every call once a round, in turn, the unit before every third: half of the time would go into units otherwise. Calls alike in length
    stand side by side, so that none is far from its unit."""
    for _ in range(repeats):
        for place, item in enumerate(items):
            if place % CALLS_A_UNIT == 0:
                item.measure_units()
                seconds = item.unit_seconds[-1]
            else:
                item.unit_seconds.append(seconds)
            item.measure_call()
            yield


def unit_seconds(unit: Unit, watch: Stopwatch) -> float:
    unit()
    return statistics.median(watch(unit) for _ in range(3))


def _measure_flat(lab: Lab) -> dict[str, float]:
    """Uniform probabilities: nothing to be saved. Routed and exact by turns, on random states of the same shape."""
    V, D = lab.problem.weight_VD.shape
    tokens = min(lab.problem.tokens, FLAT_TOKENS)
    sample = make_sample(tokens, D, V)
    states = States(sample.hidden, sample.weight * FLAT, sample.targets, f"random:{D}x{V}, head times {FLAT:g}")
    problem = on_device(make_problem(states), lab.device)
    calls = [
        make_run(replace(BY_NAME["ours"], prepare=ours(gradient=gradient)), problem, "full")
        for gradient in ("exact", Routed())
    ]
    outcomes = [call() for call in calls]
    unit, watch = Unit(problem.hidden_ND, problem.weight_VD), make_stopwatch(lab.device)
    unit()
    items = [Timed(call, unit, stopwatch=watch) for call in calls]
    for _ in in_rounds(items, lab.settings.repeats):
        pass
    exact, routed = (item.figures()["units"] for item in items)
    errors = judge(outcomes[1], outcomes[0])["error"]
    about = {"source": states.source, "tokens": problem.tokens}
    return {**about, "exact_units": exact, "routed_units": routed, "ratio": routed / exact, "difference": errors}
