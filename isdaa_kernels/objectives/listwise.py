"""Objectives of groups of completions of one prompt: pure functions of a `GroupLogprob` that return one loss a group.

Letters: G groups, K completions a group at most; a_i the log-ratio to the reference, r_i the reward of completion i; sums and softmax are
over the completions of the group, absent ones left out. Rewards are constants: no target has a gradient. A loss does not depend on the
order of the completions; each docstring says what it makes of equal rewards where that is not plain.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from isdaa_kernels.objectives.batch import GroupLogprob
from isdaa_kernels.objectives.objective import declare, make_objective

LARGEST_GAIN = 80  # a reward of which 2 is raised to the power: 2^80
LEAST_STD = 1e-8  # of rewards, added before dividing by it
LEAST_TEMPERATURE = 1 / 16  # of an adapted temperature, as a share of the fixed one: 0.05 of 0.8 in ADPO's code


@declare("reference", "rewards", source="Ji et al. 2024, arXiv 2402.00856", systems=("EXO",))
def exo_rw(group: GroupLogprob, *, beta: float = 0.5, reward_temperature: float = 0.5) -> Tensor:
    """sum_i p_i (log p_i - log t_i), p = softmax(beta a), t = softmax(r / reward_temperature); [G].

    Efficient exact optimisation with rewards, Ji et al. 2024 (arXiv 2402.00856): the reverse KL divergence between policy and target
    within the group. beta is their beta_pi, reward_temperature their beta_r; the defaults are those of their runs on TL;DR, which also
    divide logits by 0.8 before the softmax over the vocabulary. d/da_i = beta p_i (log p_i - log t_i - loss).
    """
    log_p = group.log_softmax(_column(beta) * group.log_ratio)
    log_target = group.log_softmax(group.rewards / _column(reward_temperature))
    return group.sum(log_p.exp() * (log_p - log_target))


@declare("reference", "rewards", source="Ji et al. 2024, arXiv 2402.00856", systems=("EXO",))
def dpo_rw(group: GroupLogprob, *, beta: float = 0.5, reward_temperature: float = 0.5) -> Tensor:
    """-sum_i t_i log p_i, p = softmax(beta a), t = softmax(r / reward_temperature); [G].

    DPO with rewards, the companion of `exo_rw` with the forward KL divergence (Ji et al. 2024, arXiv 2402.00856); the loss is that and the
    entropy of t, a constant. d/da_i = beta (p_i - t_i).
    """
    target = group.softmax(group.rewards / _column(reward_temperature))
    return -group.sum(target * group.log_softmax(_column(beta) * group.log_ratio))


@declare("reference", "rewards", source="Wang 2025, arXiv 2510.18913", systems=("ADPO",))
def adpo(
    group: GroupLogprob, *, beta: float = 1.25, reward_temperature: float = 0.5, adaptation: float = 0.0
) -> Tensor:
    """-sum_i t_i log p_i, p = softmax(a / T), t = softmax((r - mean r) / ((std r + 1e-8) reward_temperature)),
    T = max(1 - adaptation H(t) / log n, 1/16) / beta, H the entropy, n the completions of the group; [G].

    Anchored direct preference optimisation, Wang 2025 (arXiv 2510.18913), in its listwise form, where 1 / beta is the temperature tau; the
    reference is the anchor, fixed or a moving average, and the defaults are those of the author's code (tau = 0.8). With adaptation 0
    (default) T is 1 / beta, else it is lower where the rewards say little; versions of the code adapt by 0.5 so, or by the entropy of
    tokens. std is that of a sample (n - 1); without the division by it (the code's scale_rewards) the loss is `dpo_rw`. The code's penalty
    by token towards the anchor is not part of it. T has no gradient. d/da_i = (p_i - t_i) / T.
    """
    return _anchored(group, group.log_ratio, beta, reward_temperature, adaptation)


@declare("behaviour", "rewards", source="Wang 2025, arXiv 2510.18913", systems=("ADPO",))
def adpo_on_policy(
    group: GroupLogprob, *, beta: float = 1.25, reward_temperature: float = 0.5, adaptation: float = 0.0
) -> Tensor:
    """-sum_i t_i log p_i, p = softmax((log policy - log behaviour) / T), t and T those of `adpo`; [G].

    `adpo` anchored at the policy that wrote the completions, the default of the author's code. d/dlog policy_i = (p_i - t_i) / T.
    """
    return _anchored(group, group.policy - group.behaviour, beta, reward_temperature, adaptation)


@declare("reference", "behaviour", "rewards", source="Pandey et al. 2024, arXiv 2402.02479", systems=("BRAIn",))
def brain(group: GroupLogprob, *, reward_temperature: float = 1.0) -> Tensor:
    """sum_i t_i (log t_i - log p_i), p = softmax(log policy - log behaviour), t = softmax(log reference + r / T - log behaviour); [G].

    Bayesian reward-conditioned amortised inference, Pandey et al. 2024 (arXiv 2402.02479): the self-normalised KL divergence from the
    reward-conditioned posterior to the policy, the behaviour being the proposal q' that wrote the completions, T = reward_temperature
    their gamma (the default is ours). d/dlog policy_i = p_i - t_i. Without a behaviour policy of its own, t = softmax(r / T) and the
    gradient is that of `dpo_rw` with beta = 1.
    """
    log_p = group.log_softmax(group.policy - group.behaviour)
    log_target = group.log_softmax(group.reference + group.rewards / _column(reward_temperature) - group.behaviour)
    return group.sum(log_target.exp() * (log_target - log_p))


@declare("reference", "rewards", source="Rafailov et al. 2023, arXiv 2305.18290")
def plackett_luce(group: GroupLogprob, *, beta: float = 0.1) -> Tensor:
    """-sum_i log(exp(beta a_i) / (exp(beta a_i) + sum_{j: r_j < r_i} exp(beta a_j))); [G].

    `dpo` of a ranking, under the model of Plackett and Luce (Rafailov et al. 2023, arXiv 2305.18290, appendix A.3): completions are drawn
    from best to worst, each among those that are left. Two completions are `dpo`. Completions of equal reward are not compared: each
    stands against the worse ones alone, and a group of equal rewards has the loss 0. With p_ij = exp(beta a_j) / (the denominator of i):
    d/da_i = -beta (1 - p_ii - sum_{j: r_j > r_i} p_ji).
    """
    scaled = _column(beta) * group.log_ratio
    itself = torch.eye(scaled.shape[-1], dtype=torch.bool, device=scaled.device)
    stands_against = itself | _better(group, group.rewards)
    loss = torch.where(stands_against, scaled[:, None, :], -torch.inf).logsumexp(-1) - scaled
    return group.sum(loss) + _nan_of_rewards(group)


@declare("reference", "rewards", source="Liu et al. 2024, arXiv 2402.01878")
def lipo(group: GroupLogprob, *, beta: float = 0.1) -> Tensor:
    """-sum_{r_i > r_j} (2^r_i - 2^r_j) |1 / log(1 + k_i) - 1 / log(1 + k_j)| LS(beta (a_i - a_j)), k the rank by a; [G].

    LiPO-lambda, Liu et al. 2024 (arXiv 2402.01878): each pair counts by what its exchange would change in the discounted cumulative
    gain of the ranking that the policy makes now. The largest a has rank 1; of equal a the larger reward goes first, so that a policy
    equal to its reference is ranked as the rewards are; equal in both share a rank. Ranks and gains have no gradient. Rewards are the
    labels psi, in [0, 1] there; above 80 they count as 80. Pairs of equal reward do not count. The default of beta is DPO's. With w_ij
    the factor of LS: d/da_i = beta (sum_{j: r_j > r_i} w_ji S(beta (a_i - a_j)) - sum_{j: r_i > r_j} w_ij S(beta (a_j - a_i))).
    """
    score, rewards = group.log_ratio.detach(), group.rewards
    behind = _better(group, score) | ((score[:, :, None] == score[:, None, :]) & _better(group, rewards))
    return _weighted_pairs(group, beta, behind)


@declare("reference", "rewards", source="Karthik et al. 2024, arXiv 2410.18013", systems=("RankDPO",))
def rank_dpo(group: GroupLogprob, *, beta: float = 0.1) -> Tensor:
    """-sum_{r_i > r_j} (2^r_i - 2^r_j) |1 / log(1 + k_i) - 1 / log(1 + k_j)| LS(beta (a_i - a_j)), k the rank by reward; [G].

    The loss of RankDPO, Karthik et al. 2024 (arXiv 2410.18013), with log-ratios for the differences of denoising errors. It is `lipo`
    with ranks that do not follow the policy: the largest reward has rank 1, equal ones share the best rank. The rest as there.
    """
    return _weighted_pairs(group, beta, _better(group, group.rewards))


def _weighted_pairs(group: GroupLogprob, beta: float | Tensor, behind: Tensor) -> Tensor:
    """The pairs' losses by lambda weights; `behind` [G, K, K] is True where j stands behind i in the ranking."""
    discount = 1 / (2 + behind.sum(-2)).double().log()
    gain = 2 ** group.rewards.clamp(max=LARGEST_GAIN)
    weight = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :]).abs()
    loss = softplus(-_column(_column(beta)) * (group.log_ratio[:, :, None] - group.log_ratio[:, None, :]))
    return torch.where(_better(group, group.rewards), weight * loss, 0).sum((-2, -1)) + _nan_of_rewards(group)


def _nan_of_rewards(group: GroupLogprob) -> Tensor:
    """[G]: NaN where a reward is, which no comparison tells; 0 elsewhere."""
    return torch.where(group.sum(group.rewards.isnan().double()) > 0, torch.nan, 0.0)


def _anchored(
    group: GroupLogprob,
    log_ratio: Tensor,
    beta: float | Tensor,
    reward_temperature: float | Tensor,
    adaptation: float | Tensor,
) -> Tensor:
    log_target = group.log_softmax(_standardised(group) / _column(reward_temperature))
    entropy = -group.sum(log_target.exp() * log_target)
    largest_entropy = group.present.sum(-1).clamp(min=2).double().log()
    temperature = (1 - adaptation * entropy / largest_entropy).clamp(min=LEAST_TEMPERATURE) / beta
    return -group.sum(log_target.exp() * group.log_softmax(log_ratio / _column(temperature)))


def _standardised(group: GroupLogprob) -> Tensor:
    """Rewards less their mean, over their standard deviation (that of a sample, n - 1)."""
    count = group.present.sum(-1, keepdim=True)
    centred = group.rewards - group.sum(group.rewards)[:, None] / count
    variance = group.sum(centred.square())[:, None] / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + LEAST_STD)


def _better(group: GroupLogprob, value: Tensor) -> Tensor:
    """[G, K, K]: i has a larger value than j, and both are present."""
    return (value[:, :, None] > value[:, None, :]) & group.present[:, :, None] & group.present[:, None, :]


def _column(value: float | Tensor) -> float | Tensor:
    """An option that holds one value a group, against [G, K]."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


OBJECTIVES = tuple(
    make_objective(function)
    for function in (exo_rw, dpo_rw, adpo, adpo_on_policy, brain, plackett_luce, lipo, rank_dpo)
)
