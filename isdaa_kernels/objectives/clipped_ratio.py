"""Losses of tokens whose ratio of probabilities to the old policy is clipped, for on-policy learning from advantages.

Letters: N tokens of a packed batch; rho = policy / old, the ratio of a token's probabilities, A its advantage; s the geometric mean of rho
over the completion, n its number of scored tokens; clip(x) = max(1 - clip_low, min(x, 1 + clip_high)). A ratio is the exponential of a
log-ratio of at most 80.
"""

import torch
from torch import Tensor

from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.token_batch import LOG_RATIOS, TokenLogprob, bounded_exp


@declare(
    "advantages",
    source="Shao et al. 2024, arXiv 2402.03300",
    reduction="sequence_mean",
    systems=("Multi-objective GRPO",),
)
def grpo(
    batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float | None = None
) -> Tensor:
    """-min(min(rho, ratio_cap) A, clip(rho) A); [N].

    Group relative policy optimisation, Shao et al. 2024 (arXiv 2402.03300): PPO's loss with the advantages of `group_advantages`, the mean
    over each completion, then over completions. clip_low and clip_high are epsilon (TRL: `epsilon`, `epsilon_high`). ratio_cap: the
    two-sided clip, called delta; None: none. The KL term is `kl_weight` of `policy_loss`. d/dlogp = -rho A where the first is the smaller
    one and below its cap or clip(rho) = rho, else 0.
    """
    return _clipped(batch, LOG_RATIOS["token"](batch), clip_low, clip_high, ratio_cap)


@declare("advantages", source="Xiao et al. 2025, arXiv 2506.02864, as in TRL", reduction="batch_token_mean")
def bnpo(
    batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float | None = None
) -> Tensor:
    """-min(min(rho, ratio_cap) A, clip(rho) A); [N].

    `grpo` whose mean is over all scored tokens of the call at once: what TRL calls `bnpo`, after Xiao et al. 2025 (arXiv 2506.02864), whose
    normalisation of rewards by a beta distribution is not part of it. The gradient of a token is that of `grpo`.
    """
    return grpo(batch, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap)


@declare("advantages", source="Liu et al. 2025, arXiv 2503.20783", reduction="max_length")
def dr_grpo(
    batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float | None = None
) -> Tensor:
    """-min(min(rho, ratio_cap) A, clip(rho) A); [N].

    GRPO done right, Liu et al. 2025 (arXiv 2503.20783): every token has the weight 1 / max_length, so that a completion's length does not
    change that of its tokens; advantages of `group_advantages(scale="none")`. The gradient of a token is that of `grpo`.
    """
    return grpo(batch, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap)


@declare("advantages", source="Yu et al. 2025, arXiv 2503.14476", reduction="token_mean")
def dapo(
    batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.28, ratio_cap: float | None = None
) -> Tensor:
    """-min(min(rho, ratio_cap) A, clip(rho) A); [N].

    Decoupled clip and dynamic sampling, Yu et al. 2025 (arXiv 2503.14476), with their clip_high ("clip higher"), the mean over the scored
    tokens of the whole step: pass their number over all micro-batches and ranks as denominator, divided by the number of ranks where
    their gradients are averaged. TRL's `dapo`, its default, has clip_high 0.2. The gradient of a token is that of `grpo`. Not
    `dapo_direct`.
    """
    return grpo(batch, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap)


@declare("advantages", source="Prime Intellect 2025, arXiv 2505.07291", reduction="token_mean")
def grpo_two_sided(
    batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float | None = 4.0
) -> Tensor:
    """-min(min(rho, ratio_cap) A, clip(rho) A); [N].

    The two-sided clip of INTELLECT-2 (Prime Intellect 2025, arXiv 2505.07291), whose delta is ratio_cap, 4 in their report: a token of a
    bad completion that has become much likelier has no gradient either. `delta` in TRL. Where ratio_cap is above 1 + clip_high it is
    `ppo_dual_clip`. The gradient of a token is that of `grpo`.
    """
    return grpo(batch, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap)


@declare("advantages", source="Schulman et al. 2017, arXiv 1707.06347", reduction="token_mean", systems=("RTO",))
def ppo(batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """-min(rho A, clip(rho) A); [N].

    Proximal policy optimisation, Schulman et al. 2017 (arXiv 1707.06347), with advantages of tokens from a critic. RTO (arXiv 2404.18922)
    is this with the token rewards of `rto_rewards`. d/dlogp = -rho A where rho A is the smaller one or clip(rho) = rho, else 0.
    """
    return _clipped(batch, LOG_RATIOS["token"](batch), clip_low, clip_high, None)


@declare("advantages", source="Ye et al. 2020, arXiv 1912.09729", reduction="token_mean")
def ppo_dual_clip(
    batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float = 3.0
) -> Tensor:
    """-max(min(rho A, clip(rho) A), ratio_cap A) where A < 0, -min(rho A, clip(rho) A) elsewhere; [N].

    Dual-clip PPO, Ye et al. 2020 (arXiv 1912.09729), where ratio_cap is c = 3; OpenRLHF's `dual_clip`. d/dlogp as in `ppo`, and 0 where
    A < 0 and rho > ratio_cap.
    """
    loss_N = ppo(batch, clip_low=clip_low, clip_high=clip_high)
    return torch.where(batch.advantages < 0, torch.minimum(loss_N, -ratio_cap * batch.advantages), loss_N)


@declare("advantages", source="Zheng et al. 2025, arXiv 2507.18071", reduction="sequence_mean", ratio="sequence_mean")
def gspo(
    batch: TokenLogprob, *, clip_low: float = 3e-4, clip_high: float = 4e-4, ratio_cap: float | None = None
) -> Tensor:
    """-min(min(s, ratio_cap) A, clip(s) A), s the geometric mean of rho over the completion; [N].

    Group sequence policy optimisation, Zheng et al. 2025 (arXiv 2507.18071), with their clip. TRL: `grpo` with
    importance_sampling_level="sequence". Where it is not clipped the gradient of the completion's loss by each of its log-probs is
    -s A / n.
    """
    return _clipped(batch, LOG_RATIOS["sequence_mean"](batch), clip_low, clip_high, ratio_cap)


@declare("advantages", source="Zheng et al. 2025, arXiv 2507.18071", reduction="sequence_mean", ratio="sequence_mean")
def gspo_token(batch: TokenLogprob, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Tensor:
    """-min(r A, clip(r) A), r = stopgrad(s / policy) policy, s the geometric mean of rho over the completion; [N].

    The form of GSPO for advantages of tokens (arXiv 2507.18071, section 4.3): r is s, and its gradient is that of the token alone. With
    one advantage a completion it is `gspo`. d/dlogp = -s A where s is not clipped.
    """
    mean_N = LOG_RATIOS["sequence_mean"](batch)
    return _clipped(batch, mean_N.detach() + (batch.policy - batch.policy.detach()), clip_low, clip_high, None)


@declare(
    "advantages", source="Liu et al. 2026, arXiv 2602.05261, as in TRL", reduction="sequence_sum", ratio="sequence_mean"
)
def luspo(
    batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_cap: float | None = None
) -> Tensor:
    """-min(min(s, ratio_cap) A, clip(s) A), s the geometric mean of rho over the completion; [N].

    Length-unbiased sequence policy optimisation, Liu et al. 2026 (arXiv 2602.05261): `gspo` times the length of the completion, here as
    the sum over its tokens. As in TRL with importance_sampling_level="sequence", whose clip is the default. Where it is not clipped the
    gradient of the completion's loss by each of its log-probs is -s A.
    """
    return gspo(batch, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap)


@declare(
    "advantages",
    source="Ahmadian et al. 2024, arXiv 2402.14740, as in TRL",
    reduction="sequence_mean",
    ratio="sequence",
)
def rloo(batch: TokenLogprob, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Tensor:
    """-min(q A, clip(q) A), q = prod rho over the completion; [N].

    REINFORCE leave one out, Ahmadian et al. 2024 (arXiv 2402.14740), with the ratio of whole completions and its clip as in TRL's RLOO
    trainer; advantages of `group_advantages(baseline="leave_one_out", scale="none")`. Where it is not clipped the gradient of the
    completion's loss by each of its log-probs is -q A.
    """
    return _clipped(batch, LOG_RATIOS["sequence"](batch), clip_low, clip_high, None)


@declare("advantages", source="Zhao et al. 2025, arXiv 2507.20673", reduction="sequence_mean", ratio="sequence_mean")
def gmpo(batch: TokenLogprob, *, log_clip: float = 0.4) -> Tensor:
    """-A exp(mean over the completion of c), c = min(log rho, log_clip) where A > 0, max(log rho, -log_clip) elsewhere; [N].

    Geometric-mean policy optimisation, Zhao et al. 2025 (arXiv 2507.20673, algorithm 1): PPO's clip token by token in the logarithm, then
    the geometric mean, with the authors' epsilon = 0.4. With g that mean, the gradient of the completion's loss by a log-prob is -A g / n
    where the token is not clipped.
    """
    log_ratio_N = batch.log_ratio
    clipped_N = torch.where(batch.advantages > 0, log_ratio_N.clamp(max=log_clip), log_ratio_N.clamp(min=-log_clip))
    return -batch.advantages * bounded_exp(batch.mean(clipped_N))


def _clipped(
    batch: TokenLogprob, log_ratio_N: Tensor, clip_low: float, clip_high: float, ratio_cap: float | None
) -> Tensor:
    ratio_N = bounded_exp(log_ratio_N)
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    ratio_N = ratio_N if ratio_cap is None else ratio_N.clamp(max=ratio_cap)
    return -torch.minimum(ratio_N * batch.advantages, clipped_N * batch.advantages)


OBJECTIVES = tuple(
    make_objective(function)
    for function in (
        grpo, bnpo, dr_grpo, dapo, grpo_two_sided, ppo, ppo_dual_clip, gspo, gspo_token, luspo, rloo, gmpo,
    )
)  # fmt: skip
