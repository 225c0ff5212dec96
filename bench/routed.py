"""What the routed gradient saves and what it costs in accuracy, on real hidden states:

    python -m bench.routed --states smollm2                              the demonstration's answers, about 8 minutes on 2 cores
    python -m bench.routed --states smollm2:LICENSE,README.md            the text of files
    python -m bench.routed --states smollm2 --quick                      a look, no result

Time in units (`bench.timing`), share of the (token, block) pairs that are routed, matrix flop, and errors of the gradients against fp64,
for a sweep of `Routed` with and without an order of the vocabulary; beside them dense PyTorch, the exact gradient, and what rounding to
bf16 costs. The order is made from states that are not measured. Leaves report.json, report.md and routed.png in --out.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.routed_lab import Settings
from bench.routed_picture import draw
from bench.routed_report import markdown, write_report
from bench.routed_suite import run_suite
from bench.states import ROOT

FOLDER = Path(__file__).resolve().parent / "results" / "routed-latest"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.routed", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--states",
        default=Settings.states,
        help="smollm2, smollm2:FILE[,FILE...], or random:DxV (hidden size, vocabulary)",
    )
    parser.add_argument(
        "--order-states", help="another text for the same model: its order of the vocabulary is tried too"
    )
    parser.add_argument("--tokens", type=int, help="scored tokens (default: 3900; 1024 with --quick)")
    parser.add_argument("--order-tokens", type=int, default=Settings.order_tokens, help="that an order is made from")
    parser.add_argument("--repeats", type=int, help="timed runs of each call (default: 5; 2 with --quick)")
    parser.add_argument("--device", default=Settings.device, help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--no-dense", action="store_true", help="leave dense PyTorch out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats: a look, no result")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the report")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(
        states=options.states,
        order_states=options.order_states,
        tokens=options.tokens or (1024 if options.quick else Settings.tokens),
        order_tokens=options.order_tokens,
        repeats=options.repeats or (2 if options.quick else Settings.repeats),
        device=options.device,
        dense=not options.no_dense,
        memory=not options.no_memory,
    )
    results = run_suite(settings)
    results["command"] = ["python", "-m", "bench.routed", *arguments]
    print(markdown(results))
    for path in write_report(results, draw(results), options.out.resolve()):
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
