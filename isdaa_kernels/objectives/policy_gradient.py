"""Losses of tokens that weigh the gradient of each log-prob, without a clip that ends it.

Letters: N tokens of a packed batch; rho = policy / old, the ratio of a token's probabilities, A its advantage, logp its log-prob; S
sigmoid. A ratio is the exponential of a log-ratio of at most 80.
"""

import math

import torch
from torch import Tensor

from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.token_batch import TokenLogprob, bounded_exp

# VESPO's ratios are held between 1e-8 and e^20, those of tokens between e^-20 and e^20.
LEAST_LOG_RATIO, LARGEST_LOG_RATIO = math.log(1e-8), 20.0


@declare("advantages", source="Williams 1992", reduction="token_mean")
def reinforce(batch: TokenLogprob) -> Tensor:
    """-A logp; [N].

    REINFORCE, Williams 1992. What the policy did since the completions were sampled is not corrected. d/dlogp = -A.
    """
    return -batch.advantages * batch.policy


@declare("advantages", source="MiniMax 2025, arXiv 2506.13585", reduction="token_mean")
def cispo(batch: TokenLogprob, *, ratio_cap: float = 5.0) -> Tensor:
    """-stopgrad(min(rho, ratio_cap)) A logp; [N].

    Clipped importance-sampling weights of MiniMax-M1 (MiniMax 2025, arXiv 2506.13585): every token keeps its gradient. ratio_cap is the
    cap itself, as in TRL (`epsilon_high`, which counts from 0 there); papers write 1 + epsilon. 5 is that of ScaleRL (arXiv 2510.13786).
    d/dlogp = -min(rho, ratio_cap) A.
    """
    return -bounded_exp(batch.log_ratio).clamp(max=ratio_cap).detach() * batch.advantages * batch.policy


@declare("advantages", source="Gao et al. 2025, arXiv 2511.20347", reduction="sequence_mean")
def sapo(batch: TokenLogprob, *, positive_temperature: float = 1.0, negative_temperature: float = 1.05) -> Tensor:
    """-4 A S(t (rho - 1)) / t, t = positive_temperature where A > 0, negative_temperature elsewhere; [N].

    Soft adaptive policy optimisation, Gao et al. 2025 (arXiv 2511.20347), where t is called tau: a smooth gate in the place of the clip.
    `sapo` in TRL. With g = S(t (rho - 1)): d/dlogp = -4 A g (1 - g) rho.
    """
    temperature_N = _by_sign(batch.advantages > 0, batch.advantages, positive_temperature, negative_temperature)
    gate_N = torch.sigmoid(temperature_N * (bounded_exp(batch.log_ratio) - 1))
    return -4 * batch.advantages * gate_N / temperature_N


@declare(
    "advantages",
    source="arXiv 2602.10693, as in TRL",
    reduction="token_mean",
    ratio="sequence",
    own_correction=True,
)
def vespo(
    batch: TokenLogprob,
    *,
    positive_power: float = 2.0,
    positive_rate: float = 3.0,
    negative_power: float = 3.0,
    negative_rate: float = 2.0,
) -> Tensor:
    """-stopgrad(w^k exp(c (1 - w))) A logp, w = prod rho over the completion, (k, c) = (positive_power, positive_rate) where A >= 0,
    (negative_power, negative_rate) elsewhere; [N].

    Variational sequence-level soft policy optimisation (arXiv 2602.10693), as in TRL and with its defaults (k and lambda). The correction
    for the sampler, of tokens, is a factor of w and not of the loss. Held as there: log rho of a token to +-20, log w to [log 1e-8, 20].
    d/dlogp = -w^k exp(c (1 - w)) A.
    """
    nonnegative_N = batch.advantages >= 0
    power_N = _by_sign(nonnegative_N, batch.advantages, positive_power, negative_power)
    rate_N = _by_sign(nonnegative_N, batch.advantages, positive_rate, negative_rate)
    log_ratio_N = batch.log_ratio.detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    if batch.correction is not None:
        log_ratio_N = log_ratio_N + batch.correction.log().clamp(LEAST_LOG_RATIO, LARGEST_LOG_RATIO)
    log_w_N = batch.completions.total(log_ratio_N).clamp(LEAST_LOG_RATIO, LARGEST_LOG_RATIO)
    weight_N = bounded_exp(power_N * log_w_N + rate_N * (1 - log_w_N.exp()))
    return -weight_N * batch.advantages * batch.policy


@declare(source="Wu et al. 2025, arXiv 2508.05629", reduction="token_mean")
def dft(batch: TokenLogprob) -> Tensor:
    """-stopgrad(p) logp, p = exp(logp); [N].

    Dynamic fine-tuning, Wu et al. 2025 (arXiv 2508.05629): supervised fine-tuning whose tokens weigh as much as they are likely. `dft` of
    TRL's SFT trainer. d/dlogp = -p.
    """
    return -bounded_exp(batch.policy.detach()) * batch.policy


def _by_sign(first_N: Tensor, like_N: Tensor, first: float, second: float) -> Tensor:
    # where() of two numbers would round them to fp32
    return torch.where(first_N, torch.full_like(like_N, first), second)


OBJECTIVES = tuple(make_objective(function) for function in (reinforce, cispo, sapo, vespo, dft))
