"""Pairwise objectives on log-ratios that add a term, a gate, a margin or a scale of its own to each pair.

Letters as in `pairwise`: P pairs; a, b log-ratios to the reference of chosen and rejected; Delta = a - b; S sigmoid, LS log-sigmoid.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.beta_state import BetaState
from isdaa_kernels.objectives.importance import SelfWeight
from isdaa_kernels.objectives.objective import declare, make_objective, token_weighted
from isdaa_kernels.objectives.options import MAX_EXPONENT
from isdaa_kernels.objectives.pairwise import dpo
from isdaa_kernels.objectives.tokens import tail_weight

NEWTON_STEPS = 5  # the authors' of adaptive preference scaling, as is the least curvature
LEAST_CURVATURE = 1e-6


@declare("reference", source="Pal et al. 2024, arXiv 2402.13228")
def dpop(pair: PairLogprob, *, beta: float = 0.3, drop_weight: float = 50.0) -> Tensor:
    """-LS(beta (Delta - drop_weight max(0, -a))); [P].

    DPO-Positive ("Smaug"), Pal et al. 2024 (arXiv 2402.13228), where drop_weight is called lambda; the defaults are theirs.
    turbo-alignment takes 0.1 for it. With u the argument of LS: d/da = -beta S(-u), times 1 + drop_weight where a < 0;
    d/db = beta S(-u).
    """
    drop_P = torch.relu(-pair.log_ratio.chosen)
    return -logsigmoid(beta * (pair.margin - drop_weight * drop_P))


@declare("reference", "lengths", source="Park et al. 2024, arXiv 2403.19159")
def r_dpo(pair: PairLogprob, *, beta: float = 0.1, length_weight: float = 0.01) -> Tensor:
    """-LS(beta Delta + length_weight (|chosen| - |rejected|)); [P].

    Length-regularised DPO, Park et al. 2024 (arXiv 2403.19159), where length_weight is called alpha. The sign follows from a reward
    that loses alpha a token: beta a + alpha |chosen| is then what the policy implies; IS-DAA's code, whose default 0.01 this is, has
    the same. With u the argument of LS: d/da = -beta S(-u) = -d/db.
    """
    longer_P = pair.lengths.chosen - pair.lengths.rejected
    return -logsigmoid(beta * pair.margin + length_weight * longer_P)


@declare("reference", source="Xiao et al. 2024, arXiv 2412.14516")
def cal_dpo(pair: PairLogprob, *, beta: float = 0.1, calibration_weight: float = 1.0) -> Tensor:
    """-LS(Delta) + calibration_weight ((a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2); [P].

    Calibrated DPO, Xiao et al. 2024 (arXiv 2412.14516); beta sets the targets and does not scale Delta. The defaults are those of
    turbo-alignment; the authors' code weighs the squares by 0.5. d/da = -S(-Delta) + 2 calibration_weight (a - 1 / (2 beta)),
    d/db = S(-Delta) + 2 calibration_weight (b + 1 / (2 beta)).
    """
    a_P, b_P = pair.log_ratio
    target = 1 / (2 * beta)
    return -logsigmoid(pair.margin) + calibration_weight * ((a_P - target).square() + (b_P + target).square())


@declare("reference", source="Xie et al. 2024, arXiv 2408.09834", systems=("MinorDPO",))
def minor_dpo(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """-LS(beta (a - max(0, b))); [P].

    MinorDPO, Xie et al. 2024 (arXiv 2408.09834): a rejected completion is pushed down only while the policy likes it better than the
    reference does. With u the argument of LS: d/da = -beta S(-u), d/db = beta S(-u) where b > 0 and 0 elsewhere.
    """
    a_P, b_P = pair.log_ratio
    return -logsigmoid(beta * (a_P - torch.relu(b_P)))


@declare("reference", source="Yan et al. 2024, arXiv 2406.07327", systems=("3D-Properties",))
def flex_dpo(pair: PairLogprob, *, beta: float = 0.1, rejected_beta: float = 0.08) -> Tensor:
    """-LS(beta a - rejected_beta b); [P].

    Flex-DPO of "3D-Properties", Yan et al. 2024 (arXiv 2406.07327), where the two are called beta+ and beta-, and beta- < beta+ slows
    the fall of rejected completions. Our reading of the text, with constants for both; its best beta- is near 0.08. With u the argument
    of LS: d/da = -beta S(-u), d/db = rejected_beta S(-u).
    """
    a_P, b_P = pair.log_ratio
    return -logsigmoid(beta * a_P - rejected_beta * b_P)


@declare("reference", source="Amini et al. 2024, arXiv 2402.10571")
def odpo(pair: PairLogprob, *, beta: float = 0.1, margin: float = 0.0) -> Tensor:
    """-LS(beta Delta - margin); [P].

    DPO with an offset, Amini et al. 2024 (arXiv 2402.10571): `margin` [P] is their offset, an increasing function of how much better the
    chosen completion was judged. `sigmoid_with_margin` in turbo-alignment. With u the argument of LS: d/da = -beta S(-u) = -d/db.
    """
    return -logsigmoid(beta * pair.margin - margin)


@declare("reference", source="Zhou et al. 2023, arXiv 2310.03708", systems=("MODPO",))
def modpo(pair: PairLogprob, *, beta: float = 0.1, margin: float = 0.0, objective_weight: float = 0.5) -> Tensor:
    """-LS((beta Delta - margin) / objective_weight); [P].

    Multi-objective DPO, Zhou et al. 2023 (arXiv 2310.03708): objective_weight is the weight w_0 of the reward that the pairs are labelled
    by, `margin` [P] what the other rewards, times their weights, give to chosen above rejected. The defaults of beta and objective_weight
    are the authors' scripts'. With u the argument of LS: d/da = -beta / objective_weight S(-u) = -d/db.
    """
    return -logsigmoid((beta * pair.margin - margin) / objective_weight)


@declare("reference", source="Zhou et al. 2023, arXiv 2310.03708")
def modpo_hinge(pair: PairLogprob, *, beta: float = 0.1, margin: float = 0.0, objective_weight: float = 0.5) -> Tensor:
    """max(0, 1 - (beta Delta - margin) / objective_weight); [P].

    `modpo` with the hinge, the other loss of the authors' trainer. d/da = -beta / objective_weight where the loss is above 0 and 0
    elsewhere = -d/db.
    """
    return torch.relu(1 - (beta * pair.margin - margin) / objective_weight)


@declare("reference", source="Hong et al. 2024, arXiv 2406.02764", systems=("Ada-DPO",))
def ada_dpo(
    pair: PairLogprob,
    *,
    beta: float = 0.1,
    scale_floor: float = 0.1,
    scale_ceiling: float = 5.0,
    scale_penalty: float = 0.1,
) -> Tensor:
    """-t LS(beta Delta / t) + (scale_penalty - log 2) t, with the t in [scale_floor, scale_ceiling] that makes it least; [P].

    Adaptive preference scaling, Hong et al. 2024 (arXiv 2406.02764), where t is called tau and scale_penalty rho. t is found by 5
    projected Newton steps from 1 and is a constant for the gradient: clear pairs get a large t, doubtful ones a small t. The defaults are
    those of the authors' script; their code leaves the second term out of the loss, which changes no gradient. With u = beta Delta / t:
    d/da = -beta S(-u) = -d/db.
    """
    scaled_P = beta * pair.margin
    scale_P = _least_scale(scaled_P.detach(), scale_floor, scale_ceiling, scale_penalty)
    return -scale_P * logsigmoid(scaled_P / scale_P) + (scale_penalty - math.log(2)) * scale_P


def _least_scale(scaled_P: Tensor, floor: float, ceiling: float, penalty: float) -> Tensor:
    """The t of `ada_dpo`; [P]."""
    scale_P = torch.ones_like(scaled_P)
    for _ in range(NEWTON_STEPS):
        u_P = scaled_P / scale_P
        slope_P = u_P * torch.sigmoid(-u_P) - logsigmoid(u_P) + (penalty - math.log(2))
        curvature_P = u_P.square() * torch.sigmoid(u_P) * torch.sigmoid(-u_P) / scale_P
        scale_P = (scale_P - slope_P / curvature_P.clamp(min=LEAST_CURVATURE)).clamp(min=floor).clamp(max=ceiling)
    return scale_P


@declare("reference", source="Furuta et al. 2024, arXiv 2409.06691", systems=("SmPO-Diffusion",))
def gdpo(pair: PairLogprob, *, beta: float = 0.1, preference: float = 1.0) -> Tensor:
    """-LS(beta (2 preference - 1) Delta); [P].

    Geometric-averaged DPO for soft labels, Furuta et al. 2024 (arXiv 2409.06691): both completions are replaced by geometric means of the
    two, so that a pair without a preference (1/2) gives no gradient; `dpo` with label_smoothing = 1 - preference would push it to
    Delta = 0. SmPO (Lu et al. 2025, arXiv 2506.02698) is the same for images, with beta times its gamma as beta. With u the argument of
    LS: d/da = -beta (2 preference - 1) S(-u) = -d/db.
    """
    return -logsigmoid(beta * (2 * preference - 1) * pair.margin)


@declare("reference", source="Rho 2025, arXiv 2510.05342", systems=("MADPO",))
def madpo(
    pair: PairLogprob,
    *,
    beta: float = 0.1,
    reward_gap: float = 0.0,
    gap_threshold: float = math.log(999),
    gap_slope: float = 1.0,
    largest_factor: float = 2.0,
    least_factor: float = 0.5,
) -> Tensor:
    """-w LS(beta Delta), w = S(c h) / S(h) of the reward gap h where h > -gap_threshold and 1 elsewhere; [P].

    Margin-adaptive DPO, Rho 2025 (arXiv 2510.05342), from the authors' code: h is what a reward model gives to chosen above rejected. The
    factor c = least_factor + (largest_factor - least_factor) / (1 + k exp(gap_slope (|h| - gap_threshold))) falls with |h|, and k makes
    it 1 at gap_threshold; they are called c_min, c_max, lambda and tau there, and the defaults are those of the authors' experiment. w is
    a constant: another one can be given to `dpo` as sample_weight. d/da = -w beta S(-beta Delta) = -d/db.
    """
    gap_P = torch.zeros_like(pair.margin) + reward_gap
    weight_P = _gap_weight(gap_P.detach(), gap_threshold, gap_slope, largest_factor, least_factor)
    return -weight_P * logsigmoid(beta * pair.margin)


def _gap_weight(gap_P: Tensor, threshold: float, slope: float, largest: float, least: float) -> Tensor:
    """The w of `madpo`; [P]."""
    odds_P = (largest - 1) / (1 - least) * (slope * (gap_P.abs() - threshold)).clamp(max=MAX_EXPONENT).exp()
    factor_P = least + (largest - least) / (1 + odds_P)
    log_weight_P = logsigmoid(factor_P * gap_P) - logsigmoid(gap_P)
    return torch.where(gap_P > -threshold, log_weight_P, 0).exp()


@declare("reference", source="Wu et al. 2024, arXiv 2407.08639", state=BetaState, state_required=True, whole_batch=True)
def beta_dpo(pair: PairLogprob, *, beta: float | Tensor = 0.1, keep: float | Tensor = 1.0) -> Tensor:
    """-keep LS(beta Delta), beta from the mean margin of the batch and keep 0 for the pairs left out of it; [P].

    beta-DPO, Wu et al. 2024 (arXiv 2407.08639). `BetaState` gives beta and keep, constants, and has the options.
    d/da = -keep beta S(-beta Delta) = -d/db.
    """
    return -keep * logsigmoid(beta * pair.margin)


OBJECTIVES = (
    *(
        make_objective(function)
        for function in (
            dpop,
            r_dpo,
            cal_dpo,
            minor_dpo,
            flex_dpo,
            odpo,
            modpo,
            modpo_hinge,
            ada_dpo,
            gdpo,
            madpo,
            beta_dpo,
        )
    ),
    # beta defaults to that of dpo; the authors of WPO take 0.01
    replace(
        make_objective(dpo),
        name="wpo",
        importance=SelfWeight(),
        source="Zhou et al. 2024, arXiv 2406.11827",
        systems=("WPO",),
    ),
    # labels of +1 and -1 of the segments of both completions, in text what DenseDPO does to the segments of two videos
    replace(
        make_objective(dpo),
        name="segment_dpo",
        needs=make_objective(dpo).needs | {"token_weight"},
        source="Wu et al. 2025, arXiv 2506.03517",
        systems=("DenseDPO",),
    ),
    # as in TRL, and as in LLaMA-Factory, whose reference sums are whole
    token_weighted(
        make_objective(dpo), "ld_dpo", tail_weight, source="Liu et al. 2024, arXiv 2409.06411", systems=("LD-DPO",)
    ),
    token_weighted(
        make_objective(dpo),
        "ld_dpo_policy",
        tail_weight,
        weigh_reference=False,
        source="Liu et al. 2024, arXiv 2409.06411, as in LLaMA-Factory",
    ),
)
