"""Pairwise objectives: pure functions of a `PairLogprob` that return one loss a pair.

Letters: P preference pairs; a, b log-ratios to the reference of chosen and rejected; Delta = a - b; S sigmoid, LS
log-sigmoid. All log-probs are sums over the scored tokens of a completion unless a docstring says mean.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from isdaa_kernels.objectives.batch import PairLogprob
from isdaa_kernels.objectives.matching import QuantileMatch, same_rank
from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.options import MAX_EXPONENT, number
from isdaa_kernels.objectives.unpaired_state import RewardMean


@declare("reference", source="Rafailov et al. 2023, arXiv 2305.18290")
def dpo(pair: PairLogprob, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) LS(beta Delta) - e LS(-beta Delta), e = label_smoothing; [P].

    Direct preference optimisation, Rafailov et al. 2023 (arXiv 2305.18290). e > 0 is their conservative cDPO: labels
    are wrong with probability e. d/da = beta (S(beta Delta) - (1 - e)) = -d/db.
    """
    return logistic(beta * pair.margin, label_smoothing)


def logistic(scaled_P: Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """-(1 - e) LS(z) - e LS(-z), z = scaled, e = label_smoothing; [P]."""
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

    The form of TRL and LLaMA-Factory. With r = a / |chosen| - b / |rejected| - 1 / (2 beta):
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


@declare(
    "reference",
    source="Chowdhury et al. 2024, arXiv 2403.00409",
    label_smoothing=number("a number in [0, 0.5)", lambda value: 0 <= value < 0.5),
)
def robust_dpo(pair: PairLogprob, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """(-(1 - e) LS(beta Delta) + e LS(-beta Delta)) / (1 - 2 e), e = label_smoothing; [P].

    Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409): where a share e < 1/2 of the labels is flipped, its mean over the flips is
    `dpo` on the true labels. Not bounded below. `robust` in TRL; 0.1 is the authors' e.
    d/da = -beta (S(-beta Delta) + e / (1 - 2 e)) = -d/db.
    """
    scaled_P = beta * pair.margin
    clean_P, flipped_P = -logsigmoid(scaled_P), -logsigmoid(-scaled_P)
    return ((1 - label_smoothing) * clean_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


@declare("reference", "lengths", source="Lambert et al. 2024, arXiv 2411.15124")
def dpo_mean(pair: PairLogprob, *, beta: float = 5.0) -> Tensor:
    """-LS(beta (a / |chosen| - b / |rejected|)): `dpo` of mean log-ratios, nats per scored token; [P].

    Length-normalised DPO of Tulu 3, Lambert et al. 2024 (arXiv 2411.15124), whose beta is 5; `sigmoid_norm` in TRL. With s = S(-z), z the
    argument of LS: d/da = -beta s / |chosen|, d/db = beta s / |rejected|.
    """
    mean_a, mean_b = pair.mean_log_ratio
    return -logsigmoid(beta * (mean_a - mean_b))


@declare(
    "reference",
    source="Ji et al. 2024, arXiv 2402.00856",
    systems=("EXO",),
    label_smoothing=number("a number in (0, 0.5]", lambda value: 0 < value <= 0.5),
)
def exo(pair: PairLogprob, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """q (LS(beta Delta) - log(1 - e)) + (1 - q) (LS(-beta Delta) - log e), q = S(beta Delta), e = label_smoothing; [P].

    EXO from preferences, Ji et al. 2024 (arXiv 2402.00856), where beta is beta_pi: the reverse KL divergence of (q, 1 - q) to the
    smoothed label (1 - e, e), where cDPO has the forward one. TRL: `exo_pair`; the authors' code takes 0 and -10 for the logarithms.
    d/da = beta q (1 - q) (beta Delta - log((1 - e) / e)) = -d/db.
    """
    scaled_P, smoothing = beta * pair.margin, torch.as_tensor(label_smoothing, dtype=torch.float64)
    right_P = logsigmoid(scaled_P) - torch.log1p(-smoothing)
    wrong_P = logsigmoid(-scaled_P) - smoothing.log()
    return scaled_P.sigmoid() * right_P + (-scaled_P).sigmoid() * wrong_P


@declare("reference", source="Chen et al. 2024, arXiv 2402.05369")
def nca(pair: PairLogprob, *, beta: float = 0.01) -> Tensor:
    """-LS(beta a) - (LS(-beta a) + LS(-beta b)) / 2; [P].

    Noise contrastive alignment of a pair, Chen et al. 2024 (arXiv 2402.05369): data against noise, where the noise is either completion.
    `nca_pair` in the authors' code, whose beta is 0.01, and in TRL. d/da = beta (1.5 S(beta a) - 1), d/db = beta S(beta b) / 2: the
    chosen completion is driven to S(beta a) = 2 / 3 and no further.
    """
    a_P, b_P = pair.log_ratio
    return -logsigmoid(beta * a_P) - (logsigmoid(-beta * a_P) + logsigmoid(-beta * b_P)) / 2


@declare("reference", source="Jung et al. 2024, arXiv 2404.04656", state=RewardMean)
def bco(pair: PairLogprob, *, beta: float = 0.01, baseline: float = 0.0) -> Tensor:
    """-LS(beta a - d) - LS(d - beta b), d = baseline; [P].

    Binary classifier optimisation of a pair, Jung et al. 2024 (arXiv 2404.04656), where d is called delta: the running mean of the
    rewards beta a and beta b, which the state `RewardMean(beta)` keeps, as do LLaMA-Factory and TRL 0.24 (`bco_pair`). Without a state
    d = 0, as in TRL from 0.29. d/da = -beta S(d - beta a), d/db = beta S(beta b - d).
    """
    a_P, b_P = pair.log_ratio
    return -logsigmoid(beta * a_P - baseline) - logsigmoid(baseline - beta * b_P)


@declare("reference", source="Wu et al. 2024, arXiv 2405.00675")
def sppo_hard(pair: PairLogprob, *, beta: float = 0.001) -> Tensor:
    """(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2; [P].

    Self-play preference optimisation with the win rates 1 and 0, Wu et al. 2024 (arXiv 2405.00675), where beta is 1 / eta; `sppo_hard` in
    TRL. The authors' code takes half of it. d/da = 2 (a - 1 / (2 beta)), d/db = 2 (b + 1 / (2 beta)).
    """
    a_P, b_P = pair.log_ratio
    return (a_P - 1 / (2 * beta)).square() + (b_P + 1 / (2 * beta)).square()


@declare("reference", source="D'Oosterlinck et al. 2024, arXiv 2408.06266")
def apo_zero(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """S(-beta a) + S(beta b); [P].

    Anchored preference optimisation, D'Oosterlinck et al. 2024 (arXiv 2408.06266), for chosen completions that are better than the model's:
    chosen up, rejected down. `apo_zero` in TRL. d/da = -beta S(beta a) S(-beta a), d/db = beta S(beta b) S(-beta b).
    """
    a_P, b_P = pair.log_ratio
    return (-beta * a_P).sigmoid() + (beta * b_P).sigmoid()


@declare("reference", source="D'Oosterlinck et al. 2024, arXiv 2408.06266")
def apo_down(pair: PairLogprob, *, beta: float = 0.1) -> Tensor:
    """S(beta a) + S(-beta Delta); [P].

    Anchored preference optimisation, D'Oosterlinck et al. 2024 (arXiv 2408.06266), for chosen completions that are worse than the model's:
    both down, rejected more. `apo_down` in TRL. With S'(x) = S(x) S(-x): d/da = beta (S'(beta a) - S'(beta Delta)),
    d/db = beta S'(beta Delta).
    """
    return (beta * pair.log_ratio.chosen).sigmoid() + (-beta * pair.margin).sigmoid()


@declare("reference", source="Lu et al. 2024, arXiv 2406.08414")
def discopop(pair: PairLogprob, *, beta: float = 0.05, mixing_temperature: float = 0.05) -> Tensor:
    """-(1 - m) LS(beta Delta) + m exp(-beta Delta), m = S(beta Delta / mixing_temperature); [P].

    DiscoPOP, Lu et al. 2024 (arXiv 2406.08414), found by a language model: also called the log-ratio modulated loss, its mixing
    temperature tau. `discopop` in TRL; the defaults are the authors'. With z = beta Delta: d/da = beta (-(1 - m) S(-z) - m exp(-z) +
    m (1 - m) (LS(z) + exp(-z)) / mixing_temperature) = -d/db. m exp(-z) is one exponential, of at most 80: a larger exponent, which only
    a mixing temperature above 1 can make, has no gradient.
    """
    scaled_P = beta * pair.margin
    mixing_P = scaled_P / mixing_temperature
    exponential_P = (logsigmoid(mixing_P) - scaled_P).clamp(max=MAX_EXPONENT).exp()
    return exponential_P - (-mixing_P).sigmoid() * logsigmoid(scaled_P)


@declare("reference", source="Zheng et al. 2025, arXiv 2503.01103", systems=("DDO",))
def ddo(pair: PairLogprob, *, beta: float = 1.0, rejected_weight: float = 1.0) -> Tensor:
    """-LS(beta a) - w LS(-beta b), w = rejected_weight; [P].

    Direct discriminative optimisation of an autoregressive model, Zheng et al. 2025 (arXiv 2503.01103), where w is called alpha: a GAN's
    loss whose discriminator is S(log policy - log reference). Chosen is a sample of the data, rejected one of the reference. With the
    defaults the minimum is the distribution of the data. Our reading: the paper's practical form scales the log-ratio by beta and the
    second term by alpha. d/da = -beta S(-beta a), d/db = w beta S(beta b).
    """
    a_P, b_P = pair.log_ratio
    return -logsigmoid(beta * a_P) - rejected_weight * logsigmoid(-beta * b_P)


@declare("reference", source="Melnyk et al. 2024, arXiv 2406.05882", state=QuantileMatch, whole_batch=True)
def aot(
    pair: PairLogprob, *, beta: float = 0.01, label_smoothing: float = 0.0, partner: Tensor | None = None
) -> Tensor:
    """-(1 - e) LS(beta (u - v)) - e LS(-beta (u - v)), u = log policy(chosen) - log policy(rejected), v that of the reference for the pair
    of the same rank, e = label_smoothing; [P].

    Alignment by optimal transport of paired data, Melnyk et al. 2024 (arXiv 2406.05882): the k-th smallest margin of the policy against
    the k-th smallest of the reference. A pair carries the loss of its own u; a pair with an empty completion has no rank. `partner` is v;
    None: ranks within the batch; the state `QuantileMatch` ranks the pairs of all processes. `aot` in TRL, on each process by itself.
    d/da = beta (S(beta (u - v)) - (1 - e)) = -d/db.
    """
    policy_P, reference_P = pair.policy.difference, pair.reference.difference
    partner_P = same_rank(policy_P, reference_P, pair.present) if partner is None else partner
    return logistic(beta * (policy_P - partner_P), label_smoothing)


@declare("reference", source="Melnyk et al. 2024, arXiv 2406.05882", whole_batch=True)
def aot_unpaired(pair: PairLogprob, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) LS(beta (a - b')) - e LS(-beta (a - b')), b' the b of the same rank, e = label_smoothing; [P].

    Alignment by optimal transport of unpaired data, Melnyk et al. 2024 (arXiv 2406.05882): the k-th smallest log-ratio of the chosen
    completions against the k-th smallest of the rejected ones. A pair carries the loss of its own chosen completion, and the rejected one
    whose b is taken may be another pair's. Ranks are within the batch of a process: b' has a gradient, which other processes would lack, so
    there is no state. `aot_unpaired` in TRL (0.24: `aot_pair`). d/da = beta (S(beta (a - b')) - (1 - e)) = -d/db'.
    """
    a_P, b_P = pair.log_ratio
    return logistic(beta * (a_P - same_rank(a_P, b_P, pair.present)), label_smoothing)


OBJECTIVES = tuple(
    make_objective(function)
    for function in (
        dpo, ipo, ipo_mean, slic, robust_dpo, dpo_mean, exo, nca, bco, sppo_hard, apo_zero, apo_down, discopop, ddo, aot, aot_unpaired,
    )
)  # fmt: skip
