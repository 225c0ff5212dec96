"""Pairwise objectives: pure functions of a `PairLogprob` that return one loss a pair.

Letters: P preference pairs; a, b log-ratios to the reference of chosen and rejected; Delta = a - b; S sigmoid, LS
log-sigmoid. All log-probs are sums over the scored tokens of a completion unless a docstring says mean.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.objective import declare, make_objective


@declare("reference", source="Rafailov et al. 2023, arXiv 2305.18290")
def dpo(pair: PairLogprob, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) LS(beta Delta) - e LS(-beta Delta), e = label_smoothing; [P].

    Direct preference optimisation, Rafailov et al. 2023 (arXiv 2305.18290). e > 0 is their conservative cDPO: labels
    are wrong with probability e. d/da = beta (S(beta Delta) - (1 - e)) = -d/db.
    """
    scaled_P = beta * pair.margin
    return -(1 - label_smoothing) * logsigmoid(scaled_P) - label_smoothing * logsigmoid(-scaled_P)


@declare("reference", source="Azar et al. 2023, arXiv 2310.12036")
def ipo(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """(Delta - 1 / (2 beta))^2 of sums; [P].

    Identity preference optimisation, Azar et al. 2023 (arXiv 2310.12036), where beta is called tau. The form of its
    paper, of the original DPO code and of IS-DAA; TRL and LLaMA-Factory divide by length first: that is `ipo_mean`.
    d/da = 2 (Delta - 1 / (2 beta)) = -d/db.
    """
    return (pair.margin - 1 / (2 * beta)).square()


@declare("reference", "lengths", source="Azar et al. 2023, arXiv 2310.12036")
def ipo_mean(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """(a / |chosen| - b / |rejected| - 1 / (2 beta))^2: `ipo` of mean log-ratios, nats per scored token; [P].

    The form of TRL (from 1.0) and LLaMA-Factory. With r = a / |chosen| - b / |rejected| - 1 / (2 beta):
    d/da = 2 r / |chosen|, d/db = -2 r / |rejected|.
    """
    mean_a, mean_b = pair.mean_log_ratio
    return (mean_a - mean_b - 1 / (2 * beta)).square()


@declare("reference", source="Liu et al. 2023, arXiv 2309.06657")
def slic(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta Delta); [P].

    The hinge of SLiC on log-ratios ("hinge-norm"), Liu et al. 2023 (RSO, arXiv 2309.06657); `hinge` in TRL and
    LLaMA-Factory. d/da = -beta where beta Delta < 1 and 0 elsewhere = -d/db.
    """
    return torch.relu(1 - beta * pair.margin)


OBJECTIVES = tuple(make_objective(function) for function in (dpo, ipo, ipo_mean, slic))
