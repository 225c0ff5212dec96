"""How far gradients are off, from a truth in fp64, and the two errors that routed ones are compared with: rounding the exact gradients to
bf16, and rounding the logits to bf16 before the softmax, as many trainers do.

N tokens, D hidden size, V vocabulary, n tokens of a chunk, R rows of a matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.contenders import Outcome
from bench.problem import Problem

ROW_QUANTILES = (0.05, 0.25, 0.5)
TOKEN_QUANTILES = (0.5, 0.9, 0.99)
CHUNK = 128  # tokens
ROWS = 1024  # of a matrix compared at a time, so that the fp64 copies stay in the cache
SMALLEST = 1e-300


def formula_outcomes(
    problem: Problem,
    upstream: dict[str, Tensor],
    dtype: torch.dtype = torch.float64,
    rounding: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Outcome]:
    """Value and gradients by the formulas written out, in `dtype`, for several upstream gradients [N] at once; `rounding` changes the
    logits before the softmax.

    d logprob[n] / d logits[n, j] = (j == target[n]) - p[n, j], and the upstream gradient of a token multiplies its row of d_hidden
    """
    weight_VD, D = problem.weight_VD.to(dtype), problem.weight_VD.shape[1]
    value, rows_ND = [], []
    d_weight = {kind: torch.zeros_like(weight_VD) for kind in upstream}
    for rows in torch.arange(problem.tokens, device=problem.targets_N.device).split(CHUNK):
        hidden_nD, targets_n1 = problem.hidden_ND[rows].to(dtype), problem.targets_N[rows, None]
        logits_nV = hidden_nD @ weight_VD.T
        log_p_nV = (logits_nV if rounding is None else rounding(logits_nV)).log_softmax(1)
        value.append(log_p_nV.gather(1, targets_n1)[:, 0])
        d_logits_nV = log_p_nV.exp_().neg_()
        d_logits_nV.scatter_add_(1, targets_n1, d_logits_nV.new_ones(targets_n1.shape))
        rows_ND.append(d_logits_nV @ weight_VD)
        scaled = torch.cat([g_N[rows, None] * hidden_nD for g_N in upstream.values()], 1)
        for total_VD, part_VD in zip(d_weight.values(), (d_logits_nV.T @ scaled).split(D, 1), strict=True):
            total_VD += part_VD
    value_N, rows_ND = torch.cat(value), torch.cat(rows_ND)
    return {kind: Outcome(value_N, g_N[:, None] * rows_ND, d_weight[kind]) for kind, g_N in upstream.items()}


def to_bf16(logits_nV: Tensor) -> Tensor:
    return logits_nV.bfloat16().to(logits_nV.dtype)


def rounded(true: Outcome) -> Outcome:
    return Outcome(true.value, true.d_hidden_ND.bfloat16(), true.d_weight_VD.bfloat16())


def judge(outcome: Outcome, true: Outcome) -> dict[str, object]:
    """Relative Frobenius errors; the cosines of the rows of d_weight to the true ones, low quantiles first (Adam divides by each row's own
    size, so that its direction is what counts); each token's own error of d_hidden, quantiles."""
    hidden_4R = _row_products(outcome.d_hidden_ND, true.d_hidden_ND)
    weight_4R = _row_products(outcome.d_weight_VD, true.d_weight_VD)
    difference_R, true_R = hidden_4R[:2].sqrt()
    dot_R, sizes_R = weight_4R[2], (weight_4R[1] * weight_4R[3]).sqrt()
    return {
        "error": {"d_hidden": _relative(hidden_4R), "d_weight": _relative(weight_4R)},
        "row_cosine": _quantiles(dot_R / sizes_R.clamp_min(SMALLEST), ROW_QUANTILES),
        "token_error": _quantiles(difference_R / true_R.clamp_min(SMALLEST), TOKEN_QUANTILES),
    }


def _row_products(value_RD: Tensor, true_RD: Tensor) -> Tensor:
    """[4, R] fp64: of each row the squares of difference and truth, value times truth, the square of the value."""
    parts = []
    for value, true in zip(value_RD.split(ROWS), true_RD.split(ROWS), strict=True):
        value, true = value.double(), true.double()
        pairs = ((value - true, value - true), (true, true), (value, true), (value, value))
        parts.append(torch.stack([(a * b).sum(1) for a, b in pairs]))
    return torch.cat(parts, 1)


def _relative(products_4R: Tensor) -> float:
    return float((products_4R[0].sum() / products_4R[1].sum()).sqrt())


def _quantiles(values: Tensor, shares: tuple[float, ...]) -> list[float]:
    return values.quantile(torch.tensor(shares, dtype=values.dtype, device=values.device)).tolist()
