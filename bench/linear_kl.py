"""`linear_kl` against dense PyTorch and TRL's chunked divergence, on real hidden states:

    python -m bench.linear_kl                     every direction, about 8 minutes on 2 cores
    python -m bench.linear_kl --direction reverse --no-memory --repeats 3

Time in units (`bench.timing`; a unit is one product of one head), peak memory in a process of its own, errors against fp64. The reference
has the policy's head and slightly other states, as `bench.problem` makes them. Leaves linear_kl.json and linear_kl.md in --out.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench import device
from bench.contenders import Outcome
from bench.files import write_whole
from bench.liger_csv import MIB
from bench.memory import bytes_of_process, peak_growth, warm_blas
from bench.problem import Problem, make_problem
from bench.states import ROOT, load_states
from bench.timing import Timed, Unit, measure_rounds
from isdaa_kernels import LMHead, linear_kl
from isdaa_kernels.divergence import DIRECTIONS
from isdaa_kernels.testing import dense_kl, relative_error

FOLDER = ROOT / "bench" / "results" / "linear-kl-latest"
MODES = ("forward", "full", "frozen head")
BAR = 1e-2  # of a relative error: rounding costs a small divergence digits, a wrong formula costs all
CHUNK = 128  # tokens of the truth at once
LIMIT_SECONDS = 60.0  # of one call over all its repeats
Function = Callable[[Tensor, Tensor, Problem, str], Tensor]


def dense(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem, direction: str) -> Tensor:
    head = LMHead(problem.weight_VD.to(weight_VD.dtype))
    return dense_kl(
        hidden_ND, LMHead(weight_VD), problem.reference_hidden_ND.to(hidden_ND.dtype), head, direction=direction
    )


def trl(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem, direction: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}[direction]
    reference = (problem.reference_hidden_ND, problem.weight_VD, None)
    return ChunkedDivergenceFunction.apply(hidden_ND, weight_VD, None, *reference, beta)[0]


def ours(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem, direction: str, **kernel: object) -> Tensor:
    reference = (problem.reference_hidden_ND, problem.weight_VD)
    return linear_kl(hidden_ND, weight_VD, *reference, direction=direction, **kernel)


CONTENDERS: dict[str, Function] = {"dense PyTorch": dense, "TRL chunked": trl, "ours": ours}


def make_call(name: str, problem: Problem, direction: str, mode: str) -> Callable[[], Outcome]:
    function = CONTENDERS[name]

    def call() -> Outcome:
        hidden_ND = problem.hidden_ND.detach().requires_grad_(mode != "forward")
        weight_VD = problem.weight_VD.detach().requires_grad_(mode == "full")
        value_N = function(hidden_ND, weight_VD, problem, direction)
        if mode != "forward":
            value_N.backward(problem.upstream_N)
        return Outcome(value_N.detach(), hidden_ND.grad, weight_VD.grad)

    return call


def truth(problem: Problem, direction: str) -> Outcome:
    """In fp64 by autograd, CHUNK tokens at a time."""
    weight_VD = problem.weight_VD.double().requires_grad_()
    values, d_hidden = [], []
    for start in range(0, problem.tokens, CHUNK):
        rows = slice(start, start + CHUNK)
        hidden_nD = problem.hidden_ND[rows].double().requires_grad_()
        head = LMHead(weight_VD.detach())
        reference_nD = problem.reference_hidden_ND[rows].double()
        value_n = dense_kl(hidden_nD, LMHead(weight_VD), reference_nD, head, direction=direction)
        value_n.backward(problem.upstream_N[rows].double())
        values.append(value_n.detach())
        d_hidden.append(hidden_nD.grad)
    return Outcome(torch.cat(values), torch.cat(d_hidden), weight_VD.grad)


def measure(problem: Problem, options: argparse.Namespace) -> list[dict]:
    rows, timed, unit = [], [], Unit(problem.hidden_ND, problem.weight_VD)
    for direction in tqdm(options.direction, desc="truth", unit="direction"):
        true = truth(problem, direction)
        for name in CONTENDERS:
            found = make_call(name, problem, direction, "full")()
            errors = {
                part: relative_error(a, b)
                for part, a, b in zip(("value", "d_hidden", "d_weight"), found, true, strict=True)
            }
            row = {"direction": direction, "contender": name, "error": errors, "mean": float(true.value.mean())}
            row["red"] = any(not error <= BAR for error in errors.values())
            rows.append(row)
            if not row["red"]:
                timed += [(row, mode, Timed(make_call(name, problem, direction, mode), unit)) for mode in MODES]
        del true
    calls = [item for _, _, item in timed]
    rounds = measure_rounds(calls, options.repeats, LIMIT_SECONDS)
    for _ in tqdm(rounds, desc="time", unit="call", total=options.repeats * len(calls)):
        pass
    for row, mode, item in timed:
        row[mode] = item.figures()
    return rows


def measure_memory(rows: list[dict], options: argparse.Namespace) -> None:
    """Each in a process of its own; raises RuntimeError for one that fails."""
    for row in tqdm([row for row in rows if not row["red"]], desc="memory", unit="call"):
        job = [row["contender"], row["direction"], options.states, str(options.tokens), str(options.threads)]
        row["extra_bytes"] = bytes_of_process("bench.linear_kl", "--job", *job, timeout=600)


def run_job(name: str, direction: str, states: str, tokens: str, threads: str) -> int:
    torch.set_num_threads(int(threads))
    problem = make_problem(load_states(states, int(tokens)))
    make_call(name, problem.shorter(2), direction, "full")()
    warm_blas()
    outcome, growth = peak_growth(make_call(name, problem, direction, "full"))
    return growth - outcome.nbytes()


def markdown(results: dict) -> str:
    states, about = results["states"], results["device"]
    head = [
        "direction",
        "contender",
        *MODES,
        "20-80 % of full",
        "peak MiB",
        "err value",
        "err d_hidden",
        "err d_weight",
    ]
    lines = [
        "# linear_kl",
        "",
        f"{about['cpu']}, {about['threads']} threads; torch {results['versions']['torch']}, trl {results['versions']['trl']}; "
        f"commit {results['commit']}; {results['date']}.",
        f"{states['source']}, {states['tokens']} tokens, V = {states['vocabulary']}, D = {states['hidden_size']}; a unit took "
        f"{results['unit_seconds']:.3f} s.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---" + "|---:" * (len(head) - 2) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in results["rows"])]) + "\n"


def _cells(row: dict) -> list[str]:
    errors = [f"{row['error'][part]:.1e}" for part in ("value", "d_hidden", "d_weight")]
    cells = [f"{row['direction']} (mean {row['mean']:.1e})", row["contender"]]
    if row["red"]:
        return [*cells, *["red"] * 5, *errors]
    full, extra = row["full"], row.get("extra_bytes")
    times = [f"{row[mode]['units']:.2f}" for mode in MODES]
    return [
        *cells,
        *times,
        f"{full['units_20']:.2f}-{full['units_80']:.2f}",
        "" if extra is None else f"{extra / MIB:.0f}",
        *errors,
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear_kl", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--states", default="smollm2", help="smollm2, or random:DxV (hidden size, vocabulary)")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.job:
        print(run_job(*options.job))
        return 0
    torch.set_num_threads(options.threads)
    states = load_states(options.states, options.tokens)
    problem = make_problem(states)
    rows = measure(problem, options)
    if not options.no_memory:
        measure_memory(rows, options)
    V, D = states.weight_VD.shape
    seconds = [row[mode]["unit_seconds"] for row in rows if not row["red"] for mode in MODES]
    results = {
        "device": device.describe_device(),
        "versions": device.describe_versions(),
        "commit": device.describe_commit(),
        "date": device.now(),
        "command": ["python", "-m", "bench.linear_kl", *arguments],
        "states": {"source": states.source, "tokens": problem.tokens, "vocabulary": V, "hidden_size": D},
        "unit_seconds": sorted(seconds)[len(seconds) // 2] if seconds else math.nan,
        "rows": rows,
    }
    print(markdown(results))
    for name, data in (("linear_kl.json", json.dumps(results, indent=1)), ("linear_kl.md", markdown(results))):
        write_whole(options.out.resolve() / name, data)
    return 1 if any(row["red"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
