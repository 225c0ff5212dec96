"""The CUDA backend beside what tests/test_gpu_backends.py asks of it: arguments, architectures, the plan, and single kernels. Run in the
emulator, on tensors of the CPU."""

import pytest
import torch
from emulated_cuda import emulated_module

from isdaa_kernels import explain_backends
from isdaa_kernels.backends import cuda
from isdaa_kernels.backends.cuda import extension
from isdaa_kernels.backends.cuda.launch import CudaKernels
from isdaa_kernels.dispatch import Problem, device_arch
from isdaa_kernels.routing import Routed


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(extension, "native", emulated_module())


def problem(**changes) -> Problem:
    return Problem(**{"device_type": "cuda", "hidden_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "N": 64, "D": 64,
                      "V": 300, "arch": "sm_90", **changes})  # fmt: skip


class Built:
    """As the module would look that was built for these architectures."""

    emulated = False

    def __init__(self, archs: str):
        self.archs = archs


@pytest.mark.parametrize(
    ("built", "arch", "takes"),
    [
        ("80,90a,100a", "sm_80", True),
        ("80,90a,100a", "sm_86", True),
        ("80,90a,100a", "sm_90", True),
        ("80,90a,100a", "sm_100", True),
        ("80,90a,100a", "sm_103", False),
        ("80,90a,100a", "sm_75", False),
        ("80,90a,100a", "sm_120", False),
        ("86", "sm_80", False),
        ("90", "sm_90", True),
        ("100", "sm_103", True),
    ],
)
def test_which_gpus_what_was_built_runs_on(monkeypatch, built, arch, takes):
    monkeypatch.setattr(extension, "native", Built(built))
    assert extension.runs_on(arch) == takes
    reason = cuda.refusal(problem(arch=arch))
    assert reason is None if takes else reason == f"was built for sm_{', sm_'.join(built.split(','))}, not for {arch}"


@pytest.mark.parametrize(("built", "products"), [("90", "library"), ("80,90a", "fused")])
def test_hopper_kernels_are_used_where_they_were_built(monkeypatch, built, products):
    monkeypatch.setattr(extension, "native", Built(built))
    shapes = cuda._kernels()
    assert shapes.products(problem(), True) == products
    assert shapes.products(problem(), False) == shapes.products(problem(weight_dtype=torch.float32), True) == "library"
    assert cuda.make_plan(problem(N=8192, D=4096, V=128256)).bytes > 0


def test_refusals(monkeypatch):
    assert cuda.refusal(problem(device_type="cpu", arch=None)) is None  # in the emulator
    assert cuda.refusal(problem(device_type="mps", arch=None)) == "takes tensors on NVIDIA GPUs, not on mps"
    assert "not hidden in torch.float64" in cuda.refusal(problem(hidden_dtype=torch.float64))
    assert "not of 32" in cuda.refusal(problem(routed=Routed(1e-3, block=32)))
    monkeypatch.setattr(extension, "native", Built("80"))
    assert cuda.refusal(problem(arch=None)) == "no GPU is visible to PyTorch"
    assert cuda.refusal(problem(arch="gfx942")) == "was built for sm_80, not for gfx942"
    assert "cuda: CUDA C++ kernels for sm_80; refuses: takes tensors on NVIDIA GPUs, not on cpu" in explain_backends()
    monkeypatch.setattr(extension, "native", None)
    monkeypatch.setattr(extension, "missing", "No module named 'isdaa_kernels._cuda'")
    assert "reinstall isdaa-kernels where nvcc is" in cuda.refusal(problem())
    assert "cuda: not built: No module named" in explain_backends()


# Fused where the tensor memory accelerator is: 2 bytes an entry of a chunk; else fp32 logits, which become the gradient in their place.
@pytest.mark.parametrize(("arch", "bytes_an_entry"), [("sm_90", 2), ("sm_80", 4), ("sm_100", 4)])
def test_the_plan_counts_the_chunk(monkeypatch, arch, bytes_an_entry):
    monkeypatch.setattr(extension, "native", Built("80,90a,100a"))
    wide, narrow = (cuda.make_plan(problem(arch=arch, N=8192, D=D, V=128256, keep_logits=True)) for D in (4096, 2048))
    assert wide.backend == "cuda"
    assert wide.units == 4.0
    for plan in (wide, narrow):
        assert plan.bytes >= plan.token_tile * plan.vocab_tile * bytes_an_entry


def some_gather(**changes) -> dict:
    hidden, out, count = torch.randn(4, 6), torch.empty(3, 6), torch.full((1,), 3, dtype=torch.int32)
    names = {"source": hidden.data_ptr(), "source_dtype": 0, "rows": torch.arange(4).data_ptr(), "count": count.data_ptr(), "scale": 0,
             "out": out.data_ptr(), "out_dtype": 0, "first": 0, "T": 3, "D": 6, "stride_n": 6, "stride_d": 1, "stride_out": 6}  # fmt: skip
    return {**names, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_dtype": 7}, "gather: source_dtype: expected 0, 1 or 2, got 7"),
        ({"rows": 0}, "gather: rows: expected a tensor, got none"),
        ({"rows": "here"}, "gather: rows: expected another type, got 'here'"),
        ({"more": 1}, "gather: more: no such argument"),
        ({"T": 1 << 40}, "gather: grid: expected at most 2147483647 blocks, got 1099511627776"),
    ],
)
def test_bad_arguments_name_kernel_and_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        emulated_module().gather(0, **some_gather(**changes))


def test_a_missing_argument_is_named():
    arguments = some_gather()
    del arguments["scale"]
    with pytest.raises(ValueError, match="gather: scale: expected a value, got none"):
        emulated_module().gather(0, **arguments)


# Two whole steps of a block and a rest, in rows on 16-byte borders with a ragged end, and in rows off them.
@pytest.mark.parametrize("C", [5004, 5003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_sums", [False, True])
def test_a_gradient_may_be_written_over_wider_logits(dtype, bias_sums, C):
    T, random = 21, torch.Generator().manual_seed(0)
    logits = torch.randn(T, C, generator=random)
    tokens = torch.rand(10, T, generator=random) + 0.5
    targets = torch.randint(-1, C, (T,), generator=random, dtype=torch.int32)
    live = (torch.arange(T) < 18).to(torch.uint8)
    results = []
    for in_place in (False, True):
        held = logits.clone()
        out = held.view(dtype)[:, :C] if in_place else torch.full((T, C), float("nan"), dtype=dtype)
        sums = torch.full((-(-T // 16), C), float("nan")) if bias_sums else None
        CudaKernels(fused=False).gradient_logits(
            logits=held, out=out, bias=None, targets=targets, tokens=tokens, bias_sums=sums, live=live, begin=0, end=C,
            logit_scale=0.7, softcap=None, log_prob=True, flat=True, target_entry=True,
        )  # fmt: skip
        results.append((out, sums))
    z = logits * tokens[1][:, None] * 0.7 * tokens[0][:, None]
    log_p = z - tokens[2][:, None] - tokens[3][:, None]
    g = (
        (log_p.exp() * (tokens[4][:, None] + tokens[5][:, None] * log_p) + tokens[6][:, None])
        * 0.7
        * tokens[0][:, None]
    )
    here = torch.arange(C) == targets[:, None]
    g = torch.where(here, tokens[8][:, None], g) * live[:, None]
    torch.testing.assert_close(results[0][0].float(), g, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])
    if bias_sums:
        expected = torch.stack([(g * tokens[7][:, None])[a : a + 16].sum(0) for a in (0, 16)])
        torch.testing.assert_close(results[0][1], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(results[0][1], results[1][1])


def test_no_gpu_is_named_without_one():
    assert device_arch(torch.device("cpu")) is None
