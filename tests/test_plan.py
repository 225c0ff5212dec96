"""The planner: what it promises is what is allocated and multiplied."""

from types import SimpleNamespace

import pytest
import torch

from isdaa_kernels import Routed, linear_logprob, plan
from isdaa_kernels.backends.cuda import extension
from isdaa_kernels.testing import FlopCounter, make_sample


@pytest.fixture(autouse=True)
def _without_cuda_kernels(monkeypatch):
    """Alike whether nvcc was there or not."""
    monkeypatch.setattr(extension, "native", None)


def test_more_workspace_buys_less_work():
    small, middle, large = (plan(4096, 49152, 576, max_workspace_mb=mb) for mb in (64, 400, 900))
    assert (small.kept_tokens % 128, middle.kept_tokens % 128, large.kept_tokens) == (0, 0, 4096)
    assert 4.0 > small.units > middle.units > large.units == 3.0
    assert small.bytes < 64 << 20 < middle.bytes < 400 << 20
    assert plan(4096, 49152, 576).units == 4.0
    frozen = plan(4096, 49152, 576, frozen_head=True)
    assert (frozen.units, frozen.hidden_in_forward) == (2.0, True)
    assert 4096 * 576 * 4 < frozen.bytes < 4096 * 576 * 4 + (64 << 20)
    assert "forward prepares the backward" in str(frozen)
    tight = plan(65536, 49152, 576, frozen_head=True, max_workspace_mb=64)  # no room for 144 MiB
    assert tight.units > 2.9
    assert not tight.hidden_in_forward
    assert plan(4096, 49152, 576, frozen_head=True, frozen_hidden=True).units == 1.0


def test_a_16_bit_hidden_that_does_not_fit_takes_two_passes():
    tight = plan(8192, 131072, 4096, torch.bfloat16, max_workspace_mb=64)
    assert (tight.split, tight.units, tight.token_tile) == (True, 5.0, 256)
    assert not plan(8192, 131072, 4096, torch.bfloat16, max_workspace_mb=256).split
    assert plan(8192, 131072, 4096, torch.bfloat16, frozen_head=True, max_workspace_mb=64).units == 3.0


def test_memory_by_default_does_not_grow_with_the_tokens():
    few, many = (plan(N, 49152, 576).bytes for N in (4096, 65536))
    assert (many - few) / (65536 - 4096) <= 64  # bytes a token
    assert many < 40 << 20


def test_a_small_budget_takes_smaller_tiles_first():
    tiles = [plan(4096, 49152, 576, torch.bfloat16, max_workspace_mb=mb) for mb in range(80, 20, -2)]
    one_pass = [t.token_tile for t in tiles if not t.split]
    assert one_pass == sorted(one_pass, reverse=True)
    assert len(set(one_pass)) >= 4
    assert [t.split for t in tiles] == sorted(t.split for t in tiles)  # two passes only where no tile is small enough


def test_it_is_printable_and_refuses_nonsense():
    assert "tiles of 1024 tokens x 2048 vocabulary rows" in str(plan(4096, 49152, 576))
    with pytest.raises(ValueError, match="N: expected a positive number, got 0"):
        plan(0, 5, 5)
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least"):
        plan(4096, 49152, 576, max_workspace_mb=1)
    with pytest.raises(ValueError, match=r"dtype: expected a floating dtype, got torch\.int8"):
        plan(4, 5, 6, torch.int8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [None, 8.0, 14.0, 40.0])
def test_the_units_of_the_plan_are_counted(backend, dtype, workspace):
    N, D, V = 768, 32, 6000
    sample = make_sample(N, D, V, dtype)
    promised = plan(N, V, D, dtype, max_workspace_mb=workspace, backend=backend)
    with FlopCounter() as counter:
        sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets, max_workspace_mb=workspace, backend=backend))
    assert counter.flop / (2 * N * D * V) == pytest.approx(promised.units, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [None, 24.0, 64.0])
@pytest.mark.parametrize(("coefficient", "transposed"), [(1.0, False), (1e-30, False), (1.0, True)])
def test_the_bytes_of_the_plan_hold(dtype, workspace, coefficient, transposed):
    """PyTorch's own account of what is alive: never more than the plan beyond inputs, output and gradients."""
    N, D, V = 1500, 256, 6000
    sample = make_sample(N, D, V, dtype)
    hidden, weight = (x.t().contiguous().t() if transposed else x for x in (sample.hidden, sample.weight))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    upstream = sample.upstream * coefficient
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_logprob(hidden, weight, sample.targets, max_workspace_mb=workspace, backend="cpu").backward(upstream)
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
    assert peak > gradients
    assert peak - gradients <= plan(N, V, D, dtype, max_workspace_mb=workspace).bytes + (64 << 10)


# The sizes of current models. Beside the fp32 sums of d_hidden (4 D bytes a token) the default is 512 MiB.
@pytest.mark.parametrize(
    ("backend", "arch"),
    [("triton", arch) for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")]
    + [("cuda", arch) for arch in ("sm_80", "sm_90", "sm_100")],
)
@pytest.mark.parametrize(
    ("N", "D", "V"),
    [(8192, 4096, 128256), (8192, 4096, 151936), (16384, 2048, 248320), (8192, 2304, 256000), (262144, 2048, 131072)],
)
def test_the_plan_of_a_gpu_that_is_not_here(monkeypatch, N, D, V, backend, arch):
    monkeypatch.setattr(extension, "native", SimpleNamespace(emulated=False, archs="80,90a,100a"))
    there = {"device": "cuda", "arch": arch, "backend": backend}
    default = plan(N, V, D, torch.bfloat16, **there)
    assert (default.backend, default.units, default.split) == (backend, 4.0, False)
    assert default.bytes <= (512 << 20) + 4 * N * D
    frozen = plan(N, V, D, torch.bfloat16, frozen_head=True, **there)
    assert (frozen.units, frozen.bytes <= 512 << 20) == (3.0, True)
    tight = plan(N, V, D, torch.bfloat16, max_workspace_mb=512 + 64 * N / 2**20, **there)
    assert tight.bytes <= (512 << 20) + 64 * N
    assert tight.units == (5.0 if tight.split else 4.0)
    assert tight.split == (N == 262144)
    assert plan(N, V, D, torch.float32, **there).units == 4.0


def test_one_slab_of_an_8b_model_fits_into_half_a_gibibyte():
    assert plan(8192, 128256, 4096, torch.bfloat16, device="cuda", arch="sm_90").bytes <= 512 << 20


def test_without_a_budget_nothing_is_refused():
    for N, D, V in ((8192, 4096, 901629), (1, 16384, 3_000_000)):
        assert plan(N, V, D, torch.bfloat16, arch="sm_90").units == 4.0


def test_few_bytes_move():
    """Chunks at least as wide as slabs are high: d_hidden is summed more often than d_weight."""
    for N, D, V in ((65536, 4096, 128256), (262144, 2048, 131072)):
        made = plan(N, V, D, torch.bfloat16, arch="sm_90")
        assert made.vocab_tile >= made.token_tile


def test_an_architecture_names_a_gpu():
    assert plan(10, 20, 30, arch="sm_90").backend == "triton"
    assert plan(10, 20, 30).backend == "cpu"
    with pytest.raises(ValueError, match="arch: expected None for device cpu, got 'sm_90'"):
        plan(10, 20, 30, device="cpu", arch="sm_90")


def test_slabs_waste_few_tokens():
    for N in (1, 255, 257, 8193, 16385, 100001):
        made = plan(N, 128256, 4096, torch.bfloat16, device="cuda", arch="sm_90")
        slabs = -(-N // made.token_tile)
        assert made.token_tile % 256 == 0
        assert 0 <= slabs * made.token_tile - N < 256 * slabs


def test_a_budget_that_is_too_small_names_the_least():
    with pytest.raises(
        ValueError, match=r"max_workspace_mb: expected at least (\d+\.\d) for this problem, got 10"
    ) as error:
        plan(8192, 128256, 4096, torch.bfloat16, device="cuda", arch="sm_90", max_workspace_mb=10)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert plan(8192, 128256, 4096, torch.bfloat16, device="cuda", arch="sm_90", max_workspace_mb=least + 0.1).split


def test_a_routed_plan_counts_what_the_routes_need():
    routed = Routed(block=128)
    exact, found = (plan(4096, 49152, 576, gradient=gradient) for gradient in ("exact", routed))
    pairs = 4096 * 384
    assert exact.bytes < found.bytes
    assert found.bytes >= 5 * pairs  # a byte and a number each, beside the blocks' log-sum-exps
    assert found.units == exact.units == 4.0  # the most it can cost
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least") as refusal:
        plan(4096, 49152, 576, gradient=routed, max_workspace_mb=8)
    least = float(str(refusal.value).split("at least ")[1].split()[0])
    tight = plan(4096, 49152, 576, gradient=routed, max_workspace_mb=least)
    assert tight.token_tile == 128
    assert tight.bytes <= least * 2**20
    on_gpu = plan(8192, 128256, 4096, torch.bfloat16, arch="sm_90", gradient=routed)
    assert on_gpu.bytes <= 512 << 20
