"""What only Triton's kernels are asked: their tiles in the interpreter, and kernel sets that answer otherwise than theirs."""

from dataclasses import replace

import pytest
import torch
from test_gpu_backends import (  # noqa: F401 (a fixture)
    DEVICE,
    PLAIN,
    RICH,
    _small_slabs,
    assert_contract,
    sample_of,
    truth_and_dense,
)

from isdaa_kernels import linear_logprob
from isdaa_kernels.backends import triton as triton_backend
from isdaa_kernels.backends.gpu import backward_pass
from isdaa_kernels.backends.gpu import plan as plans
from isdaa_kernels.backends.gpu.call import Call
from isdaa_kernels.backends.triton.launch import TritonKernels
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.testing import FlopCounter, Sample, poisoned_empty


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def ours(sample: Sample, **options) -> tuple[torch.Tensor, ...]:
    return sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets, bias=b, backend="triton", **options))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's products")
@pytest.mark.parametrize(("ignored", "share"), [(0.0, 1.0), (0.5, 0.5)])
def test_matrix_flop_of_the_fused_kernels(monkeypatch, ignored, share):
    """One product forward, one backward, and none for tokens that are ignored."""
    from triton.runtime.interpreter import InterpreterBuilder

    flop = 0
    plain = InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        nonlocal flop
        if a.data.shape[0] == 32:  # a tile; smaller ones add the targets' own entries
            flop += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    N, D, V = 128, 32, 256
    sample = sample_of(N, D, V, torch.bfloat16)
    sample.targets[: int(N * ignored)] = -100
    ours(sample)
    assert flop == 2 * share * 2 * N * D * V


# What a kernel set may answer beside what Triton's does: products of 16-bit factors left to the library, as CUDA's does on some GPUs.
class LibraryKernels(TritonKernels):
    def products(self, problem, aligned):
        return "library"


class InPlaceKernels(LibraryKernels):
    """Gradients written over the wider logits that they are made of."""

    narrows_in_place = True

    def gradient_logits(self, *, logits, **arguments):
        super().gradient_logits(logits=logits.clone(), **arguments)


class AlignedKernels(TritonKernels):
    def products(self, problem, aligned):
        return super().products(problem, aligned) if aligned else "library"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.usefixtures("_small_slabs")
def test_the_library_may_multiply_16_bit_factors(monkeypatch, dtype, head):
    """V = 300: the last chunk is narrower than its buffer. Where the gradient lies changes no bit of it."""
    sample = sample_of(700 if DEVICE == "cuda" else 90, 40, 300, dtype, bias=bool(head), ignored=0.3)
    sample.upstream *= 1e-5  # fp16 holds the gradients of such coefficients only times a power of two
    truth, dense = truth_and_dense(sample, **head)
    results = []
    for kernels in (LibraryKernels(), InPlaceKernels()):
        monkeypatch.setattr(triton_backend, "_kernels", lambda kernels=kernels: kernels)
        results.append(ours(sample, **head))
    assert_contract(results[0], dense, truth)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("kernels", "shared"), [(LibraryKernels(), False), (InPlaceKernels(), True)])
def test_the_plan_counts_the_chunks_of_the_library(kernels, shared):
    """Only the chunk and what is folded from it differ from what a fused product needs."""
    T, C = 64, 300
    call = Call(kernels, Problem(DEVICE, torch.bfloat16, torch.bfloat16, 100, 40, C))
    logits_TC, gradient_TC = backward_pass._buffers(call, T, C, torch.device(DEVICE))
    assert (logits_TC.shape, logits_TC.dtype, gradient_TC.dtype) == ((T, C), torch.float32, torch.bfloat16)
    assert (gradient_TC.data_ptr() == logits_TC.data_ptr()) == shared
    assert gradient_TC.stride() == ((2 if shared else 1) * C, 1)
    allocated = logits_TC.nbytes + (0 if shared else gradient_TC.nbytes)
    assert plans._gradient_bytes(call, T, C) - 8 * C - T // 16 * C * 4 == allocated
    assert call.dtype == torch.bfloat16
    mixed = Call(kernels, replace(call.problem, weight_dtype=torch.float32))
    assert (mixed.dtype, mixed.in_place, plans._gradient_bytes(mixed, T, C) - 8 * C - T // 16 * C * 4) == (
        torch.float32,
        True,
        T * C * 4,
    )


@pytest.mark.parametrize(("gap", "units"), [(8, 2.0), (1, 4.0)])
def test_a_kernel_set_is_told_how_the_rows_lie(monkeypatch, gap, units):
    """In each of forward and backward the library makes a product more where rows are off the 16-byte borders."""
    monkeypatch.setattr(triton_backend, "_kernels", AlignedKernels)
    N, D, V = (1024 if DEVICE == "cuda" else 64), 24, 150
    sample = sample_of(N, D, V, torch.bfloat16)
    truth, dense = truth_and_dense(sample)
    wide = torch.full((V, D + gap), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, :D] = sample.weight
    sample.weight = wide[:, :D]
    hidden, weight = sample.hidden.requires_grad_(), sample.weight.requires_grad_()
    with FlopCounter() as counter:
        out = linear_logprob(hidden, weight, sample.targets, backend="triton")
        grads = torch.autograd.grad(out, (hidden, weight), sample.upstream)
    assert_contract((out.detach(), *grads), dense, truth)
    assert counter.flop == units * 2 * N * D * V
