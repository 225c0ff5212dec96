"""Pairwise objectives on the policy's own log-probs: no reference model.

Letters: P preference pairs; logp_w, logp_l, logp_g log-probs of the chosen, the rejected and the gold completion under the policy, sums
over scored tokens; m_w, m_l, m_g the same in nats per scored token; S sigmoid, LS log-sigmoid. Gradients are by these, those by m to be
divided by the length for those by logp.

A reference that the caller gives for the metrics does not enter the loss, which is why `pair.margin` is not used. Terms that imitate a
completion take the mean over its tokens, pair by pair; where another library takes the mean over all tokens of the batch, mix with
`imitation.sft` instead.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import Gold, PairLogprob
from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.options import MAX_EXPONENT
from isdaa_kernels.objectives.pairwise import logistic

# Nats per token: what fp32 leaves of a log-prob nearer to 0 is rounding, and the odds of a completion of probability 1 are infinite.
LARGEST_MEAN = -1e-6


@declare(source="Zhao et al. 2023, arXiv 2305.10425")
def slic_hf(pair: PairLogprob, *, margin: float = 1.0, sft_weight: float = 0.1) -> Tensor:
    """max(0, margin - logp_w + logp_l) - sft_weight logp_w; [P].

    Sequence likelihood calibration from human feedback, SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425), where margin is delta and sft_weight
    lambda; they may regularise with another target than the chosen completion. The defaults are those of HALOs, which calls margin beta and
    leaves the second term token by token; here it is the sum. d/dlogp_w = -1 - sft_weight and d/dlogp_l = 1 where logp_w - logp_l < margin,
    -sft_weight and 0 elsewhere. TRL's `hinge` is `slic`, on log-ratios.
    """
    chosen_P, rejected_P = pair.policy
    return torch.relu(margin - chosen_P + rejected_P) - sft_weight * chosen_P


@declare("lengths", source="Xu et al. 2024, arXiv 2401.08417")
def cpo(pair: PairLogprob, *, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 1.0) -> Tensor:
    """-(1 - e) LS(z) - e LS(-z) - sft_weight m_w, z = beta (logp_w - logp_l), e = label_smoothing; [P].

    Contrastive preference optimisation, Xu et al. 2024 (arXiv 2401.08417): DPO with a uniform reference, and imitation of the chosen
    completion. The defaults are TRL's, where sft_weight is cpo_alpha; the paper has the sum logp_w in the place of m_w, TRL the mean over
    the chosen tokens of the whole batch. d/dlogp_w = beta (S(z) - (1 - e)) - sft_weight / |chosen|, d/dlogp_l = beta ((1 - e) - S(z)).
    """
    return logistic(beta * pair.policy.difference, label_smoothing) - sft_weight * pair.mean_policy.chosen


@declare("lengths", source="TRL")
def cpo_hinge(pair: PairLogprob, *, beta: float = 0.1, sft_weight: float = 1.0) -> Tensor:
    """max(0, 1 - beta (logp_w - logp_l)) - sft_weight m_w; [P].

    `cpo` with the hinge for the logistic loss, as in TRL's CPO with loss_type `hinge`. d/dlogp_w = -beta - sft_weight / |chosen| and
    d/dlogp_l = beta where beta (logp_w - logp_l) < 1, -sft_weight / |chosen| and 0 elsewhere.
    """
    return torch.relu(1 - beta * pair.policy.difference) - sft_weight * pair.mean_policy.chosen


@declare("lengths", source="TRL")
def cpo_ipo(pair: PairLogprob, *, beta: float = 0.1, sft_weight: float = 1.0) -> Tensor:
    """(m_w - m_l - 1 / (2 beta))^2 - sft_weight m_w, of mean log-probs; [P].

    `cpo` with the square for the logistic loss, as in TRL's CPO with loss_type `ipo`, which takes means for it.
    With r = m_w - m_l - 1 / (2 beta): d/dm_w = 2 r - sft_weight, d/dm_l = -2 r.
    """
    return (pair.mean_policy.difference - 1 / (2 * beta)).square() - sft_weight * pair.mean_policy.chosen


@declare("lengths", source="Meng et al. 2024, arXiv 2405.14734", systems=("SimPO",))
def simpo(
    pair: PairLogprob,
    *,
    beta: float = 2.0,
    margin: float = 0.5,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """-(1 - e) LS(u) - e LS(-u) - sft_weight m_w, u = beta (m_w - m_l) - margin, e = label_smoothing; [P].

    Simple preference optimisation, Meng et al. 2024 (arXiv 2405.14734). The defaults are those of the authors' code, which gives the margin
    gamma as gamma_beta_ratio = margin / beta = 0.25; their tuned settings are beta = 2 to 10, margin / beta = 0.1 to 0.8. TRL (in its CPO)
    and LLaMA-Factory take the margin as simpo_gamma = 0.5, at beta = 0.1. With f = S(u) - (1 - e): d/dm_w = beta f - sft_weight,
    d/dm_l = -beta f. sft_weight > 0 is "CPO-SimPO"; the authors and TRL take the mean over all chosen tokens of the batch there.
    """
    scaled_P = beta * pair.mean_policy.difference - margin
    return logistic(scaled_P, label_smoothing) - sft_weight * pair.mean_policy.chosen


@declare("lengths", source="Meng et al. 2024, arXiv 2405.14734")
def simpo_hinge(pair: PairLogprob, *, beta: float = 2.0, margin: float = 0.5, sft_weight: float = 0.0) -> Tensor:
    """max(0, 1 - u) - sft_weight m_w, u = beta (m_w - m_l) - margin; [P].

    `simpo` with the hinge, loss_type `hinge` of its authors' code. d/dm_w = -beta - sft_weight and d/dm_l = beta where u < 1,
    -sft_weight and 0 elsewhere.
    """
    return torch.relu(1 + margin - beta * pair.mean_policy.difference) - sft_weight * pair.mean_policy.chosen


@declare("lengths", source="Gupta et al. 2025, arXiv 2501.03884")
def alphapo(
    pair: PairLogprob, *, beta: float = 2.0, alpha: float = 0.25, margin: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) LS(u) - e LS(-u), u = beta (r_w - r_l) - margin, r = (1 - exp(-alpha m)) / alpha, e = label_smoothing; [P].

    AlphaPO, Gupta et al. 2025 (arXiv 2501.03884): SimPO with another shape of the reward; alpha near 0 is `simpo`. In TRL's CPO it is
    loss_type `alphapo`, where alpha is off (0) unless given. alpha = 0.25 as the paper has it in most settings (our reading), the rest as
    in `simpo`. With f = S(u) - (1 - e): d/dm_w = beta exp(-alpha m_w) f, d/dm_l = -beta exp(-alpha m_l) f. The exponent -alpha m is at
    most 80, with gradient 0 beyond.
    """
    chosen_P, rejected_P = (
        -torch.expm1((-alpha * mean_P).clamp(max=MAX_EXPONENT)) / alpha for mean_P in pair.mean_policy
    )
    return logistic(beta * (chosen_P - rejected_P) - margin, label_smoothing)


@declare("lengths", source="Hong et al. 2024, arXiv 2403.07691")
def orpo(pair: PairLogprob, *, odds_weight: float = 0.1, sft_weight: float = 1.0) -> Tensor:
    """-sft_weight m_w - odds_weight LS(o_w - o_l), o = m - log(1 - exp(m)) the log-odds of m; [P].

    Odds ratio preference optimisation, Hong et al. 2024 (arXiv 2403.07691). odds_weight is their lambda, and beta in TRL, LLaMA-Factory and
    Liger, whose default it has; it does not scale the margin, so it is not called so here. The first term is LLaMA-Factory's; TRL takes the
    mean over prompt and completion tokens of all chosen sequences. With f = odds_weight S(o_l - o_w): d/dm_w = -sft_weight - f / (1 -
    exp(m_w)), d/dm_l = f / (1 - exp(m_l)). Of m above -1e-6 the log-odds are those of -1e-6, with gradient 0.
    """
    chosen_P, rejected_P = _log_odds(pair)
    return -sft_weight * pair.mean_policy.chosen - odds_weight * logsigmoid(chosen_P - rejected_P)


@declare("lengths", source="Gorbatovski et al. 2025, arXiv 2502.01237")
def orpo_align(pair: PairLogprob, *, beta: float = 1.0) -> Tensor:
    """-LS(beta (o_w - o_l)), o = m - log(1 - exp(m)) the log-odds of m; [P].

    The second term of `orpo` by itself, with a scale, for training after a phase of imitation: Gorbatovski et al. 2025 (arXiv 2502.01237),
    who tune beta; 1 is the scale in ORPO. With z = beta (o_w - o_l): d/dm_w = -beta S(-z) / (1 - exp(m_w)), d/dm_l = beta S(-z) / (1 -
    exp(m_l)). The bound of m is that of `orpo`.
    """
    chosen_P, rejected_P = _log_odds(pair)
    return -logsigmoid(beta * (chosen_P - rejected_P))


@declare("lengths", source="Wang et al. 2024, arXiv 2409.10571", systems=("ASFT",))
def asft(pair: PairLogprob, *, odds_weight: float = 1.0, sft_weight: float = 1.0) -> Tensor:
    """-sft_weight m_w - odds_weight (LS(o_w) + LS(-o_l)), o = m - log(1 - exp(m)) the log-odds of m; [P].

    Aligned supervised fine-tuning, Wang et al. 2024 (arXiv 2409.10571). As LS(o) = m and LS(-o) = log(1 - exp(m)), it is -(sft_weight +
    odds_weight) m_w - odds_weight log(1 - exp(m_l)): d/dm_w = -(sft_weight + odds_weight), d/dm_l = odds_weight exp(m_l) / (1 - exp(m_l)).
    odds_weight is their lambda, and `beta` in turbo-alignment, 0.1 there. The bound of m is that of `orpo`. Not the anchored SFT of the
    same letters.
    """
    chosen_P, rejected_P = _log_odds(pair)
    return -sft_weight * pair.mean_policy.chosen - odds_weight * (logsigmoid(chosen_P) + logsigmoid(-rejected_P))


@declare("lengths", source="Gorbatovski et al. 2025, arXiv 2502.01237")
def asft_align(pair: PairLogprob, *, beta: float = 1.0) -> Tensor:
    """-LS(beta o_w) - LS(-beta o_l), o = m - log(1 - exp(m)) the log-odds of m; [P].

    The second term of `asft` by itself, with a scale, for training after a phase of imitation: Gorbatovski et al. 2025 (arXiv 2502.01237),
    who tune beta; 1 is the scale in ASFT. d/dm_w = -beta S(-beta o_w) / (1 - exp(m_w)), d/dm_l = beta S(beta o_l) / (1 - exp(m_l)).
    The bound of m is that of `orpo`.
    """
    chosen_P, rejected_P = _log_odds(pair)
    return -logsigmoid(beta * chosen_P) - logsigmoid(-beta * rejected_P)


@declare("lengths", "gold", source="Saeidi et al. 2024, arXiv 2405.16681", systems=("TPO",))
def tpo(pair: PairLogprob, *, beta: float = 0.01, label_smoothing: float = 0.0, sft_weight: float = 1.0) -> Tensor:
    """-(1 - e) LS(z) - e LS(-z) - sft_weight m_g, z = beta (logp_w - logp_l), e = label_smoothing; [P].

    Triple preference optimisation, Saeidi et al. 2024 (arXiv 2405.16681): `cpo` that imitates a third, best completion. The defaults are
    TRL's and those of the authors' training script; sft_weight is their alpha, tpo_alpha in both, where the mean is over all gold tokens of
    the batch. d/dlogp_w = beta (S(z) - (1 - e)) = -d/dlogp_l, d/dm_g = -sft_weight.
    """
    return logistic(beta * pair.policy.difference, label_smoothing) - sft_weight * _mean_gold(pair.gold)


@declare("lengths", "gold", source="Saeidi et al. 2024, arXiv 2405.16681")
def tpo_hinge(pair: PairLogprob, *, beta: float = 0.01, sft_weight: float = 1.0) -> Tensor:
    """max(0, 1 - beta (logp_w - logp_l)) - sft_weight m_g; [P].

    `tpo` with the hinge, loss_type `hinge` of TRL and of the authors' code. d/dlogp_w = -beta = -d/dlogp_l where beta (logp_w - logp_l) < 1
    and 0 elsewhere, d/dm_g = -sft_weight.
    """
    return torch.relu(1 - beta * pair.policy.difference) - sft_weight * _mean_gold(pair.gold)


@declare("lengths", "gold", source="Saeidi et al. 2024, arXiv 2405.16681")
def tpo_ipo(pair: PairLogprob, *, beta: float = 0.01, sft_weight: float = 1.0) -> Tensor:
    """(m_w - m_l - 1 / (2 beta))^2 - sft_weight m_g, of mean log-probs; [P].

    `tpo` with the square, loss_type `ipo` of TRL and of the authors' code, which take means for it.
    With r = m_w - m_l - 1 / (2 beta): d/dm_w = 2 r = -d/dm_l, d/dm_g = -sft_weight.
    """
    return (pair.mean_policy.difference - 1 / (2 * beta)).square() - sft_weight * _mean_gold(pair.gold)


@declare("lengths", "gold", source="Saeidi et al. 2024, arXiv 2405.16681", systems=("TPO",))
def tpo_mean(
    pair: PairLogprob,
    *,
    beta: float = 0.01,
    margin: float = 0.5,
    label_smoothing: float = 0.0,
    sft_weight: float = 1.0,
) -> Tensor:
    """-(1 - e) LS(u) - e LS(-u) - sft_weight m_g, u = beta (m_w - m_l) - margin, e = label_smoothing; [P].

    TPO-L of Saeidi et al. 2024 (arXiv 2405.16681): `simpo` that imitates a third, best completion; loss_type `tpo-l` in TRL, whose defaults
    these are, with the margin as tpo_l_gamma. beta = 0.01 is for sums; the authors also train with beta = 2 to 10, margin 0.3 to 3 and
    sft_weight 0.05. With f = S(u) - (1 - e): d/dm_w = beta f = -d/dm_l, d/dm_g = -sft_weight.
    """
    scaled_P = beta * pair.mean_policy.difference - margin
    return logistic(scaled_P, label_smoothing) - sft_weight * _mean_gold(pair.gold)


@declare("lengths", "gold", source="Jiang et al. 2023, arXiv 2312.16430", systems=("MPO",))
def mpo_maximum(pair: PairLogprob, *, sft_weight: float = 1.0) -> Tensor:
    """-S(logp_w - logp_l) - sft_weight m_g; [P].

    Maximum preference optimisation, Jiang, Huang and Wei 2023 (arXiv 2312.16430): the probability itself that the policy, of the two,
    writes the chosen completion, kept near the reference by imitation of completions that it was trained on, here the gold ones. Our
    reading, for there is no code: means over tokens in the second term, the default of its weight, and no third term on pre-training data.
    With s = S(logp_w - logp_l): d/dlogp_w = -s (1 - s) = -d/dlogp_l, d/dm_g = -sft_weight. Not the mixed MPO, which is `mpo`.
    """
    return -torch.sigmoid(pair.policy.difference) - sft_weight * _mean_gold(pair.gold)


def _mean_gold(gold: Gold) -> Tensor:
    return gold.policy / gold.lengths


def _log_odds(pair: PairLogprob) -> tuple[Tensor, Tensor]:
    """m - log(1 - exp(m)) of chosen and rejected. One form of the logarithm does: where it is small it is added to a large m."""
    chosen_P, rejected_P = (mean_P.clamp(max=LARGEST_MEAN) for mean_P in pair.mean_policy)
    return chosen_P - (-torch.expm1(chosen_P)).log(), rejected_P - (-torch.expm1(rejected_P)).log()


OBJECTIVES = tuple(
    make_objective(function)
    for function in (
        slic_hf,
        cpo,
        cpo_hinge,
        cpo_ipo,
        simpo,
        simpo_hinge,
        alphapo,
        orpo,
        orpo_align,
        asft,
        asft_align,
        tpo,
        tpo_hinge,
        tpo_ipo,
        tpo_mean,
        mpo_maximum,
    )
)
