"""Factors for the log-probs of single tokens, before they are summed over a completion. Letters: N tokens of a packed batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.objectives.options import is_finite_number


@dataclass(frozen=True)
class TokenPlace:
    """Where each token stands, fp64 [N]; what it says of tokens that are not scored is not used."""

    position: Tensor  # scored tokens before it in its completion
    length: Tensor  # scored tokens of its completion
    other_length: Tensor  # of the shorter one, if several, of the completions that it is paired with


def tail_weight(place: TokenPlace, *, tail_weight: float = 0.5) -> Tensor:
    """1 for the first min(|chosen|, |rejected|) tokens of a completion, `tail_weight` beyond; [N].

    Liu et al. 2024 (LD-DPO, arXiv 2409.06411), where it is called alpha. One number: a completion may be in several pairs.
    """
    in_both = place.position < torch.minimum(place.length, place.other_length)
    # where() of two numbers would round them to fp32
    return torch.where(in_both, torch.ones_like(place.position), tail_weight)


@torch.no_grad()
def guidance_weight(
    reward_log_ratio: Tensor, chosen: Tensor, *, beta: float = 0.1, guidance: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """1 + guidance beta r for the tokens of chosen completions, 1 - guidance beta r for those of rejected ones; fp64 [N].

    The `token_weight` of `tgdpo` (Zhu et al. 2025, arXiv 2506.14574), whose alpha is guidance and whose code has 0.5 and beta 0.1.

    reward_log_ratio    [N], r: log-probs under a frozen policy that was trained by DPO or SimPO, minus those of the reference.
    chosen              bool [N], True at the tokens of a chosen completion (`chosen_tokens`).
    mask                bool [N], True where a token is scored; None: all. The others have 1, whatever lies there.
    """
    if reward_log_ratio.ndim != 1 or not reward_log_ratio.is_floating_point():
        raise ValueError(
            f"reward_log_ratio: expected a floating tensor [N], got {reward_log_ratio.dtype} {list(reward_log_ratio.shape)}"
        )
    for name, tensor in (("chosen", chosen), ("mask", mask)):
        if tensor is not None and (tensor.dtype != torch.bool or tensor.shape != reward_log_ratio.shape):
            raise ValueError(
                f"{name}: expected bool {list(reward_log_ratio.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, value in (("beta", beta), ("guidance", guidance)):
        if not is_finite_number(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    shift_N = guidance * beta * reward_log_ratio.double()
    weight_N = 1 + torch.where(chosen, shift_N, -shift_N)
    return weight_N if mask is None else torch.where(mask, weight_N, 1)


def chosen_tokens(cu_seqlens: Tensor, N: int, pairs: Tensor | None = None) -> Tensor:
    """True at the tokens of a chosen completion; bool [N]. pairs: [P, 2] rows; None: the first half of the completions is chosen."""
    S = cu_seqlens.numel() - 1
    chosen_S = torch.zeros(S, dtype=torch.bool, device=cu_seqlens.device)
    rows = torch.arange(S // 2, device=cu_seqlens.device) if pairs is None else pairs[:, 0].long()
    return chosen_S.index_fill(0, rows, True)[_completion(cu_seqlens, N)]


@torch.no_grad()
def divergent_tokens(tokens: Tensor, cu_seqlens: Tensor, pairs: Tensor | None = None) -> Tensor:
    """1 from the first token on at which a completion differs from the one that it is paired with, 0 before; fp64 [N].

    The `token_weight` of `mcts_dpo` (Xie et al. 2024, arXiv 2405.00451): two completions that share their first steps are compared from
    where they part.

    tokens        [N] int32 or int64, the targets of a packed batch.
    cu_seqlens    [S + 1], where sequences start, and N.
    pairs         [P, 2] rows of chosen and rejected; None: p and P + p. A completion in several pairs has the first difference to any.

    Where one is the beginning of the other, the longer one has 1 from the first token more. Equal ones have 0 throughout. Sequences are
    compared from their start, prompts too, which are to be the same in both. For a collator: it waits for a device.
    """
    if tokens.ndim != 1 or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens: expected int32 or int64 [N], got {tokens.dtype} {list(tokens.shape)}")
    _check_ends(cu_seqlens, tokens.numel())
    N, S = tokens.numel(), cu_seqlens.numel() - 1
    if pairs is None:
        if S % 2:
            raise ValueError(
                f"cu_seqlens: expected an even number of sequences, chosen then rejected, or pairs; got {S}"
            )
        pairs = torch.arange(S, device=tokens.device).view(2, -1).T
    starts_S, completion_N = cu_seqlens[:-1].long(), _completion(cu_seqlens, N)
    length_S = cu_seqlens.diff().long()
    place_N = torch.arange(N, device=tokens.device) - starts_S[completion_N]
    first_S = torch.full((S,), N, device=tokens.device)
    for own_P, other_P in ((pairs[:, 0].long(), pairs[:, 1].long()), (pairs[:, 1].long(), pairs[:, 0].long())):
        first_S = _first_difference(first_S, own_P, other_P, tokens, starts_S, length_S)
    return (place_N >= first_S[completion_N]).double()


def _first_difference(
    first_S: Tensor, own_P: Tensor, other_P: Tensor, tokens: Tensor, starts_S: Tensor, length_S: Tensor
) -> Tensor:
    """The least of `first` and of the places where the tokens of `own` and `other` differ."""
    N, P = tokens.numel(), len(own_P)
    if N == 0 or P == 0:
        return first_S
    # every token of the batch against each pair would be P N numbers: one of each pair's own tokens, laid end to end
    end_P = length_S[own_P].cumsum(0)
    place = torch.arange(int(end_P[-1]), device=tokens.device)
    pair = torch.bucketize(place, end_P, right=True)
    within = place - (end_P - length_S[own_P])[pair]
    beyond = within >= length_S[other_P][pair]
    other = tokens[(starts_S[other_P][pair] + within).clamp(max=N - 1)]
    differs = beyond | (tokens[starts_S[own_P][pair] + within] != other)
    return first_S.scatter_reduce(0, own_P[pair], torch.where(differs, within, N), "amin")


@torch.no_grad()
def step_cu_seqlens(cu_seqlens: Tensor, steps: Tensor) -> Tensor:
    """Where the steps of completions start, and N: [T + 1], T steps in all. For a collator: it waits for a device.

    cu_seqlens    [S + 1], where completions start, and N.
    steps         [N] integers, the step of each token within its completion; a new one begins where it changes.

    Every completion starts a step. A batch cut by it has steps for completions: in `sequence_logprob`, for `dapo_direct` in
    `linear_preference_loss`, as `step_cu_seqlens` of `policy_loss`.
    """
    if steps.ndim != 1 or steps.is_floating_point() or steps.is_complex():
        raise ValueError(f"steps: expected integers [N], got {steps.dtype} {list(steps.shape)}")
    _check_ends(cu_seqlens, steps.numel())
    changes = (steps[1:] != steps[:-1]).nonzero().flatten() + 1
    return torch.cat([cu_seqlens.long(), changes]).unique().to(cu_seqlens.dtype)


def _check_ends(cu_seqlens: Tensor, N: int) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        raise ValueError(f"cu_seqlens: expected int32 or int64 [S + 1], got {cu_seqlens!r}")
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != N or ends != sorted(ends):
        raise ValueError(f"cu_seqlens: expected non-decreasing values from 0 to {N}, got {ends}")


def _completion(cu_seqlens: Tensor, N: int) -> Tensor:
    """The row of each token's completion; [N]."""
    return torch.bucketize(torch.arange(N, device=cu_seqlens.device), cu_seqlens[1:].long(), right=True)
