"""Shifted labels, and targets outside the vocabulary."""

import pytest
import torch

from isdaa_kernels import check, shift_targets, targets
from isdaa_kernels.backends.reference import compact
from isdaa_kernels.targets import bad_targets, record_bad_targets


def test_shift_of_padded_batches():
    labels = torch.tensor([[1, 2, 3], [4, -100, 6]])
    assert shift_targets(labels).tolist() == [[2, 3, -100], [-100, 6, -100]]
    assert shift_targets(labels, ignore_index=0).tolist() == [[2, 3, 0], [-100, 6, 0]]


def test_shift_stops_at_the_borders_of_packed_sequences():
    labels = torch.arange(7, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 3, 3, 4, 7])  # lengths 3, 0, 1, 3
    targets = shift_targets(labels, cu_seqlens=cu_seqlens)
    assert targets.tolist() == [1, 2, -100, -100, 5, 6, -100]
    assert targets.dtype == torch.int32
    assert shift_targets(labels[None], cu_seqlens=cu_seqlens)[0].tolist() == targets.tolist()


def test_shift_refuses_what_is_no_label():
    with pytest.raises(ValueError, match="labels: expected an int32 or int64 tensor"):
        shift_targets(torch.ones(3))
    with pytest.raises(ValueError, match="labels: expected an int32 or int64 tensor"):
        shift_targets(torch.tensor(3))
    with pytest.raises(ValueError, match="cu_seqlens: expected int32 or int64"):
        shift_targets(torch.tensor([1, 2]), cu_seqlens=torch.tensor([0.0, 2.0]))
    assert shift_targets(torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_check_raises_once_with_the_first_bad_target():
    targets = torch.tensor([3, -100, 9, -4])
    record_bad_targets(bad_targets(targets, 10, -100), targets)
    record_bad_targets(bad_targets(targets[:3], 5, -100), targets[:3])  # a later call does not hide the first
    with pytest.raises(ValueError, match="targets: -4 at index 3 on cpu is outside the vocabulary"):
        check()
    check()
    record_bad_targets(bad_targets(targets[:2], 10, -100), targets[:2])
    record_bad_targets(bad_targets(targets[:0], 10, -100), targets[:0])
    check()


def test_compaction_keeps_the_order():
    scored = torch.tensor([False, True, True, False, True])
    assert compact(scored, 3).tolist() == [1, 2, 4]
    assert compact(scored, 5).tolist() == [1, 2, 4, 0, 3]


def test_the_word_of_a_device_stays_where_it_is():
    """A captured CUDA graph writes to the word it saw."""
    first = torch.tensor([1, 99, 3, 77])
    record_bad_targets(first > 50, first)
    word = targets._first_bad[first.device]
    record_bad_targets(torch.tensor([True]), torch.tensor([55]))
    with pytest.raises(ValueError, match="99 at index 1"):
        check()
    check()
    record_bad_targets(torch.tensor([True]), torch.tensor([55]))
    assert targets._first_bad[first.device] is word
    with pytest.raises(ValueError, match="55 at index 0"):
        check()
