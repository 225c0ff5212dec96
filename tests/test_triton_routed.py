"""What only Triton's routed kernels are asked: their tiles in the interpreter, and for every architecture."""

from dataclasses import replace

import pytest
import torch
from test_gpu_backends_routed import BARS, DEVICE, assert_close, defined, sample_of, some_order

from isdaa_kernels import Routed, linear_logprob
from isdaa_kernels.backends import triton as backend
from isdaa_kernels.backends.triton.launch import TritonKernels
from isdaa_kernels.backends.triton.tile_config import TileConfig, arch_of, override_key, using_tile_config
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.testing import FlopCounter, Sample, poisoned_empty, relative_error


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def ours(sample: Sample, gradient, **options) -> tuple[torch.Tensor, ...]:
    return sample.grads(
        lambda h, w, b: linear_logprob(h, w, sample.targets, bias=b, gradient=gradient, backend="triton", **options)
    )


class LibraryKernels(TritonKernels):
    """A kernel set that leaves products of 16-bit factors to the library, as CUDA's does on some GPUs."""

    def products(self, problem, aligned):
        return "library"


def test_the_library_may_multiply_16_bit_factors(monkeypatch):
    monkeypatch.setattr(backend, "_kernels", LibraryKernels)
    sample = sample_of(dtype=torch.bfloat16, bias=True, ignored=0.3)
    gradient, options = Routed(1e-2, block=64), {"vocab_order": some_order()}
    with FlopCounter() as counter:
        found = ours(sample, gradient, **options)
    assert (
        counter.flop == 2 * 64 * 24 * 300 if DEVICE == "cpu" else counter.flop > 0
    )  # the forward's, two slabs of 32 tokens
    assert_close(found, defined(sample, gradient, **options), BARS[torch.bfloat16])


# All pairs of a group of blocks at once, or each block's list: which of them it is shows in no number but the order of a sum.
@pytest.mark.parametrize("percent", [0, 1000])
@pytest.mark.parametrize("tolerance", [1e-2, pytest.param(0.0, marks=pytest.mark.slow)])
def test_both_ways_to_sum_the_gradient_of_hidden(monkeypatch, percent, tolerance):
    from isdaa_kernels.backends.triton import launch_routed

    monkeypatch.setattr(launch_routed, "DENSE_PERCENT", percent)
    monkeypatch.setattr(launch_routed, "GROUP_ROWS", 128)
    sample = sample_of(ignored=0.3)
    hidden = sample.hidden.requires_grad_()

    def d_hidden(name: str):
        out = linear_logprob(hidden, sample.weight, sample.targets, gradient=Routed(tolerance, block=64), backend=name)
        return torch.autograd.grad(out, hidden, sample.upstream)[0]

    assert relative_error(d_hidden("triton"), d_hidden("reference")) < 2e-6


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's products")
def test_only_what_is_routed_costs_products(monkeypatch):
    """Tiles of each block's own number of tokens, rounded up; the rest costs the width of the number of blocks."""
    from triton.runtime.interpreter import InterpreterBuilder

    from isdaa_kernels.backends.gpu import routed_pass

    made, seen = {}, []
    plain, routing = InterpreterBuilder.create_dot, routed_pass.Routing

    def counting(self, a, b, *rest):
        shape = (*a.data.shape, b.data.shape[1])
        made[shape] = made.get(shape, 0) + 1
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    monkeypatch.setattr(routed_pass, "Routing", lambda *args: seen.append(routing(*args)) or seen[0])
    N, D, V = 90, 32, 640
    sample = sample_of(N, D, V, torch.bfloat16, sharpness=9.0)
    ours(sample, Routed(1e-2, block=64, row_share=0.5))
    route_BL = seen[0].route_BL
    both_B, hidden_B = (route_BL > 0).sum(1), (route_BL == 2).sum(1)
    assert both_B.sum() < 0.5 * N * V / 64
    assert made[32, 32, 64] == (-(-both_B // 32)).sum()  # logits: tokens x D x rows of a block
    assert made[64, 32, 64] == (-(-both_B // 32)).sum()  # d_weight: rows of a block x tokens x D
    assert (
        (-(-hidden_B // 16)).sum() <= made[16, 64, 64] <= (-(-hidden_B // 16)).sum() + 10
    )  # d_hidden: a block's list in two spans
    assert made[32, 64, 32] == 2 * 2  # the rest: two halves, blocks x tokens x D
    assert made[64, 32, 32] == 3 * 2  # tokens x blocks x D


def test_tiles_that_are_wider_than_a_block():
    sample = sample_of(dtype=torch.bfloat16)
    problem = Problem.of(sample.hidden, sample.weight, 45)
    wide = TileConfig(32, 128, 32, num_warps=4, num_stages=1)
    with using_tile_config(override_key(problem, arch_of(problem), "forward", "plain"), wide):
        with pytest.raises(ValueError, match=r"gradient: expected blocks of a multiple of 128 rows .*, got 64"):
            ours(sample, Routed(block=64))
        assert_close(ours(sample, Routed(1e-2)), defined(sample, Routed(1e-2)), BARS[torch.bfloat16])


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_the_plan(arch, block):
    """Half a gibibyte beside the fp32 sums of d_hidden, as without routing; the budget is kept; everything routed costs what exact does."""
    N, D, V = 8192, 4096, 128256
    exact = Problem("cuda", torch.bfloat16, torch.bfloat16, N, D, V, keep_logits=True, arch=arch)
    problem = replace(exact, routed=Routed(block=block))
    default = backend.make_plan(problem)
    assert default.bytes <= (512 << 20) + 4 * N * D
    assert (default.units, default.split, default.vocab_tile % block) == (backend.make_plan(exact).units, False, 0)
    tight = backend.make_plan(replace(problem, max_workspace_mb=400.0))
    assert tight.bytes <= 400 << 20
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least"):
        backend.make_plan(replace(problem, max_workspace_mb=50.0))
    for frozen in ({"need_hidden": False}, {"need_weight": False}):
        assert backend.make_plan(replace(problem, **frozen)).units == 3.0
