"""Peak memory of one call in a process of its own: growth of the resident set, beyond inputs, output and gradients.

`python -m bench.memory '{"contender": ..., ...}'` is that process. Linux only: it resets the kernel's own high-water mark
(/proc/self/clear_refs), so that no moment is missed, as it would be by sampling.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from bench.contenders import BY_NAME, make_run
from bench.problem import CASES, make_problem
from bench.states import ROOT, load_states

WARM_TOKENS = 4  # of each sequence in the call that loads libraries and starts threads


@dataclass(frozen=True)
class Job:
    contender: str
    case: str
    mode: str
    states: str
    tokens: int
    dtype: str
    threads: int


def measure_in_process(job: Job, timeout: float = 900) -> int:
    """Extra bytes at the peak. Raises RuntimeError with the last line that the process wrote if it fails."""
    try:
        return bytes_of_process("bench.memory", json.dumps(asdict(job)), timeout=timeout)
    except RuntimeError as error:
        raise RuntimeError(f"memory of {job.contender}: {error}") from error


def bytes_of_process(module: str, *arguments: str, timeout: float) -> int:
    """The number that `python -m module arguments` prints last. Raises RuntimeError with its exit status and the last line that it wrote
    to stderr if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"exit status {done.returncode}, it said: {said}")
    return int(done.stdout.splitlines()[-1])


def run_job(job: Job) -> int:
    torch.set_num_threads(job.threads)
    problem = CASES[job.case](make_problem(load_states(job.states, job.tokens)).to(getattr(torch, job.dtype)))
    contender = BY_NAME[job.contender]
    make_run(contender, problem.shorter(min(WARM_TOKENS, problem.length)), job.mode)()
    warm_blas()
    run = make_run(contender, problem, job.mode)
    outcome, growth = peak_growth(run)
    return growth - outcome.nbytes()


def peak_growth(call: Callable[[], object]) -> tuple[object, int]:
    """What `call` returns, and by how many bytes the resident set was larger at its peak than before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = high_water_mark()
    result = call()
    return result, high_water_mark() - before


def high_water_mark() -> int:
    """Peak resident bytes since the last reset."""
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def warm_blas() -> None:
    """The buffers that the BLAS keeps for each thread belong to nobody's call."""
    torch.mm(torch.ones(512, 512), torch.ones(512, 2048))


if __name__ == "__main__":
    print(run_job(Job(**json.loads(sys.argv[1]))))
