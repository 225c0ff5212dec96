"""One row: gate, a run to warm up that is judged too, peak memory, time. What a contender dies of becomes its row's reason."""

import time
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from bench.contenders import Outcome, make_run
from bench.gpu.accelerator import forbid_waiting, make_stopwatch, measure_peak, release
from bench.gpu.entry import Entry
from bench.gpu.lab import DTYPE, Lab
from bench.gpu.tasks import BITWISE, CHECKS, FROZEN_HEAD, FULL, Task
from bench.gpu.two_heads import DIRECTIONS
from bench.timing import Timed, measure_rounds
from isdaa_kernels import plan
from isdaa_kernels.dispatch import NoBackend

MEASURED, RED, DIED, MISSING, NOT_RUN = "measured", "red", "died", "missing", "not run"


def measure(lab: Lab, task: Task, entry: Entry) -> dict:
    """The row of a task, as report.json has it; never raises for what a contender does."""
    begin, row = time.perf_counter(), describe(task, entry)
    reason = lab.missing(entry.contender)
    if reason is not None:
        return {**row, "status": MISSING, "reason": reason}
    try:
        row |= _check(lab, task, entry) if task.mode in CHECKS else _measure(lab, task, entry)
    except NoBackend as error:
        row |= {"status": MISSING, "reason": sentence(error)}
    except Exception as error:  # whatever a contender dies of is its result and must not cost the others theirs
        row |= {"status": DIED, "reason": sentence(error)}
    release_quietly(lab)
    return {**row, "row_seconds": time.perf_counter() - begin}


def describe(task: Task, entry: Entry) -> dict:
    """What a row says of itself before anything is known."""
    contender = entry.contender
    named = {"key": task.key, "contender": contender.name, "provider": contender.provider, "note": contender.note}
    return {
        **named,
        "objective": contender.objective,
        "mode": task.mode,
        "case": task.case,
        "shape": list(task.shape),
        "status": NOT_RUN,
        "reason": None,
    }


def sentence(error: Exception) -> str:
    """The first line of what it says, in at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def release_quietly(lab: Lab) -> None:
    """After an error that broke the device for good nothing can be released; `is_alive` finds that out."""
    try:
        release(lab.device)
    except RuntimeError as error:
        tqdm.write(f"release: {sentence(error)}")


def _measure(lab: Lab, task: Task, entry: Entry) -> dict:
    errors, red = lab.judge(task, entry.contender)
    row = {"error": errors, "plan": _plan(lab, task, entry)}
    if red is not None:
        return {**row, "status": RED, "reason": red}
    run = make_run(entry.contender, lab.problem(task, entry.contender.objective), task.mode)
    row["error_whole"], red = lab.judge_whole(task, entry.contender, run())
    row["states"] = lab.describe_states()
    if red is not None:
        return {**row, "status": RED, "reason": red}
    outcome, peak = measure_peak(lab.device, run)
    row["extra_bytes"] = peak - outcome.nbytes()
    del outcome
    return {**row, **_time(lab, task, run), "status": MEASURED}


def _time(lab: Lab, task: Task, run) -> dict:
    timed = Timed(run, lab.unit(task), stopwatch=make_stopwatch(lab.device))
    for _ in measure_rounds([timed], lab.settings.repeats, lab.settings.call_limit):
        pass
    return timed.figures()


def _plan(lab: Lab, task: Task, entry: Entry) -> str | None:
    if entry.backend is None:
        return None
    N, D, V = task.shape
    workspace = None if entry.workspace_of is None else entry.workspace_of(N)
    options = {"max_workspace_mb": workspace, "device": lab.device, "backend": entry.backend}
    options["direction"] = DIRECTIONS.get(entry.contender.objective)
    return str(plan(N, V, D, DTYPE, frozen_head=task.case == FROZEN_HEAD, **options))


def _check(lab: Lab, task: Task, entry: Entry) -> dict:
    """Whether two runs agree in every bit, or whether forward and backward never wait for the device; after the gate."""
    errors, red = lab.judge(replace(task, mode=FULL), entry.contender)
    if red is not None:
        return {"error": errors, "status": RED, "reason": red}
    run = make_run(entry.contender, lab.problem(task, entry.contender.objective), FULL)
    if task.mode == BITWISE:
        return {"ok": _same(run(), run()), "status": MEASURED}
    if lab.device.type != "cuda":
        return {"status": NOT_RUN, "reason": f"{lab.device.type}: there is no device to wait for"}
    run()
    return never_waits(run)


def never_waits(run) -> dict:
    with forbid_waiting():
        try:
            run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return {"ok": False, "reason": sentence(error), "status": MEASURED}
    return {"ok": True, "status": MEASURED}


def _same(one: Outcome, other: Outcome) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None]
    return all(torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
