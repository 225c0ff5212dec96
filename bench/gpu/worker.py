"""The process that measures: `python -m bench.gpu.worker '{"settings": ..., "keys": [...], "deadline": ...}'`.

It works through the rows named and writes one JSON line a step to its standard output: {"about": ...} once, then {"start": key} and
{"row": ...} by turns. What contenders print goes to the error output. Exit status 0: all done, or the deadline (seconds since the
epoch) has come; FATAL: the last row broke the process for good, and the rest needs a new one.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

from bench.device import describe_versions
from bench.gpu.accelerator import describe_accelerator, is_alive
from bench.gpu.contenders import describe_backends
from bench.gpu.entry import Entry
from bench.gpu.lab import Lab
from bench.gpu.measure import DIED, measure
from bench.gpu.settings import Settings
from bench.gpu.tasks import Task, make_tasks

FATAL = 3
Emit = Callable[[dict], None]


def load_entries(settings: Settings) -> tuple[Entry, ...]:
    return importlib.import_module(settings.contenders).make_contenders(settings)


def main(argument: str) -> int:
    asked = json.loads(argument)
    settings = Settings(**asked["settings"])
    entries = {entry.name: entry for entry in load_entries(settings)}
    wanted = set(asked["keys"])
    tasks = [t for t in make_tasks(settings.problem_set, tuple(entries.values())) if t.key in wanted]
    return work(settings, entries, tasks, asked["deadline"], _own_channel())


def work(settings: Settings, entries: dict[str, Entry], tasks: Sequence[Task], deadline: float, emit: Emit) -> int:
    lab = Lab(settings)
    emit({"about": describe(lab)})
    for task in tasks:
        if time.time() >= deadline:
            break
        emit({"start": task.key})
        row = measure(lab, task, entries[task.contender])
        emit({"row": row})
        if row["status"] == DIED and not is_alive(lab.device):
            return FATAL
    return 0


def describe(lab: Lab) -> dict:
    return {
        "device": describe_accelerator(lab.device),
        "versions": describe_versions(),
        "backends": describe_backends(lab.settings),
    }


def _own_channel() -> Emit:
    """Lines to the present standard output, which from then on is the error output for everybody else."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=channel, flush=True)


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(status)  # a broken device can make an orderly end hang
