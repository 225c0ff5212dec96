"""Targets: shifting labels, and what becomes of a target that names no vocabulary row.

N tokens, V vocabulary, S sequences.
"""

import torch
from torch import Tensor

_first_bad: dict[torch.device, Tensor] = {}  # one word a device: [flag, index, value] of the first bad target


def shift_targets(labels: Tensor, *, cu_seqlens: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Targets of next-token prediction: `targets[..., i] = labels[..., i + 1]`, the last of each sequence `ignore_index`.

    labels [..., T] integers (the token at each position, or `ignore_index` where it is not scored). With `cu_seqlens` [S + 1]
    the last axis holds S packed sequences and no target crosses a border. Same shape and dtype; no device sync.
    Raises ValueError for labels that are not integers or without an axis.
    """
    if labels.dim() == 0 or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels: expected an int32 or int64 tensor [..., T], got {labels.dtype} {list(labels.shape)}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    targets = torch.full_like(labels, ignore_index)
    targets[..., :-1] = labels[..., 1:]
    if cu_seqlens is not None:
        position_T = torch.arange(labels.shape[-1], device=labels.device)
        last_T = torch.isin(position_T + 1, cu_seqlens.to(labels.device))
        targets = torch.where(last_T, ignore_index, targets)
    return targets


def bad_targets(targets_N: Tensor, V: int, ignore_index: int) -> Tensor:
    """bool [N]: neither `ignore_index` nor a vocabulary row."""
    return (targets_N != ignore_index) & ((targets_N < 0) | (targets_N >= V))


def raise_bad_targets(targets_N: Tensor, V: int, ignore_index: int) -> None:
    """Raise ValueError with the first target outside the vocabulary. Reads a value: on a device this waits for it."""
    bad_N = bad_targets(targets_N, V, ignore_index)
    if bool(bad_N.any()):
        index = int(bad_N.nonzero()[0, 0])
        raise ValueError(_sentence(index, int(targets_N[index]), V, ignore_index))


def scored_rows(targets_N: Tensor, ignore_index: int, max_scored: int) -> Tensor:
    """Indices of the targets that are scored, in their order; ValueError where `max_scored` promised fewer. For the CPU: reads a count."""
    rows = (targets_N != ignore_index).nonzero()[:, 0]
    if len(rows) > max_scored:
        raise ValueError(f"max_scored: expected at least the {len(rows)} targets that are scored, got {max_scored}")
    return rows


def report_bad_targets(targets_N: Tensor, V: int, ignore_index: int, max_scored: int) -> None:
    """On the CPU raise for targets outside the vocabulary and for more scored ones than promised; on a device keep the first bad one."""
    if targets_N.device.type == "cpu":
        raise_bad_targets(targets_N, V, ignore_index)
        scored_rows(targets_N, ignore_index, max_scored)
    else:
        record_bad_targets(bad_targets(targets_N, V, ignore_index), targets_N)


def record_bad_targets(bad_N: Tensor, targets_N: Tensor) -> None:
    """Keep the first bad (index, value) in a word on the device, without a sync; `check` reads it. The word stays where it is, so that
    a captured CUDA graph finds it again."""
    if bad_N.numel() == 0:
        return
    device = bad_N.device
    if device not in _first_bad:
        _first_bad[device] = torch.zeros(3, dtype=torch.int64, device=device)
    word = _first_bad[device]
    index = bad_N.to(torch.int8).argmax()
    found = torch.stack([bad_N.any().to(torch.int64), index, targets_N.index_select(0, index[None])[0].to(torch.int64)])
    word.copy_(torch.where(word[0] > 0, word, found))


def check() -> None:
    """Raise ValueError if a call on a device met a target outside the vocabulary since the last check. Waits for the devices."""
    words = {device: word.tolist() for device, word in _first_bad.items()}
    for word in _first_bad.values():
        word.zero_()
    for device, (flag, index, value) in words.items():
        if flag:
            raise ValueError(
                f"targets: {value} at index {index} on {device} is outside the vocabulary; its log-prob is NaN"
            )


def _sentence(index: int, value: int, V: int, ignore_index: int) -> str:
    return f"targets: expected {ignore_index} (ignored) or a value in [0, {V}), got {value} at index {index}"
