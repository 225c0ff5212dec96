"""Who takes part on a device, and in which rows. The functions of the peers are those of `bench.contenders`.

A peer that gives only a scalar gets minus the sum of all log-probs to make, a coefficient of -1 for every token: the same work.
N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.contenders import (
    FUSED,
    LIGER,
    TRL,
    TRL_CHUNK,
    Contender,
    Function,
    dense,
    dpo_of,
    liger_dpo,
    ours,
    ours_preference,
    pytorch_fused,
    trl,
)
from bench.gpu import two_heads
from bench.gpu.entry import CURVE, FIRST, FROZEN, LAST, LATE_PAIR, LONG, OTHERS, PAIR, Entry
from bench.gpu.settings import Settings
from bench.problem import Problem
from isdaa_kernels import Problem as KernelProblem
from isdaa_kernels import Routed, explain_backends, plan
from isdaa_kernels.dispatch import refusal
from isdaa_kernels.divergence import Divergence

TIGHT_MIB, TIGHT_TOKEN_BYTES = 512, 64  # the workspace of the two-pass plan
EVERYWHERE = frozenset({FIRST, OTHERS, CURVE, FROZEN})


def make_contenders(settings: Settings) -> tuple[Entry, ...]:
    """In the order in which they are measured; `ours` stands first, on the backend that the library would choose."""
    names = find_backends(settings)
    best = names[0]
    return (
        Entry(_our(best, "isdaa"), EVERYWHERE | {LONG}, best),
        Entry(_tight(best), frozenset({LONG}), best, tight_workspace),
        Entry(_routed(best), frozenset({FIRST, OTHERS}), best),
        *_PEERS,
        *_our_pairs(best),
        *_PAIR_PEERS,
        *two_heads.make_entries(find_backends(settings, logprobs=False), find_backends(settings, logprobs=True)),
        *(Entry(_our(name, f"isdaa_{name}"), frozenset({FIRST, LAST}), name) for name in names[1:]),
    )


def find_backends(settings: Settings, logprobs: bool | None = None) -> list[str]:
    """The backends that take the first problem, the library's own choice first. Raises `NoBackend` where there is none.

    logprobs: the order for divergences, with log-probs beside them or without. Those that take them stand first; "reference", which no
    one is given in silence, stands behind those that refuse."""
    N, D, V = settings.problem_set.shapes[0]
    best = plan(N, V, D, torch.bfloat16, device=settings.device).backend
    takes = [line.split(":")[0] for line in describe_backends(settings) if line.endswith("takes it")]
    names = [best, *(name for name in takes if name != best)]
    if logprobs is None:
        return names
    divergence = Divergence("reverse", 0.5, D, torch.bfloat16, torch.bfloat16, logprobs)
    problem = replace(_first_problem(settings), divergence=divergence)
    return sorted(names, key=lambda name: name == "reference" or refusal(name, problem) is not None)


def describe_backends(settings: Settings) -> list[str]:
    """What every backend says to the first problem, a line each."""
    return explain_backends(_first_problem(settings)).splitlines()


def _first_problem(settings: Settings) -> KernelProblem:
    small = torch.empty(1, 1, dtype=torch.bfloat16, device=settings.device)
    return replace(KernelProblem.of(small, small, 1), **settings.problem_set.shapes[0]._asdict())


def tight_workspace(tokens: int) -> float:
    """MiB that leave no room for an fp32 d_hidden of a long batch."""
    return TIGHT_MIB + TIGHT_TOKEN_BYTES * tokens / 2**20


def _our(backend: str, provider: str) -> Contender:
    return Contender(f"ours ({backend})", provider, ours(backend=backend), note="linear_logprob, default plan")


def _tight(backend: str) -> Contender:
    def prepare(problem: Problem) -> Function:
        return ours(backend=backend, max_workspace_mb=tight_workspace(problem.tokens))(problem)

    note = f"linear_logprob, max_workspace_mb = {TIGHT_MIB} + {TIGHT_TOKEN_BYTES} bytes a token"
    return Contender(f"ours ({backend}), tight", "isdaa_tight", prepare, note=note)


def _routed(backend: str) -> Contender:
    """In the natural order: the rows of a head of independent normal numbers have no better one."""
    prepare = ours(backend=backend, gradient=Routed())
    return Contender(f"ours ({backend}), routed", "isdaa_routed", prepare, note="gradient=Routed(), natural order")


def _our_pairs(backend: str) -> list[Entry]:
    note = "linear_preference_loss, reference forward of the same head included"
    return [
        Entry(
            Contender(f"ours ({backend}) {name}", provider, prepare, None, objective, note), frozenset({PAIR}), backend
        )
        for name, provider, objective, prepare in (
            ("DPO", "isdaa", "dpo", ours_preference("dpo", backend=backend)),
            ("IS-DPO", "isdaa_is", "is_dpo", ours_preference("is_dpo", backend=backend)),
        )
    ]


def _dense_rounded(problem: Problem) -> Function:
    def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        logprob_NV = (hidden_ND @ weight_VD.T).float().log_softmax(-1)
        return logprob_NV.gather(-1, problem.targets_N[:, None])[:, 0]

    return function


def _liger(reduction: str) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        options = (None, None, -100, 0.0, 0.0, reduction)  # bias, class weights, ignore_index, z-loss, smoothing

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            loss = LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, weight_VD, problem.targets_N, *options)[0]
            return loss if reduction == "sum" else -loss  # it scales the gradients unless their coefficient is 1

        return function

    return prepare


def _liger_scaled(problem: Problem) -> Function:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden_ND, weight_VD, problem.targets_N)

    return function


def _cce(exact: bool) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

        options = {"impl": "cce", "filter_eps": None} if exact else {"impl": "cce"}
        if exact and hasattr(LinearCrossEntropyImpl, "CCE_EXACT"):
            options = {"impl": "cce_exact"}

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            return -linear_cross_entropy(hidden_ND, weight_VD, problem.targets_N, reduction="none", **options)

        return function

    return prepare


_FLCE = "liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction"
_SCALED = "liger_kernel.ops.fused_linear_scaled_cross_entropy:LigerFusedLinearScaledCrossEntropyFunction"
_CCE = "cut_cross_entropy:linear_cross_entropy"
_CCE_NOTE = "linear_cross_entropy, reduction none; backward recomputes the logits, adds gradients in bf16 under locks"

_PEERS = (
    Entry(
        Contender(
            "TRL chunked",
            "trl",
            trl,
            TRL,
            note=f"ChunkedLogProbFunction, tiles of 4096 x {TRL_CHUNK} as its trainers use; bf16 logits, recomputing backward",
        ),
        EVERYWHERE | {LONG},
    ),
    Entry(
        Contender(
            "CCE exact",
            "cce_exact",
            _cce(exact=True),
            _CCE,
            note=f"{_CCE_NOTE}; cce_exact, or filter_eps=None before it",
        ),
        EVERYWHERE | {LONG},
    ),
    Entry(
        Contender("CCE", "cce", _cce(exact=False), _CCE, note=f"{_CCE_NOTE}; blocks of small gradient are left out"),
        EVERYWHERE,
    ),
    Entry(
        Contender(
            "Liger FLCE, sum",
            "liger",
            _liger("sum"),
            _FLCE,
            "sum",
            "a scalar only: equal coefficients. Gradients are made in the forward, d_weight added in bf16; without gradients "
            "wanted the forward makes none; waits for the device",
        ),
        EVERYWHERE,
    ),
    Entry(
        Contender(
            "Liger FLCE, none",
            "liger_none",
            _liger("none"),
            _FLCE,
            note="a loss for each token: the backward goes through the whole forward once more, d_weight added in bf16",
        ),
        frozenset({FIRST}),
    ),
    Entry(
        Contender(
            "Liger scaled CE",
            "liger_scaled",
            _liger_scaled,
            _SCALED,
            note="on Hopper a CuTe kernel, which needs nvidia-cutlass-dsl; elsewhere PyTorch in chunks of 512 tokens",
        ),
        EVERYWHERE,
    ),
    Entry(
        Contender(
            "PyTorch fused", "torch_fused", pytorch_fused(), FUSED, note="F.linear_cross_entropy, reduction none"
        ),
        EVERYWHERE,
    ),
    Entry(
        Contender(
            "dense PyTorch",
            "torch",
            _dense_rounded,
            note="(hidden @ weight.T).float().log_softmax(-1), gather, autograd",
        ),
        EVERYWHERE,
    ),
    Entry(
        Contender(
            "dense PyTorch in fp32", "torch_fp32", dense, note="inputs widened, fp32 product without TF32, autograd"
        ),
        frozenset({FIRST}),
    ),
)
_PAIR_PEERS = (
    Entry(
        Contender("TRL chunked DPO", "trl", dpo_of(trl), TRL, "dpo", "DPO around ChunkedLogProbFunction"),
        frozenset({PAIR}),
    ),
    Entry(
        Contender("dense PyTorch DPO", "torch", dpo_of(_dense_rounded), None, "dpo", "DPO around dense log-probs"),
        frozenset({PAIR}),
    ),
    Entry(
        Contender(
            "Liger DPO",
            "liger",
            liger_dpo,
            LIGER,
            "dpo",
            "LigerFusedLinearDPOLoss, compiled, one pair a chunk: its whole logits",
        ),
        frozenset({LATE_PAIR}),  # it may compile for a minute
    ),
)
