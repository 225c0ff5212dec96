"""Proves and measures the library on a device, in one command, without a network:

    python -m bench.gpu_report --out DIR                                        on a CUDA device, about 7 minutes
    python -m bench.gpu_report --out DIR --device cpu --problems tiny           everything once, on a CPU
    python -m bench.gpu_report --out DIR --render                               the report of DIR/report.json once more

Leaves report.json (written anew after every row), report.md, liger.csv, time.png, memory.png and device_tests.txt in DIR. Exit status 1
where the tests of the device are red. `bench.gpu` says how it is made.
"""

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path

from tqdm import tqdm

from bench.files import write_whole
from bench.gpu.device_tests import is_red, run_device_tests
from bench.gpu.journal import OUT_OF_TIME, Journal
from bench.gpu.measure import describe
from bench.gpu.report import write_report
from bench.gpu.settings import PROBLEM_SETS, Settings
from bench.gpu.supervise import Supervisor
from bench.gpu.targets import judge_targets
from bench.gpu.tasks import Task, make_tasks
from bench.gpu.worker import load_entries

TESTS_SHARE = 0.4  # of the budget at most


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--problems", default="full", choices=sorted(PROBLEM_SETS), help="which sizes")
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds in all; the rows that come last are left out"
    )
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="timed runs of each call")
    parser.add_argument("--only", default="", help="regular expression: rows whose key matches")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests of the device out")
    parser.add_argument("--contenders", default=Settings.contenders, help="module with make_contenders(settings)")
    parser.add_argument(
        "--row-limit", type=float, default=Settings.row_limit, help="seconds after which a row counts as hung"
    )
    parser.add_argument("--gate-tokens", type=int, default=Settings.gate_tokens, help="tokens compared with fp64")
    parser.add_argument("--render", action="store_true", help="only make the files anew from report.json")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.render:
        results = json.loads((options.out / "report.json").read_text())
        return finish(results, options.out)
    signal.signal(signal.SIGTERM, _interrupt)
    deadline = time.time() + options.budget
    chosen = {"repeats": options.repeats, "row_limit": options.row_limit, "gate_tokens": options.gate_tokens}
    settings = Settings(options.device, options.problems, options.contenders, **chosen)
    tasks, journal = _prepare(settings, options.only, options.out, arguments)
    try:
        if not options.no_tests:
            _run_tests(journal, options.device, TESTS_SHARE * options.budget, options.out)
        Supervisor(settings, journal, tasks, deadline).run()
        journal.set(finished=True)
    except KeyboardInterrupt:
        journal.note("interrupted")
    _judge(journal, settings)
    return finish(journal.results, options.out)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _prepare(settings: Settings, only: str, folder: Path, arguments: list[str]) -> tuple[list[Task], Journal]:
    entries = load_entries(settings)
    by_name = {entry.name: entry for entry in entries}
    tasks = [task for task in make_tasks(settings.problem_set, entries) if re.search(only, task.key)]
    rows = [describe(task, by_name[task.contender]) for task in tasks]
    journal = Journal(folder, settings, rows, ["python", "-m", "bench.gpu_report", *arguments])
    journal.write()
    return tasks, journal


def _run_tests(journal: Journal, device: str, limit: float, folder: Path) -> None:
    tqdm.write("tests of the device")
    tests = run_device_tests(device, limit)
    write_whole(folder / "device_tests.txt", tests.pop("output"))
    tqdm.write(f"tests of the device: {tests['verdict']}")
    journal.set(device_tests=tests)


def _judge(journal: Journal, settings: Settings) -> None:
    results = journal.results
    journal.set(targets=judge_targets(results["rows"], settings.problem_set, results["device_tests"]))


def finish(results: dict, folder: Path) -> int:
    """Writes what is made of report.json and says where; the exit status."""
    for path in write_report(results, folder):
        print(path)
    for target in results["targets"]:
        print(
            {True: "met    ", False: "NOT MET", None: "?      "}[target["met"]],
            target["target"],
            "|",
            target["measured"],
        )
    left = sum(row["reason"] == OUT_OF_TIME for row in results["rows"])
    print(f"{len(results['rows']) - left} of {len(results['rows'])} rows before the time was up")
    tests = results["device_tests"]
    red = tests is not None and is_red(tests)
    if red:
        print(f"THE TESTS OF THE DEVICE ARE RED: {', '.join(tests['failures']) or tests['verdict']}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
