"""What losses of tokens are weighed by, made from rewards: outside the objectives, so that a caller sees and may change it.

Letters: S completions, G groups of at most K completions of one prompt, N tokens of a packed batch.
"""

import torch
from torch import Tensor

from isdaa_kernels.objectives.options import describe, is_finite_number

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out", "none")
LEAST_STD = 1e-4  # added to a standard deviation before dividing by it, as in TRL


@torch.no_grad()
def group_advantages(
    rewards: Tensor, groups: int | Tensor, *, scale: str = "group", baseline: str = "mean", epsilon: float = LEAST_STD
) -> Tensor:
    """By how much each completion's reward is above what its group has, fp64 [S], on the rewards' device. Equal, by default, to::

        grouped = rewards.double().view(-1, groups)
        (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-4)

    rewards    [S], one number a completion. NaN: there is none; it is left out of its group, and the advantage is 0.
    groups     the size of equal groups one after the other, or [G, K] int32 or int64, the rows of each group's completions, -1 where it has
               fewer than K. A completion in no group has the advantage 0, one in several that of the last.
    scale      what it is divided by: the standard deviation (n - 1) of the "group" (default, GRPO), that of all rewards of the "batch"
               (PPO Lite), or "none" (Dr. GRPO).
    epsilon    at least 0, added to a standard deviation; where their sum is 0 nothing is divided.
    baseline   what is subtracted: the "mean" of the group (default), that of the others ("leave_one_out", RLOO), or "none".

    A group with fewer than two rewards has nothing to compare: advantage 0, unless baseline="none". Equal rewards give 0. Raises ValueError
    for shapes, dtypes, names and numbers other than these. No host sync, but on the CPU.
    """
    if not isinstance(rewards, Tensor) or rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards: expected a floating tensor [S], got {describe(rewards)}")
    for name, value, known in (("scale", scale, SCALES), ("baseline", baseline, BASELINES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if not is_finite_number(epsilon) or epsilon < 0:
        raise ValueError(f"epsilon: expected a finite number of at least 0, got {epsilon!r}")
    rows_GK = _rows(groups, rewards)
    # -1 takes the NaN at the end
    reward_GK = torch.cat([rewards.double(), rewards.new_full((1,), torch.nan).double()])[rows_GK.clamp(min=-1)]
    there_GK = ~reward_GK.isnan()
    reward_GK, count_G1 = torch.where(there_GK, reward_GK, 0), there_GK.sum(-1, keepdim=True)
    advantage_GK = reward_GK
    if baseline != "none":
        advantage_GK = torch.where(count_G1 > 1, _from_mean(reward_GK, there_GK), 0)
    if baseline == "leave_one_out":  # r - (n mean - r) / (n - 1)
        advantage_GK = advantage_GK * count_G1 / (count_G1 - 1).clamp(min=1)
    if scale != "none":
        flat = (reward_GK, there_GK) if scale == "group" else (reward_GK.view(1, -1), there_GK.view(1, -1))
        divisor = _std(*flat) + epsilon
        advantage_GK = advantage_GK / torch.where(divisor == 0, 1, divisor)
    return _by_completion(
        torch.where(there_GK, advantage_GK, 0), torch.where(there_GK, rows_GK, len(rewards)), len(rewards)
    )


@torch.no_grad()
def rto_rewards(
    reward_logprob: Tensor,
    reference_logprob: Tensor,
    policy_logprob: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    token_weight: float = 0.05,
    clip: float = 0.05,
    kl_weight: float = 0.01,
) -> Tensor:
    """The rewards of tokens of reinforced token optimisation (RTO, Zhong et al. 2024, arXiv 2404.18922), fp64 [N]::

        (token_weight * (reward_logprob - reference_logprob)).clamp(-clip, clip) - kl_weight * (policy_logprob - reference_logprob)

    plus, at the last scored token of each completion, its reward.

    reward_logprob     [N], under a policy that was trained by DPO: its log-ratio to the reference is a reward of each token.
    reference_logprob, policy_logprob    [N], under the reference and under the policy that wrote the completions.
    cu_seqlens         [S + 1], where completions start, and N.
    rewards            [S], of whole completions, from a reward model.
    mask               bool [N], True where a token is scored; None: all. The others have 0.
    token_weight, clip, kl_weight    beta_1 = 0.05, the bound 0.05 and the coefficient 0.01 of the authors' code. Our reading of its order:
                       the weighted log-ratio is clipped, the KL term and the reward of the completion are not.

    Advantages of them, with a critic, go to `policy_loss` with objective="ppo". Raises ValueError for shapes, dtypes and numbers other than
    these, and on the CPU for a cu_seqlens that does not cut N tokens.
    """
    mask = torch.ones_like(reward_logprob, dtype=torch.bool) if mask is None else mask
    _check_rto(reward_logprob, reference_logprob, policy_logprob, cu_seqlens, rewards, mask)
    for name, value in (("token_weight", token_weight), ("clip", clip), ("kl_weight", kl_weight)):
        if not is_finite_number(value) or value < 0:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    N = len(reward_logprob)
    reward, reference, policy = (x.double() for x in (reward_logprob, reference_logprob, policy_logprob))
    token_N = (token_weight * (reward - reference)).clamp(-clip, clip) - kl_weight * (policy - reference)
    return torch.where(
        mask, torch.where(_last_scored(mask, cu_seqlens), token_N + _spread(rewards, cu_seqlens, N), token_N), 0
    )


def _check_rto(
    reward_logprob: Tensor,
    reference_logprob: Tensor,
    policy_logprob: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor,
    mask: Tensor,
) -> None:
    if reward_logprob.ndim != 1:
        raise ValueError(f"reward_logprob: expected [N], got {list(reward_logprob.shape)}")
    N, S = len(reward_logprob), cu_seqlens.numel() - 1
    by_token = {"reference_logprob": reference_logprob, "policy_logprob": policy_logprob, "mask": mask}
    for name, tensor in by_token.items():
        if tuple(tensor.shape) != (N,) or (name == "mask" and tensor.dtype != torch.bool):
            expected = f"bool [{N}]" if name == "mask" else f"[{N}]"
            raise ValueError(f"{name}: expected {expected}, got {describe(tensor)}")
    if cu_seqlens.ndim != 1 or S < 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected int32 or int64 [S + 1], got {describe(cu_seqlens)}")
    if tuple(rewards.shape) != (S,):
        raise ValueError(f"rewards: expected [{S}], got {list(rewards.shape)}")
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != N or ends != sorted(ends):
            raise ValueError(f"cu_seqlens: expected non-decreasing values from 0 to {N}, got {ends}")


def _rows(groups: int | Tensor, rewards: Tensor) -> Tensor:
    S = len(rewards)
    if isinstance(groups, Tensor):
        if groups.ndim != 2 or groups.dtype not in (torch.int32, torch.int64) or groups.device != rewards.device:
            raise ValueError(
                f"groups: expected int32 or int64 [G, K] on {rewards.device}, got {groups.dtype} {list(groups.shape)} on {groups.device}"
            )
        if groups.device.type == "cpu" and bool(((groups < -1) | (groups >= S)).any()):
            raise ValueError(f"groups: expected rows in -1..{S - 1}, got {groups.tolist()}")
        return groups.long()
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or S % groups:
        raise ValueError(
            f"groups: expected rows [G, K], or the size of equal groups that make up {S} completions, got {groups!r}"
        )
    return torch.arange(S, device=rewards.device).view(-1, groups)


def _by_completion(advantage_GK: Tensor, rows_GK: Tensor, S: int) -> Tensor:
    """The advantage at the last place of each row 0..S - 1, 0 where it has none; [S]. Row S is dropped."""
    places = torch.arange(rows_GK.numel(), device=rows_GK.device)
    # the largest place, and not an assignment, whose order among equal rows a GPU chooses
    none = rows_GK.new_full((S + 1,), -1)
    last_S = none.scatter_reduce(0, rows_GK.reshape(-1), places, "amax")[:-1]
    # -1 takes the 0 at the end
    return torch.cat([advantage_GK.reshape(-1), advantage_GK.new_zeros(1)])[last_S]


def _from_mean(reward: Tensor, there: Tensor) -> Tensor:
    """What lies above the mean of each row, over what is there; exactly 0 where all are equal, as the mean's rounding is taken out."""
    count = there.sum(-1, keepdim=True).clamp(min=1)
    above = torch.where(there, reward - reward.sum(-1, keepdim=True) / count, 0)
    return torch.where(there, above - above.sum(-1, keepdim=True) / count, 0)


def _std(reward: Tensor, there: Tensor) -> Tensor:
    """Of each row, over what is there, that of a sample (n - 1); 0 where there are fewer than two."""
    squares = _from_mean(reward, there).square().sum(-1, keepdim=True)
    return (squares / (there.sum(-1, keepdim=True) - 1).clamp(min=1)).sqrt()


def _spread(value_S: Tensor, cu_seqlens: Tensor, N: int) -> Tensor:
    place_N = torch.arange(N, device=cu_seqlens.device)
    return value_S.double()[torch.bucketize(place_N, cu_seqlens[1:].long(), right=True)]


def _last_scored(mask_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """True at the last scored token of each completion; bool [N]."""
    count_N = mask_N.long().cumsum(0)
    before = torch.cat([count_N.new_zeros(1), count_N])
    return mask_N & (count_N == _spread(before[cu_seqlens[1:].long()], cu_seqlens, mask_N.numel()))
