"""The contenders in rows of two models of one head: divergences between policy and reference over the vocabulary, and the head of a GRPO
step. Their functions are those of `bench.linear_kl` and `bench.grpo_work`.

N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import grpo_work, linear_kl
from bench.contenders import DIVERGENCES, LIGER, TRL, TRL_CHUNK, Contender, Function
from bench.gpu.entry import DIVERGENCE, LATE_STEP, STEP, Entry
from bench.grpo_work import CASES
from bench.problem import Problem

# Relative errors, of divergences near 0.1. Outputs in bf16 cost 2e-3. Logits rounded to bf16 are off by up to 0.06 where the models differ
# by 0.5: 0.02 to 0.11 of the divergence and of its gradient. That of the other direction differs by 0.24 to 0.3. In a step the divergence
# is 0.5 % of the gradient and 1 % of the loss: a step without it is seen by a bar below that, so ours has one.
BAR, ROUNDED_BAR, OUR_STEP_BAR = linear_kl.BAR, 0.15, 4e-3
STEPS = {"grpo_kl": CASES["full-kl"], "grpo": CASES["loss"]}  # objective -> what the step does
DIRECTIONS = {**DIVERGENCES, "grpo_kl": "reverse"}  # objective -> that of the divergence which costs the most in it
NAMES = {"reverse_kl": "reverse KL", "jsd": "JSD", "grpo_kl": "GRPO, exact KL", "grpo": "GRPO, k3"}


def make_entries(names: Sequence[str], step_names: Sequence[str]) -> tuple[Entry, ...]:
    """names: the backends for divergences, the best first; step_names: those for a step with an exact one."""
    return (
        *(_our_divergence("reverse_kl", name, name == names[0], DIVERGENCE) for name in names),
        *_DIVERGENCE_PEERS,
        _our_step("grpo_kl", step_names[0]),
        *_STEP_PEERS["grpo_kl"],
        _our_divergence("jsd", names[0], True, STEP),
        _trl_divergence("jsd", STEP),
        _our_step("grpo", names[0]),
        *_STEP_PEERS["grpo"],
    )


def _our_divergence(objective: str, backend: str, best: bool, group: str) -> Entry:
    prepare = _divergence(linear_kl.ours, objective, backend=backend)
    provider = "isdaa" if best else f"isdaa_{backend}"
    return _entry(f"ours ({backend})", provider, objective, prepare, group, "linear_kl, default plan", BAR, backend)


def _our_step(objective: str, backend: str) -> Entry:
    prepare = _step(grpo_work.ours(backend=backend), objective)
    note = "linear_policy_loss" + (', kl_direction="reverse"' if objective == "grpo_kl" else "")
    return _entry(f"ours ({backend})", "isdaa", objective, prepare, STEP, note, OUR_STEP_BAR, backend)


def _trl_divergence(objective: str, group: str) -> Entry:
    note = "ChunkedDivergenceFunction, tiles of 4096 x 32768; fp32 logits, recomputing backward"
    prepare = _divergence(linear_kl.trl, objective)
    return _entry("TRL chunked", "trl", objective, prepare, group, note, BAR, needs=_TRL_DIVERGENCE)


def _entry(
    name: str,
    provider: str,
    objective: str,
    prepare: Callable[[Problem], Function],
    group: str,
    note: str,
    bar: float | None,
    backend: str | None = None,
    needs: str | None = None,
) -> Entry:
    contender = Contender(f"{name} {NAMES[objective]}", provider, prepare, needs, objective, note, bar)
    return Entry(contender, frozenset({group}), backend)


def _divergence(function: linear_kl.Function, objective: str, **kernel: object) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        return lambda hidden_ND, weight_VD: function(hidden_ND, weight_VD, problem, DIVERGENCES[objective], **kernel)

    return prepare


def _step(prepare: Callable, objective: str) -> Callable[[Problem], Function]:
    return lambda work: prepare(work, STEPS[objective])


def _dense_reverse(problem: Problem) -> Function:
    def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = (problem.reference_hidden_ND @ problem.weight_VD.T).float().log_softmax(-1)
        log_p = (hidden_ND @ weight_VD.T).float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return function


_TRL_DIVERGENCE = "trl.kernels.chunked_divergence:ChunkedDivergenceFunction"
_DENSE_NOTE = "(hidden @ weight.T).float().log_softmax(-1) of both models, the formula written out, autograd"
_DIVERGENCE_PEERS = (
    _trl_divergence("reverse_kl", DIVERGENCE),
    _entry("dense PyTorch", "torch", "reverse_kl", _dense_reverse, DIVERGENCE, _DENSE_NOTE, ROUNDED_BAR),
)
_TRL_NOTE = f"the loss in PyTorch around ChunkedLogProbFunction, tiles of 4096 x {TRL_CHUNK}, bf16 logits"
_STEP_PEERS = {
    "grpo_kl": (
        _entry(
            "TRL chunked",
            "trl",
            "grpo_kl",
            _step(grpo_work.trl, "grpo_kl"),
            STEP,
            f"{_TRL_NOTE}, and ChunkedDivergenceFunction",
            None,
            needs=_TRL_DIVERGENCE,
        ),
        _entry("dense PyTorch", "torch", "grpo_kl", _step(grpo_work.dense, "grpo_kl"), STEP, _DENSE_NOTE, None),
    ),
    "grpo": (
        _entry("TRL chunked", "trl", "grpo", _step(grpo_work.trl, "grpo"), STEP, _TRL_NOTE, None, needs=TRL),
        _entry(
            "Liger",
            "liger",
            "grpo",
            _step(grpo_work.of_liger(grpo_work.liger_class), "grpo"),
            LATE_STEP,  # it may compile for a minute
            "LigerFusedLinearGRPOLoss, compiled, one completion a chunk: its whole logits",
            None,
            needs=LIGER,
        ),
    ),
}
