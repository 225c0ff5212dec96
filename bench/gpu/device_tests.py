"""The project's own tests of a device, in a process with a time limit; what came of them, however far it got."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.states import ROOT

TAIL = 40  # lines of the output that the report shows
MOST_WORKERS = 8
_WORDS = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
_LINE = re.compile(rf"^(?P<name>\S+::.*?) (?P<word>{_WORDS})\b")
_WORKER_LINE = re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<word>{_WORDS}) (?P<name>\S+::.*?)\s*$")  # with pytest-xdist
_PLACES = ("tests/test_device*.py",)
_GPU_PLACES = (
    "tests/test_gpu_backends*.py",
    "tests/test_*_device.py",
)  # the first interpret or emulate kernels on a CPU


def find_device_tests(device: str, root: Path = ROOT) -> list[str]:
    """test_device.py and others named after a device; on a GPU those of the GPU backends after them."""
    places = _PLACES if device == "cpu" else (*_PLACES, *_GPU_PLACES)
    paths = [path for place in places for path in sorted(root.glob(place))]
    return list(dict.fromkeys(str(path.relative_to(root)) for path in paths))


def run_device_tests(device: str, limit: float, files: list[str] | None = None) -> dict[str, object]:
    """Counts, names of failures and the end of the output. "verdict": green, red, or the reason why there is none; "output": all of it."""
    files = find_device_tests(device) if files is None else files
    command = [sys.executable, "-m", "pytest", *files, "--device", device, "-v", "-p", "no:cacheprovider", "--color=no"]
    command += _side_by_side()
    if not files:
        return _result(command, "", "no tests of a device were found", None)
    if importlib.util.find_spec("pytest") is None:
        return _result(command, "", "pytest is not installed", None)
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        return _result(command, _text(error.stdout), f"red: not done within {limit:.0f} s", None)
    verdict = "green" if done.returncode == 0 else f"red: exit status {done.returncode}"
    return _result(command, _text(done.stdout), verdict, done.returncode)


def _side_by_side() -> list[str]:
    """Kernels are compiled on the host: with pytest-xdist on half of the cores at once."""
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)
    return ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") is not None else []


def is_red(tests: dict[str, object]) -> bool:
    return str(tests["verdict"]).startswith("red")


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


def _result(command: list[str], output: str, verdict: str, status: int | None) -> dict[str, object]:
    lines = output.splitlines()
    matches = [_LINE.match(line) or _WORKER_LINE.match(line) for line in lines]
    found = {match["name"]: match["word"] for match in matches if match}
    counts = Counter(found.values())
    return {
        "command": " ".join(["python", *command[1:]]),
        "verdict": verdict,
        "status": status,
        **{word.lower(): counts[word] for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")},
        "failures": [name for name, word in found.items() if word in ("FAILED", "ERROR")],
        "tail": lines[-TAIL:],
        "output": output,
    }
