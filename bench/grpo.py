"""The head of a GRPO step (log-probs, clipped loss, divergence from a reference, entropy) against dense PyTorch, TRL and Liger, on real
hidden states:

    python -m bench.grpo                        every case
    python -m bench.grpo --case entropy full-kl --padding 0.3
    python -m bench.grpo --quick                few tokens, two runs, no memory: whether everything works

Time in units (`bench.timing`), peak memory in a process of its own, errors against fp64; what is wrong gets no time. Leaves report.json,
report.md and grpo.png in --out.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench import device
from bench.contenders import Outcome, why_missing
from bench.grpo_report import MODES, PARTS, write_report
from bench.grpo_work import BY_NAME, CASES, CONTENDERS, Case, Contender, Work, make_run, make_work, truth
from bench.memory import WARM_TOKENS, bytes_of_process, peak_growth, warm_blas
from bench.states import ROOT, load_states
from bench.timing import Timed, Unit, measure_rounds
from isdaa_kernels.testing import relative_error

FOLDER = ROOT / "bench" / "results" / "grpo-latest"
QUICK_TOKENS, QUICK_REPEATS = 260, 2


@dataclass(frozen=True)
class Settings:
    states: str = "smollm2"
    tokens: int = 1040
    padding: float = 0.0
    cases: tuple[str, ...] = tuple(CASES)
    repeats: int = 7
    limit_seconds: float = 60.0  # of one call over all its repeats
    memory: bool = True


@dataclass(frozen=True)
class Job:
    """One call in a process of its own."""

    contender: str
    case: str
    states: str
    tokens: int
    padding: float
    threads: int


def run_suite(settings: Settings, contenders: Sequence[Contender]) -> dict[str, object]:
    states = load_states(settings.states, settings.tokens)
    work, cases = make_work(states, settings.padding), [CASES[name] for name in settings.cases]
    missing = {contender.name: reason for contender in contenders if (reason := why_missing(contender.needs))}
    present = [contender for contender in contenders if contender.name not in missing]
    rows, timed, unit = [], [], Unit(work.hidden_ND, work.weight_VD)
    for case in tqdm(cases, desc="truth", unit="case"):
        true = truth(work, case)
        for contender in present:
            if case.name in contender.cases:
                rows.append(judge(contender, work, case, true))
                runs = [] if rows[-1]["red"] else MODES
                timed += [(rows[-1], m, Timed(make_run(contender, work, case, m), unit)) for m in runs]
        del true
    calls = [item for _, _, item in timed]
    for _ in tqdm(
        measure_rounds(calls, settings.repeats, settings.limit_seconds),
        desc="time",
        unit="call",
        total=settings.repeats * len(calls),
    ):
        pass
    for row, mode, item in timed:
        row[mode] = item.figures()
    if settings.memory:
        for row in tqdm([row for row in rows if not row["red"]], desc="memory", unit="call"):
            measure_memory(row, settings)
    V, D = states.weight_VD.shape
    seconds = [row[mode]["unit_seconds"] for row, mode, _ in timed]
    return {
        "device": device.describe_device(),
        "versions": device.describe_versions(),
        "commit": device.describe_commit(),
        "date": device.now(),
        "settings": asdict(settings),
        "states": {
            "source": states.source,
            "tokens": work.tokens,
            "completions": work.sequences,
            "scored": int(work.scored.sum()),
            "vocabulary": V,
            "hidden_size": D,
        },
        "unit_seconds": statistics.median(seconds) if seconds else 0.0,
        "cases": [{"name": case.name, "title": case.title} for case in cases],
        "missing": missing,
        "notes": {contender.name: contender.note for contender in present if contender.note},
        "rows": rows,
    }


def judge(contender: Contender, work: Work, case: Case, true: Outcome) -> dict[str, object]:
    """A row of the report with the errors, red where one is above the contender's bar; both modes are warm then."""
    row = {"case": case.name, "contender": contender.name, "provider": contender.provider, "error": {}, "red": None}
    try:
        found, frozen = (make_run(contender, work, case, mode)() for mode in MODES)
    except Exception as error:  # whatever a library dies of must not cost the others their figures
        return {**row, "red": f"{type(error).__name__}: {error}"}
    errors = {part: relative_error(a, b) for part, a, b in zip(PARTS, found, true, strict=True)}
    worst = max(*errors.values(), relative_error(frozen.d_hidden_ND, true.d_hidden_ND))
    row["error"] = {part: error if math.isfinite(error) else None for part, error in errors.items()}
    if not all(error <= contender.bar for error in (*errors.values(), worst)):
        row["red"] = f"an error of {worst:.1e}, expected at most {contender.bar:.0e}"
    return row


def measure_memory(row: dict, settings: Settings) -> None:
    job = Job(
        row["contender"], row["case"], settings.states, settings.tokens, settings.padding, torch.get_num_threads()
    )
    try:
        row["full"]["extra_bytes"] = bytes_of_process("bench.grpo", "--job", json.dumps(asdict(job)), timeout=600)
    except RuntimeError as error:
        row["memory_error"] = str(error)


def run_job(job: Job) -> int:
    """Extra bytes at the peak of one call, beyond inputs, output and gradients."""
    torch.set_num_threads(job.threads)
    work, case = make_work(load_states(job.states, job.tokens), job.padding), CASES[job.case]
    make_run(BY_NAME[job.contender], work.shorter(min(WARM_TOKENS, work.length)), case, "full")()
    warm_blas()
    outcome, growth = peak_growth(make_run(BY_NAME[job.contender], work, case, "full"))
    return growth - outcome.nbytes()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.grpo", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--states", default=Settings.states, help="smollm2, or random:DxV (hidden size, vocabulary)")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="tokens of the batch, padding included")
    parser.add_argument("--padding", type=float, default=Settings.padding, help="mean share of padding, below 0.5")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="timed runs of each call")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that one call may take over all its repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_TOKENS} tokens, {QUICK_REPEATS} runs of each call"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 0 <= options.padding < 0.5:
        parser.error(f"--padding: expected a number in [0, 0.5), got {options.padding}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.job:
        print(run_job(Job(**json.loads(options.job))))
        return 0
    torch.set_num_threads(options.threads)
    tokens, repeats = (QUICK_TOKENS, QUICK_REPEATS) if options.quick else (options.tokens, options.repeats)
    settings = Settings(
        options.states,
        tokens,
        options.padding,
        tuple(options.case),
        repeats,
        options.limit,
        memory=not (options.no_memory or options.quick),
    )
    results = run_suite(settings, CONTENDERS)
    results["command"] = ["python", "-m", "bench.grpo", *arguments]
    for path in write_report(results, options.out.resolve()):
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 1 if any(row["red"] for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
