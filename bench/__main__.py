"""`python -m bench`: see the package's docstring."""

import argparse
import re
import sys
from pathlib import Path

import torch

from bench.contenders import all_rows
from bench.report import table, write_report
from bench.states import ROOT
from bench.suite import Settings, run_suite

FOLDER = Path(__file__).resolve().parent / "results"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--states", default="smollm2", help="smollm2, or random:DxV (hidden size, vocabulary)")
    parser.add_argument("--tokens", type=int, help="scored tokens (default: 3900; 1024 with --quick)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of hidden states and head"
    )
    parser.add_argument("--repeats", type=int, help="timed runs of each call (default: 7; 3 with --quick)")
    parser.add_argument(
        "--limit", type=float, default=150.0, help="seconds that one call may take over all its repeats"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--only", default="", help="regular expression: rows whose title matches")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats: a look, no result")
    parser.add_argument("--out", type=Path, default=FOLDER / "latest", help="folder of the results")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    tokens = options.tokens or (1024 if options.quick else 3900)
    repeats = options.repeats or (3 if options.quick else 7)
    settings = Settings(options.states, tokens, options.dtype, repeats, options.limit, not options.no_memory)
    rows = [row for row in all_rows() if re.search(options.only, row.title)]
    if not rows:
        print(f"--only: no row matches {options.only!r}", file=sys.stderr)
        return 2
    results = run_suite(settings, rows)
    results["command"] = ["python", "-m", "bench", *arguments]
    print(table(results))
    for path in write_report(results, options.out.resolve()):
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 1 if any(row["red"] for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
