"""Losses of reinforcement learning from stored completions: log-ratios to the reference against values, rewards or advantages of steps.

Letters: N tokens of a packed batch, S completions or steps; l_t the log-ratio to the reference of token t, V_t the value at it, R the
reward of its completion; l that of a whole step.
"""

import torch
from torch import Tensor

from isdaa_kernels.objectives.batch import CompletionLogprob
from isdaa_kernels.objectives.objective import declare, make_objective
from isdaa_kernels.objectives.token_batch import TokenLogprob


@declare(
    "reference",
    "values",
    "rewards",
    source="Wang et al. 2024, arXiv 2412.16145",
    systems=("OREO",),
    reduction="sequence_mean",
)
def oreo_actor(batch: TokenLogprob, *, beta: float = 0.03) -> Tensor:
    """(beta (l_t + stopgrad(sum of l after t)) + stopgrad(V_t) - R)^2; [N].

    Offline reasoning optimisation, Wang et al. 2024 (arXiv 2412.16145): the soft Bellman equation along a completion, each token
    responsible for itself. As in the authors' code (dro_actor_loss, beta 0.03); their term of KL(policy || reference) over the vocabulary
    is `token_kl` of `policy_loss` with kl_weight 0.01. With steps it is their step-level form: l_t is the sum over the step, the loss
    that of the tokens where a step starts, and the mean over those. With r the square's root d/dl_t = 2 beta r.
    """
    log_ratio_N = batch.log_ratio_to_reference
    own_N = batch.own_step(log_ratio_N)
    ahead_N = _ahead(batch, log_ratio_N.detach())
    residual_N = beta * (own_N - own_N.detach() + ahead_N) + batch.values.detach() - batch.rewards
    return _of_steps(batch, residual_N.square())


@declare(
    "reference",
    "values",
    "rewards",
    source="Wang et al. 2024, arXiv 2412.16145",
    systems=("OREO",),
    reduction="sequence_mean",
)
def oreo_critic(batch: TokenLogprob, *, beta: float = 0.03) -> Tensor:
    """(beta stopgrad(sum of l from t on) + V_t - R)^2; [N].

    The critic of `oreo_actor` (Wang et al. 2024, arXiv 2412.16145): what remains of the reward at t is the value. The gradient is that of
    the values; the policy has none. With steps the loss is that of the tokens where a step starts, and the mean over those. With r the
    square's root d/dV_t = 2 r.
    """
    residual_N = beta * _ahead(batch, batch.log_ratio_to_reference.detach()) + batch.values - batch.rewards
    return _of_steps(batch, residual_N.square())


@declare("reference", source="Liu et al. 2024, arXiv 2412.18279", systems=("DAPO (direct advantage)",))
def dapo_direct(
    batch: CompletionLogprob, *, beta: float = 0.1, advantage: float = 0.0, advantage_scale: float = 1.0
) -> Tensor:
    """(advantage / advantage_scale - beta l)^2 / 2; [S].

    Direct advantage policy optimisation, Liu et al. 2024 (arXiv 2412.18279): each step of a chain of thought is a completion of the batch
    (`step_cu_seqlens`), advantage [S] that of a critic trained before. Our reading of the constants: the square is halved, the advantage
    divided by its scale and the log-ratio multiplied by beta; another scale of the loss is one of the learning rate. Not ByteDance's
    DAPO, which is `dapo`. d/dl = -beta (advantage / advantage_scale - beta l).
    """
    return (advantage / advantage_scale - beta * batch.log_ratio).square() / 2


def _ahead(batch: TokenLogprob, value_N: Tensor) -> Tensor:
    """The sum from each token on, to the end of its completion."""
    return value_N + batch.completions.later(value_N)


def _of_steps(batch: TokenLogprob, loss_N: Tensor) -> Tensor:
    """The loss where a step starts, weighed so that the mean over tokens is that over steps; all of it where there are no steps."""
    if batch.steps is None:
        return loss_N
    count_N = batch.completions.total(batch.step_starts.double()).clamp(min=1)
    return torch.where(batch.step_starts, loss_N * batch.lengths / count_N, 0)


OBJECTIVES = tuple(make_objective(function) for function in (oreo_actor, oreo_critic, dapo_direct))
