"""The CUDA kernels under NVIDIA's compute-sanitizer, on small problems:

    python -m bench.gpu.sanitizer --out DIR

Leaves sanitizer_<tool>.txt in DIR. Exit status 1 where a tool found a fault, 2 where one could not look: not installed, or refused by the
machine.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from bench.files import write_whole
from bench.states import ROOT

TOOLS = ("memcheck", "racecheck")
TESTS = tuple(f"tests/test_gpu_backends{part}.py" for part in ("", "_kl", "_routed"))
SELECTION = "cuda and (test_values_and_gradients or test_statistics or test_many_slabs)"
FOUND = 9  # exit status of a tool that found something
SUMMARY = "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards"


def command(tool: str) -> list[str]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTION, *TESTS]
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all", *pytest]


def judge(status: int, output: str) -> tuple[int, str]:
    """(exit status, a word for it)."""
    if status == 0 and any(line in output for line in SUMMARY):
        return 0, "clean"
    if status == FOUND or " failed" in output:
        return 1, "FAULTS"
    return 2, "could not look"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitizer")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    options = parser.parse_args(arguments)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    worst = 0
    for tool in TOOLS:
        done = subprocess.run(command(tool), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        status, word = judge(done.returncode, done.stdout)
        write_whole(options.out / f"sanitizer_{tool}.txt", done.stdout)
        print(f"{tool}: {word}")
        worst = 1 if 1 in (worst, status) else max(worst, status)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
