"""A small table of contenders for the tests of `bench.gpu_report`: good ones, and ones that go wrong in every way there is."""

import os
import time

import torch

from bench.contenders import Contender, dense, ours, ours_preference
from bench.gpu.contenders import tight_workspace
from bench.gpu.entry import CURVE, DIVERGENCE, FIRST, FROZEN, LONG, PAIR, Entry
from bench.gpu.two_heads import make_entries
from isdaa_kernels.testing import dense_logprob


def _spoil(change):
    """A contender of dense log-probs that `change(value, problem)` spoils."""

    def prepare(problem):
        return lambda hidden, weight: change(dense_logprob(hidden, weight, problem.targets_N), problem)

    return prepare


def _explode(value, problem):
    raise FloatingPointError("no luck\nat all")


def _run_out_of_memory(value, problem):
    raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 EiB.")


def _exit(value, problem):
    print("printed where nobody listens", flush=True)
    os.write(2, b"a last word\n")
    os._exit(5)


def _hang(value, problem):
    time.sleep(1000)


def _late(value, problem):
    """Right on what the gate looks at, wrong on the whole problem."""
    return value * 1.5 if problem.tokens > 32 else value


SPOILERS = {
    "wrong": lambda value, problem: value * 1.2,
    "wrong late": _late,
    "raises": _explode,
    "no memory": _run_out_of_memory,
    "exits": _exit,
    "hangs": _hang,
}


def make_contenders(settings) -> tuple[Entry, ...]:
    absent = Contender("absent", "absent", dense, "no_such_package.part:Thing")
    peers = [Contender(name, name, _spoil(change)) for name, change in SPOILERS.items()]
    everywhere = frozenset({FIRST, FROZEN, CURVE, LONG})
    return (
        Entry(Contender("ours (cpu)", "isdaa", ours(backend="cpu")), everywhere, "cpu"),
        Entry(
            Contender("ours (cpu), tight", "isdaa_tight", ours(backend="cpu")),
            frozenset({LONG}),
            "cpu",
            tight_workspace,
        ),
        *(Entry(contender, frozenset({FIRST})) for contender in (*peers, absent)),
        Entry(Contender("dense", "torch", dense, note="a peer"), everywhere),
        Entry(
            Contender("ours (reference)", "isdaa_reference", ours(backend="reference")), frozenset({FIRST}), "reference"
        ),
        *(entry for entry in make_entries(("cpu", "cuda"), ("cpu",)) if entry.backend and DIVERGENCE in entry.groups),
        Entry(
            Contender("ours (cpu) IS-DPO", "isdaa", ours_preference("is_dpo", backend="cpu"), None, "is_dpo"),
            frozenset({PAIR}),
            "cpu",
        ),
    )
