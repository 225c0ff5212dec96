"""Pairwise objectives that look at single tokens: their divergence from the reference, or a weight for each of them.

Letters: P preference pairs; Delta the difference of the log-ratios to the reference of chosen and rejected; K_w, K_l the sums over the
tokens of chosen and rejected of KL(reference || policy), over the whole vocabulary; LS log-sigmoid, S sigmoid.
"""

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.pairwise import dpo


@declare("reference", "reference_kl", source="Zeng et al. 2024, arXiv 2404.11999", systems=("TDPO",))
def tdpo1(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """-LS(beta (Delta - (K_l - K_w))); [P].

    Token-level DPO, first form, Zeng et al. 2024 (arXiv 2404.11999) and the authors' code. Both divergences are differentiated. With
    s = S(-z), z the argument of LS: d/da = -beta s = d/dK_w, d/db = beta s = d/dK_l.
    """
    kl_chosen, kl_rejected = pair.reference_kl
    return -logsigmoid(beta * (pair.margin - (kl_rejected - kl_chosen)))


@declare("reference", "reference_kl", source="Zeng et al. 2024, arXiv 2404.11999", systems=("TDPO",))
def tdpo2(pair: PairLogprob, *, beta: float = 0.1, kl_weight: float = 0.5) -> Tensor:
    """-LS(beta (Delta - kl_weight (K_l - stopgrad(K_w)))); [P].

    Token-level DPO, second form, Zeng et al. 2024 (arXiv 2404.11999), where kl_weight is called alpha; 0.5 is the authors' code's. The
    divergence on the chosen completion is a margin alone. With s = S(-z), z the argument of LS: d/da = -beta s, d/db = beta s,
    d/dK_l = kl_weight beta s, d/dK_w = 0.
    """
    kl_chosen, kl_rejected = pair.reference_kl
    return -logsigmoid(beta * (pair.margin - kl_weight * (kl_rejected - kl_chosen.detach())))


_DPO = make_objective(dpo)
_WEIGHED = _DPO.needs | {"token_weight"}

OBJECTIVES = (
    *(make_objective(function) for function in (tdpo1, tdpo2)),
    # its token_weight is `tokens.guidance_weight` of a frozen reward model's log-ratios
    replace(_DPO, name="tgdpo", needs=_WEIGHED, source="Zhu et al. 2025, arXiv 2506.14574", systems=("TGDPO",)),
    # its token_weight is `tokens.divergent_tokens`; label_smoothing is that of a pair, min(1 - confidence, 1/2)
    replace(_DPO, name="mcts_dpo", needs=_WEIGHED, source="Xie et al. 2024, arXiv 2405.00451", systems=("MCTS-DPO",)),
)
