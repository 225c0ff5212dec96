"""Pairwise objectives that measure the distance to the reference by another divergence than the reverse KL.

Letters as in `pairwise`: P preference pairs; a, b log-ratios to the reference of chosen and rejected; LS log-sigmoid, S sigmoid. Each is
`dpo` of s(a) - s(b) in place of a - b, with s(x) = f'(e^x) for the divergence that f defines, up to a constant.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.objective import Objective, declare, make_objective
from isdaa_kernels.objectives.options import MAX_EXPONENT


@declare("reference", source="Wang et al. 2023, arXiv 2309.16240", systems=("f-DPO",))
def dpo_forward_kl(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """-LS(beta (exp(-b) - exp(-a))); [P].

    f-DPO with the forward KL divergence, KL(reference || policy), Wang et al. 2023 (arXiv 2309.16240): s(x) = -exp(-x). TRL:
    `f_divergence_type="forward_kl"`. With z the argument of LS: d/da = -beta exp(-a) S(-z), d/db = beta exp(-b) S(-z), and 0 for a
    log-ratio below -80, where the exponential is held at e^80.
    """
    a_P, b_P = pair.log_ratio
    return -logsigmoid(beta * (_exp(-b_P) - _exp(-a_P)))


@declare("reference", source="Wang et al. 2023, arXiv 2309.16240", systems=("f-DPO",))
def dpo_js(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """-LS(beta (LS(a) - LS(b))); [P].

    f-DPO with the Jensen-Shannon divergence, Wang et al. 2023 (arXiv 2309.16240): s(x) = log(2 e^x / (1 + e^x)) = LS(x) + log 2. TRL:
    `f_divergence_type="js_divergence"`. With z the argument of LS: d/da = -beta S(-a) S(-z), d/db = beta S(-b) S(-z).
    """
    a_P, b_P = pair.log_ratio
    return -logsigmoid(beta * (logsigmoid(a_P) - logsigmoid(b_P)))


@declare("reference", source="Wang et al. 2023, arXiv 2309.16240", systems=("f-DPO",))
def dpo_alpha(pair: PairLogprob, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """-LS(beta (s(a) - s(b))), s(x) = (1 - exp(-alpha x)) / alpha; [P].

    f-DPO with an alpha divergence, Wang et al. 2023 (arXiv 2309.16240), alpha in (0, 1) there. alpha = 1 is `dpo_forward_kl`, alpha -> 0 is
    `dpo`, alpha = -1 the chi-squared divergence without the KL of `chi_po`. TRL 0.24 has the same alpha; from 0.29 its
    `f_alpha_divergence_coef` is 1 - alpha, and the default, 0.5, is the same loss. With z the argument of LS:
    d/da = -beta exp(-alpha a) S(-z), d/db = beta exp(-alpha b) S(-z), and 0 where the exponent is above 80: there it is held.
    """
    a_P, b_P = ((-alpha * ratio_P).clamp(max=MAX_EXPONENT).expm1() for ratio_P in pair.log_ratio)
    return -logsigmoid(beta * (b_P - a_P) / alpha)


@declare("reference", source="Huang et al. 2024, arXiv 2407.13399")
def chi_po(
    pair: PairLogprob,
    *,
    beta: float = 0.1,
    clip_range: float | None = 4.0,
    ratio_power: float = 1.0,
    log_ratio_weight: float = 1.0,
) -> Tensor:
    """-LS(max(-c, min(c, beta (phi(a) - phi(b))))), phi(x) = log_ratio_weight x + exp(ratio_power x), c = clip_range; [P].

    chi-squared preference optimisation, Huang et al. 2024 (arXiv 2407.13399): the divergence is chi^2 + KL, so phi(x) = x + e^x. clip_range
    is their 2 R_max, the largest difference of rewards of 0 to R_max: beyond it there is no gradient. It depends on the rewards; 4 is our
    choice. None: no clip. The code of the IS-DAA authors for their comparison (Nguyen et al. 2025, arXiv 2506.08681) calls ratio_power
    `chipo_alpha` and log_ratio_weight `chipo_gamma`, and clips nothing or phi(a) - phi(b) before it is scaled: clip_range is beta times
    theirs. With z the argument of LS and phi'(x) = log_ratio_weight + ratio_power exp(ratio_power x): d/da = -beta phi'(a) S(-z), d/db =
    beta phi'(b) S(-z), and 0 where the clip bites. An exponential is held at e^80, and of phi' log_ratio_weight is left there.
    """
    a_P, b_P = (log_ratio_weight * ratio_P + _exp(ratio_power * ratio_P) for ratio_P in pair.log_ratio)
    scaled_P = beta * (a_P - b_P)
    return -logsigmoid(scaled_P if clip_range is None else scaled_P.clamp(-clip_range, clip_range))


def _exp(exponent_P: Tensor) -> Tensor:
    return exponent_P.clamp(max=MAX_EXPONENT).exp()


OBJECTIVES: tuple[Objective, ...] = tuple(
    make_objective(function) for function in (dpo_forward_kl, dpo_js, dpo_alpha, chi_po)
)
