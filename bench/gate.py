"""The gate: no contender is timed before its values and gradients agree with a truth in fp64.

N tokens, V vocabulary, S sequences, P pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import BETA, Contender, Outcome
from bench.problem import Problem
from isdaa_kernels.testing import relative_error

EPSILON = 1.0  # of the clipped importance weight, the library's default
# Rounding costs about 1e-6 in fp32; peers that round the logits to 16 bits lose 2e-2. A wrong formula loses far more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}


def truth(problem: Problem, objective: str | None = None, chunk: int = 128) -> Outcome:
    """Value and gradients in fp64 from the same inputs, by the formulas written out, `chunk` tokens at a time:

    d logprob[n] / d logits[n, j] = (j == target[n]) - p[n, j]
    """
    weight_VD = problem.weight_VD.double()
    value, upstream_N = true_value(problem, weight_VD, objective, chunk)
    d_weight_VD, d_hidden = torch.zeros_like(weight_VD), []
    for rows in torch.arange(problem.tokens, device=problem.targets_N.device).split(chunk):
        hidden_nD = problem.hidden_ND[rows].double()
        d_logits_nV = (hidden_nD @ weight_VD.T).softmax(1).neg_()
        d_logits_nV[rows - rows[0], problem.targets_N[rows]] += 1
        d_logits_nV *= upstream_N[rows, None]
        d_hidden.append(d_logits_nV @ weight_VD)
        d_weight_VD.addmm_(d_logits_nV.T, hidden_nD)
    return Outcome(value, torch.cat(d_hidden), d_weight_VD)


def true_value(problem: Problem, weight_VD: Tensor, objective: str | None, chunk: int) -> tuple[Tensor, Tensor]:
    """The value in fp64, and its gradient [N] with respect to the token log-probs. weight_VD: the head in fp64."""
    value = _logprob(problem.hidden_ND, weight_VD, problem, chunk)
    if objective is None:
        return value, problem.upstream_N.double()
    if objective == "sum":
        return -value.sum(), torch.full_like(value, -1)
    reference_N = _logprob(problem.reference_hidden_ND, weight_VD, problem, chunk)
    return _loss_and_coefficients(value, reference_N, problem, objective)


def _logprob(hidden_ND: Tensor, weight_VD: Tensor, problem: Problem, chunk: int) -> Tensor:
    parts = []
    for hidden_nD, targets_n in zip(hidden_ND.split(chunk), problem.targets_N.split(chunk), strict=True):
        logits_nV = hidden_nD.double() @ weight_VD.T
        parts.append(logits_nV.gather(1, targets_n[:, None])[:, 0] - logits_nV.logsumexp(1))
    return torch.cat(parts)


def _loss_and_coefficients(
    policy_N: Tensor, reference_N: Tensor, problem: Problem, objective: str
) -> tuple[Tensor, Tensor]:
    """Loss and its gradient [N] with respect to the token log-probs."""
    policy_N = policy_N.detach().requires_grad_()
    ratio_S = (policy_N - reference_N).view(problem.sequences, problem.length).sum(1)
    chosen_P, rejected_P = ratio_S.split(problem.pairs)
    loss_P = -F.logsigmoid(BETA * (chosen_P - rejected_P))
    if objective == "is_dpo":
        loss_P = loss_P * (chosen_P + rejected_P).detach().clamp(max=2 * EPSILON).exp()
    loss = loss_P.mean()
    return loss.detach(), torch.autograd.grad(loss, policy_N)[0]


def errors(outcome: Outcome, true: Outcome) -> dict[str, float]:
    """Relative Frobenius error of each part the contender made."""
    names = ("value", "d_hidden", "d_weight")
    return {n: relative_error(a, b) for n, a, b in zip(names, outcome, true, strict=True) if a is not None}


def bar_of(contender: Contender, problem: Problem) -> float:
    """The relative error that it may have."""
    return contender.bar or TOLERANCE[problem.hidden_ND.dtype]


def red(contender: Contender, problem: Problem, mode: str, outcome: Outcome, found: dict[str, float]) -> str | None:
    """The sentence that keeps a contender from being measured, or None if the gate is green."""
    expected = (
        {"value"} if mode == "forward" else {"value", "d_hidden"} | (set() if problem.frozen_head else {"d_weight"})
    )
    if found.keys() != expected:
        return f"{contender.name}: expected {sorted(expected)}, got {sorted(found)}"
    if outcome.value.shape != (problem.targets_N.shape if contender.gives_tokens else ()):
        return f"{contender.name}: value of shape {list(outcome.value.shape)}"
    bar = bar_of(contender, problem)
    wrong = [f"{name} off by {error:.1e}" for name, error in found.items() if not error <= bar]
    return f"{contender.name}: {', '.join(wrong)} (bar {bar:.0e})" if wrong else None
