"""Objectives of single completions, each labelled desirable or not, and the pairwise form of KTO.

Letters: S completions, P preference pairs; a, b log-ratios to the reference of chosen and rejected; l that of a single completion; S
sigmoid, LS log-sigmoid.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import CompletionLogprob, PairLogprob, mean_of_present
from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.unpaired_state import MismatchedMean, RewardMean


@declare(
    "reference",
    "desirable",
    "mismatched",
    source="Ethayarajh et al. 2024, arXiv 2402.01306",
    state=MismatchedMean,
    whole_batch=True,
    instead={"kl": "mismatched"},
)
def kto(
    batch: CompletionLogprob,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: float | None = None,
) -> Tensor:
    """w_D (1 - S(beta (l - kl))) where desirable, w_U (1 - S(beta (kl - l))) elsewhere; [S].

    Kahneman-Tversky optimisation, Ethayarajh et al. 2024 (arXiv 2402.01306), where the weights w_D = desirable_weight and
    w_U = undesirable_weight are lambda_D and lambda_U, and kl is z_0. kl None (default): max(0, mean of `mismatched` over the
    completions of the call that are not empty), without gradient; the state `MismatchedMean` takes the mean over all ranks, as TRL does;
    a number takes its place, and `mismatched` is not needed. With x = beta (l - kl): d/dl = -w_D beta S(x) S(-x) where desirable,
    w_U beta S(x) S(-x) elsewhere.
    """
    kl = mean_of_present(batch.mismatched, batch.present).detach().clamp(min=0) if kl is None else kl
    return _prospect(batch, beta * (batch.log_ratio - kl), desirable_weight, undesirable_weight)


@declare("reference", "desirable", source="D'Oosterlinck et al. 2024, arXiv 2408.06266; TRL")
def apo_zero_unpaired(
    batch: CompletionLogprob, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """w_D (1 - S(beta l)) where desirable, w_U S(beta l) elsewhere; [S].

    `kto` with kl = 0: the two halves of `apo_zero` (D'Oosterlinck et al. 2024, arXiv 2408.06266) on single completions, as in TRL, with
    the weights of KTO. d/dl = -w_D beta S(beta l) S(-beta l) where desirable, w_U beta S(beta l) S(-beta l) elsewhere.
    """
    return _prospect(batch, beta * batch.log_ratio, desirable_weight, undesirable_weight)


@declare(
    "reference", "desirable", source="Jung et al. 2024, arXiv 2404.04656", systems=("DDO",), state=RewardMean
)  # fmt: skip
def bco_unpaired(batch: CompletionLogprob, *, beta: float = 0.1, baseline: float = 0.0) -> Tensor:
    """-LS(beta l - baseline) where desirable, -LS(baseline - beta l) elsewhere; [S].

    Binary classifier optimisation, Jung et al. 2024 (arXiv 2404.04656), where baseline is delta, the mean of beta l: the state
    `RewardMean` keeps it. Their density-ratio weights of undesirable completions (UDM) go in as sample_weight. With baseline 0,
    completions of the data as desirable and those of the reference as undesirable it is the loss of DDO (Zheng et al. 2025,
    arXiv 2503.01103), whose weight of the second goes in as sample_weight. d/dl = -beta S(baseline - beta l) where desirable,
    beta S(beta l - baseline) elsewhere.
    """
    reward_S = beta * batch.log_ratio - baseline
    return -logsigmoid(torch.where(batch.desirable, reward_S, -reward_S))


@declare("reference", source="Ethayarajh et al. 2024, arXiv 2402.01306; SPPO and OpenRLHF", whole_batch=True)
def kto_pair(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """(2 - S(beta (a - K_l)) - S(beta (K_w - b))) / 2, K_w = max(0, mean a), K_l = max(0, mean b) over the batch; [P].

    KTO of pairs with the KL divergence of one half estimated on the other, of Ethayarajh et al.'s first report, as in SPPO's code and
    OpenRLHF's `VanillaKTOLoss`, which average over the 2P completions: hence the half. As there, K_w and K_l are differentiated and not
    reduced over ranks; pairs with an empty completion are left out of the means. For the loss of P pairs with x_i = beta (a_i - K_l),
    y_i = beta (K_w - b_i): d/da_i = -beta S'(x_i) / 2 - [K_w >= 0] beta mean(S'(y)) / 2, d/db_i = beta S'(y_i) / 2 + [K_l >= 0] beta
    mean(S'(x)) / 2, each over P, the brackets 1 where the mean itself is at
    least 0: at a mean of 0, where policy and reference agree, the maximum passes the gradient.
    """
    a, b = pair.log_ratio
    kl_chosen, kl_rejected = (mean_of_present(ratio_P, pair.present).clamp(min=0) for ratio_P in (a, b))
    return (torch.sigmoid(beta * (kl_rejected - a)) + torch.sigmoid(beta * (b - kl_chosen))) / 2


def _prospect(batch: CompletionLogprob, scaled_S: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    loss_S = torch.sigmoid(torch.where(batch.desirable, -scaled_S, scaled_S))
    return torch.where(batch.desirable, desirable_weight * loss_S, undesirable_weight * loss_S)


OBJECTIVES = tuple(make_objective(function) for function in (kto, apo_zero_unpaired, bco_unpaired, kto_pair))
