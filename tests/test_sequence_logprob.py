"""sequence_logprob: packed and padded sums and means. Letters: N tokens, S sequences, T tokens of a padded row."""

import math

import pytest
import torch

from isdaa_kernels.sequence_logprob import check_cu_seqlens, sequence_length, sequence_logprob

# Four sequences, one of them without tokens and one without scored tokens.
CU_SEQLENS = torch.tensor([0, 3, 3, 7, 9])
LOGPROB = torch.tensor([-1.0, -2.0, -4.0, -0.5, -0.25, -3.0, -8.0, -16.0, -32.0])
MASK = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 0], dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sum(dtype):
    total = sequence_logprob(LOGPROB, CU_SEQLENS.to(dtype))
    assert total.dtype == torch.float64
    assert total.tolist() == [-7.0, 0.0, -11.75, -48.0]
    assert sequence_logprob(LOGPROB, CU_SEQLENS.to(dtype), mask=MASK).tolist() == [-6.0, 0.0, -8.25, 0.0]


def test_packed_mean_is_over_scored_tokens():
    assert sequence_logprob(LOGPROB, CU_SEQLENS, mask=MASK, reduce="mean").tolist() == [-3.0, 0.0, -4.125, 0.0]
    assert sequence_length(MASK, CU_SEQLENS).tolist() == [2.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_padded_equals_packed(reduce, weighted):
    weight = torch.arange(1.0, 10.0) if weighted else None
    packed = sequence_logprob(LOGPROB, CU_SEQLENS, mask=MASK, reduce=reduce, token_weight=weight)
    padded = torch.full((3, 4, 4), math.nan)  # log-prob, weight, mask; padding that must not be read
    mask = torch.zeros(4, 4, dtype=torch.bool)
    for s, (start, end) in enumerate(zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True)):
        padded[0, s, : end - start] = LOGPROB[start:end]
        padded[1, s, : end - start] = torch.arange(1.0, 10.0)[start:end]
        mask[s, : end - start] = MASK[start:end]
    result = sequence_logprob(padded[0], mask=mask, reduce=reduce, token_weight=padded[1] if weighted else None)
    torch.testing.assert_close(result, packed, rtol=0, atol=0)


def test_token_weight_values():
    weight = torch.tensor([9.0, 1.0, 0.5, 9.0, -1.0, 9.0, 0.0, 9.0, 9.0])
    total = sequence_logprob(LOGPROB, CU_SEQLENS, mask=MASK, token_weight=weight)
    assert total.tolist() == [-4.0, 0.0, 0.25, 0.0]
    mean = sequence_logprob(LOGPROB, CU_SEQLENS, mask=MASK, token_weight=weight, reduce="mean")
    assert mean.tolist() == [-2.0, 0.0, 0.125, 0.0]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient(reduce, dtype):
    logprob = LOGPROB.clone().to(dtype).requires_grad_()
    weight = torch.tensor([2.0, 1.0, 0.5, 2.0, -1.0, 2.0, 0.0, 2.0, 2.0])
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    sequence_logprob(logprob, CU_SEQLENS, mask=MASK, reduce=reduce, token_weight=weight).backward(upstream)
    expected = torch.tensor([0, 1.0, 0.5, 0, -100.0, 0, 0, 0, 0], dtype=dtype)
    assert logprob.grad.dtype == dtype
    torch.testing.assert_close(logprob.grad, expected / (2 if reduce == "mean" else 1), rtol=0, atol=0)


def test_gradcheck():
    logprob = LOGPROB.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_logprob(x, CU_SEQLENS, mask=MASK, reduce="mean"), logprob)
    assert torch.autograd.gradcheck(lambda x: sequence_logprob(x, CU_SEQLENS), logprob)


# 32768 tokens: the length at which a sum in fp32 is off by about 0.006.
def test_long_sums_are_exact():
    generator = torch.Generator().manual_seed(0)
    logprob = -torch.rand(2 * 32768, generator=generator) * 4
    cu_seqlens = torch.tensor([0, 32768, 65536])
    exact = [math.fsum(half.tolist()) for half in logprob.split(32768)]
    assert sequence_logprob(logprob, cu_seqlens).tolist() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_stays_in_its_sequence_and_under_its_mask(masked):
    logprob = LOGPROB.clone()
    logprob[3] = math.nan  # not scored under MASK
    logprob.requires_grad_()
    total = sequence_logprob(logprob, CU_SEQLENS, mask=MASK if masked else None)
    total.sum().backward()
    assert total.isnan().tolist() == [False, False, not masked, False]
    assert logprob.grad.tolist() == (MASK.double() if masked else torch.ones(9)).tolist()


def test_a_nan_weight_under_the_mask_is_not_read():
    weight = torch.where(MASK, 2.0, math.nan)
    logprob = LOGPROB.clone().requires_grad_()
    sequence_logprob(logprob, CU_SEQLENS, mask=MASK, token_weight=weight).sum().backward()
    assert logprob.grad.tolist() == (2.0 * MASK).tolist()


def test_empty_batches():
    assert sequence_logprob(torch.zeros(0), torch.tensor([0])).tolist() == []
    assert sequence_logprob(torch.zeros(0), torch.tensor([0, 0, 0])).tolist() == [0.0, 0.0]
    mask = torch.zeros(2, 0, dtype=torch.bool)
    assert sequence_logprob(torch.zeros(2, 0), mask=mask, reduce="mean").tolist() == [0.0, 0.0]


def test_cu_seqlens_values_are_read_on_the_cpu_only():
    check_cu_seqlens(torch.empty(3, dtype=torch.int32, device="meta"), 7, torch.device("meta"))
    with pytest.raises(RuntimeError):  # no values to read: validate tried
        check_cu_seqlens(torch.empty(3, dtype=torch.int32, device="meta"), 7, torch.device("meta"), validate=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"logprob": LOGPROB[None]},
            r"logprob: expected a floating tensor \[N\] \(packed, .* got torch.float32 \[1, 9\]",
        ),
        ({"logprob": LOGPROB.long()}, r"logprob: expected a floating tensor \[N\] .* got torch.int64 \[9\]"),
        ({"cu_seqlens": None}, r"logprob: expected a floating tensor \[S, T\] \(padded\), got torch.float32 \[9\]"),
        (
            {"cu_seqlens": None, "logprob": LOGPROB[None], "mask": None},
            r"mask: expected a bool tensor \[1, 9\] for a pad",
        ),
        ({"mask": None, "reduce": "mean"}, r"mask: expected a bool tensor \[9\] for reduce='mean', got None"),
        ({"reduce": "max"}, "reduce: expected 'sum' or 'mean', got 'max'"),
        ({"mask": MASK.long()}, r"mask: expected bool \[9\], got torch.int64 \[9\]"),
        ({"mask": MASK[:8]}, r"mask: expected bool \[9\], got torch.bool \[8\]"),
        ({"mask": MASK.to("meta")}, "mask: expected on cpu, got meta"),
        ({"token_weight": torch.ones(8)}, r"token_weight: expected \[9\], got torch.float32 \[8\]"),
        ({"cu_seqlens": [0, 9]}, r"cu_seqlens: expected a tensor \[S \+ 1\], got \[0, 9\]"),
        ({"cu_seqlens": CU_SEQLENS[None]}, r"cu_seqlens: expected a tensor \[S \+ 1\], got torch.int64 \[1, 5\]"),
        ({"cu_seqlens": CU_SEQLENS[:0]}, r"cu_seqlens: expected a tensor \[S \+ 1\], got torch.int64 \[0\]"),
        ({"cu_seqlens": CU_SEQLENS.double()}, "cu_seqlens: expected int32 or int64, got torch.float64"),
        ({"cu_seqlens": CU_SEQLENS.to("meta")}, "cu_seqlens: expected on cpu, got meta"),
        ({"cu_seqlens": CU_SEQLENS + 1}, r"non-decreasing values from 0 to 9, got \[1, 4, 4, 8, 10\]"),
        ({"cu_seqlens": torch.tensor([0, 8])}, r"non-decreasing values from 0 to 9, got \[0, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 9])}, r"non-decreasing values from 0 to 9, got \[0, 5, 3, 9\]"),
    ],
)
def test_bad_input(arguments, message):
    arguments = {"logprob": LOGPROB, "cu_seqlens": CU_SEQLENS, "mask": MASK, **arguments}
    with pytest.raises(ValueError, match=message):
        sequence_logprob(**arguments)
