"""Values and every gradient of linear_logprob, on each backend, against fp64 autograd over dense logits."""

import pytest
import torch

from isdaa_kernels import LMHead, linear_logprob, plan
from isdaa_kernels.dispatch import Problem, refusal
from isdaa_kernels.testing import (
    FlopCounter,
    assert_error_contract,
    dense_logprob,
    make_sample,
    poisoned_empty,
    relative_error,
)

CPU_PROBLEM = Problem("cpu", torch.float32, torch.float32, 1, 1, 1)
BACKENDS = ["cpu", "reference"]  # those of the CPU; tests/test_device.py has the cases for all
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "temperature": {"temperature": 0.7},
    "all": {"logit_scale": -1.5, "softcap": 6.0, "temperature": 1.3},
}


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def test_the_compiled_backend_is_here():
    assert [refusal(name, CPU_PROBLEM) for name in BACKENDS] == [None, None]


# N: 1, below and above the forward tile of 128 and the backward tile of 512. V: 1 (all probability in one row), below one vector of any
# instruction set, ragged, one whole tile, two tiles and a ragged third. D: 1, odd, a multiple of 16. Larger sizes repeat these regimes.
@pytest.mark.parametrize(("N", "D", "V"), [(1, 7, 3), (37, 19, 1), (129, 1, 53), (200, 16, 2048), (600, 33, 4499)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, dtype, N, D, V):
    sample = make_sample(N, D, V, DTYPES[dtype], bias=True, ignored=0.3)
    truth, dense = _dense(sample, torch.float64), _dense(sample, None)
    ours = sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets, bias=b, backend=backend))
    for name, *tensors in zip(("logprob", "d_hidden", "d_weight", "d_bias"), ours, dense, truth, strict=True):
        assert tensors[0].dtype == (DTYPES[dtype] if name != "logprob" else tensors[1].dtype)
        if V > 1:
            assert_error_contract(name, *tensors)
        else:
            assert tensors[0].abs().max() < 2e-6  # the only row has probability 1, up to the rounding of its logit


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_transforms(backend, dtype, head):
    sample = make_sample(150, 24, 2100, DTYPES[dtype], bias=True, ignored=0.2)
    truth, dense = _dense(sample, torch.float64, **HEADS[head]), _dense(sample, None, **HEADS[head])
    ours = sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets, bias=b, backend=backend, **HEADS[head]))
    for name, *tensors in zip(("logprob", "d_hidden", "d_weight", "d_bias"), ours, dense, truth, strict=True):
        assert_error_contract(name, *tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_of_each_token(backend):
    sample = make_sample(70, 8, 300, ignored=0.2)
    temperature = torch.rand(70) + 0.5
    truth, ours = (
        _dense(sample, torch.float64, temperature=temperature.double()),
        _ours(sample, backend, temperature=temperature),
    )
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b) < 1e-6
    scalar = linear_logprob(
        sample.hidden, sample.weight, sample.targets, temperature=torch.tensor(0.5), backend=backend
    )
    assert torch.allclose(
        scalar, linear_logprob(sample.hidden, sample.weight, sample.targets, temperature=0.5, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    sample = make_sample(9, 4, 11, torch.float64, bias=True, ignored=0.3)
    leaves = [x.requires_grad_() for x in (sample.hidden, sample.weight, sample.bias)]
    head = {"logit_scale": 0.8, "softcap": 3.0, "temperature": torch.rand(9, dtype=torch.float64) + 0.5}
    for max_workspace_mb in (None, 1.0):
        call = lambda h, w, b, mb=max_workspace_mb: linear_logprob(  # noqa: E731
            h, w, sample.targets, bias=b, backend=backend, max_workspace_mb=mb, **head
        )
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    sample = make_sample(60, 12, 500, bias=True)
    hidden, bias = sample.hidden.bfloat16().requires_grad_(), sample.bias.half().requires_grad_()
    weight = sample.weight.clone().requires_grad_()
    out = linear_logprob(hidden, weight, sample.targets.int(), bias=bias, backend=backend)
    out.backward(sample.upstream)
    assert (out.dtype, hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (
        torch.float32, torch.bfloat16, torch.float32, torch.float16)  # fmt: skip
    sample.hidden, sample.bias = hidden.detach().float(), bias.detach().float()
    truth = _dense(sample, torch.float64)
    assert relative_error(weight.grad, truth[2]) < 1e-6
    assert relative_error(hidden.grad, truth[1]) < 3e-3
    double = linear_logprob(sample.hidden, sample.weight.double(), sample.targets, backend=backend)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["hidden columns", "hidden rows", "weight transposed", "weight slice", "targets"])
def test_any_strides(backend, layout):
    sample = make_sample(66, 10, 130)
    plain = _ours(sample, backend)
    if layout == "hidden columns":
        sample.hidden = sample.hidden.T.contiguous().T
    elif layout == "hidden rows":
        sample.hidden = sample.hidden.repeat_interleave(3, dim=0)[::3]
    elif layout == "weight transposed":
        sample.weight = sample.weight.T.contiguous().T
    elif layout == "weight slice":
        sample.weight = torch.cat([sample.weight, sample.weight], dim=1)[:, :10]
    else:
        sample.targets = sample.targets.repeat_interleave(2)[::2]
    # `sample.grads` would copy to a contiguous leaf: keep the strides under test
    leaves = [x.detach().requires_grad_() for x in (sample.hidden, sample.weight)]
    out = linear_logprob(*leaves, sample.targets, backend=backend)
    out.backward(sample.upstream)
    for a, b in zip((out, leaves[0].grad, leaves[1].grad), plain, strict=True):
        assert relative_error(a.detach(), b) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4)])
def test_leading_shapes(backend, leading):
    random = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(*leading, 6, generator=random), torch.randn(9, 6, generator=random)
    targets = torch.randint(9, leading, generator=random)
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, targets, backend=backend)
    assert out.shape == targets.shape
    torch.testing.assert_close(out, dense_logprob(hidden, weight, targets))
    out.sum().backward()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants", ["hidden", "weight", "bias", "hidden weight", "weight bias"])
def test_partial_requires_grad(backend, wants):
    sample = make_sample(50, 8, 200, torch.bfloat16, bias=True, ignored=0.2)
    whole = dict(zip(("value", "hidden", "weight", "bias"), _ours(sample, backend, bias=sample.bias), strict=False))
    leaves = {n: getattr(sample, n).detach().requires_grad_(n in wants.split()) for n in ("hidden", "weight", "bias")}
    linear_logprob(leaves["hidden"], leaves["weight"], sample.targets, bias=leaves["bias"], backend=backend).backward(
        sample.upstream
    )
    for name, leaf in leaves.items():
        if name not in wants.split():
            assert leaf.grad is None
        elif name != "bias":
            assert torch.equal(leaf.grad, whole[name])
    if "bias" in wants.split():
        assert relative_error(leaves["bias"].grad, _dense(sample, torch.float64)[3]) < 3e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_used_twice_and_graph_kept(backend):
    sample = make_sample(40, 8, 100)
    hidden = sample.hidden.clone().requires_grad_()
    out = linear_logprob(hidden, sample.weight, sample.targets, backend=backend, max_workspace_mb=1)
    (out.sum() + (2 * out).sum()).backward(retain_graph=True)
    first = hidden.grad.clone()
    out.backward(torch.full_like(out, 3.0))
    assert torch.allclose(hidden.grad, 2 * first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_score(backend):
    for sample in (make_sample(0, 5, 7), make_sample(6, 5, 7, ignored=2.0)):
        value, d_hidden, d_weight = _ours(sample, backend)
        assert value.shape == sample.targets.shape
        for tensor in (value, d_hidden, d_weight):
            assert (tensor == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_workspace_gives_the_same(backend, dtype):
    sample = make_sample(700, 16, 3000, DTYPES[dtype], bias=True, ignored=0.2)
    plain = _ours(sample, backend, bias=sample.bias)
    plans = set()
    for max_workspace_mb in (9.5, 11.0, 14.0, 64.0):
        plans.add(plan(700, 3000, 16, DTYPES[dtype], max_workspace_mb=max_workspace_mb, backend=backend).units)
        ours = _ours(sample, backend, bias=sample.bias, max_workspace_mb=max_workspace_mb)
        assert torch.equal(ours[0], plain[0]) or backend == "reference"
        for a, b in zip(ours, plain, strict=True):
            assert relative_error(a, b) < (1e-6 if dtype == "fp32" else 2e-3)
    assert len(plans) > 2 or backend == "reference", (
        "the sizes must cover recomputing, keeping some and keeping all logits"
    )


def test_two_passes_where_the_accumulator_does_not_fit():
    sample = make_sample(3000, 64, 300, torch.bfloat16)
    budget = next(mb / 100 for mb in range(1, 2000) if _plans(sample, mb / 100))
    assert plan(3000, 300, 64, torch.bfloat16, max_workspace_mb=budget).split
    for a, b in zip(_ours(sample, "cpu", max_workspace_mb=budget), _ours(sample, "cpu"), strict=True):
        assert relative_error(a, b) < 2e-3


def _plans(sample, mb) -> bool:
    try:
        return (
            plan(
                len(sample.hidden), len(sample.weight), sample.hidden.shape[1], sample.hidden.dtype, max_workspace_mb=mb
            ).bytes
            > 0
        )
    except ValueError:
        return False


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bound_on_the_scored_tokens(backend):
    sample = make_sample(40, 8, 90, ignored=0.5)
    scored = int((sample.targets != -100).sum())
    for a, b in zip(_ours(sample, backend, max_scored=scored), _ours(sample, backend), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f"max_scored: expected at least the {scored}"):
        linear_logprob(sample.hidden, sample.weight, sample.targets, max_scored=scored - 1, backend=backend)


# Matrix work in units of 2 N V D, where N counts scored tokens; 128 divides N, so that the forward pads nothing.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wants", "workspace", "most"), [
    ("hidden weight", None, 4.05), ("hidden", None, 3.05), ("weight", None, 3.05), ("", None, 1.0), ("hidden weight", 100, 3.05),
])  # fmt: skip
def test_matrix_work(backend, wants, workspace, most):
    N, D, V = 1280, 8, 5000
    sample = make_sample(N, D, V)
    hidden, weight = (getattr(sample, n).requires_grad_(n in wants.split()) for n in ("hidden", "weight"))
    targets = torch.cat([sample.targets, torch.full((500,), -100)])
    padded = torch.cat([hidden, torch.randn(500, D)])
    with FlopCounter() as counter:
        out = linear_logprob(padded, weight, targets, backend=backend, max_workspace_mb=workspace)
        if wants:
            out.sum().backward()
    units = counter.flop / (2 * N * D * V)
    keeps = plan(len(targets), V, D, max_workspace_mb=workspace, backend=backend).kept_tokens
    assert units <= (most if not workspace or keeps else 4.05)
    assert units >= 1.0
    with FlopCounter() as counter:
        linear_logprob(padded[N:], weight, targets[N:], backend=backend).sum()
    assert counter.flop == 0


def test_a_coefficient_of_zero_costs_nothing():
    sample = make_sample(1024, 8, 3000)
    hidden, weight = sample.hidden.requires_grad_(), sample.weight.requires_grad_()
    out = linear_logprob(hidden, weight, sample.targets, backend="cpu")
    with FlopCounter() as counter:
        out.backward((torch.arange(1024) < 512).float())
    assert counter.flop == 3 * 2 * 512 * 8 * 3000
    assert (hidden.grad[512:] == 0).all()


def test_the_cpu_backend_is_chosen_and_reference_is_chosen_by_name():
    sample = make_sample(8, 4, 9)
    assert torch.equal(linear_logprob(sample.hidden, sample.weight, sample.targets),
                       linear_logprob(sample.hidden, sample.weight, sample.targets, backend="cpu"))  # fmt: skip
    with pytest.raises(ValueError, match=r"backend: expected one of .*cpu, reference or None, got 'rocm'"):
        linear_logprob(sample.hidden, sample.weight, sample.targets, backend="rocm")


def _h(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


T = torch.tensor([0, 1])
BAD = {
    "hidden size": ((_h(2, 3), _h(5, 4), T), {}, r"hidden: expected \[\.\.\., 4\] to fit weight \[5, 4\], got \[2, 3\]"),
    "weight axes": ((_h(2, 3), _h(5), T), {}, r"weight: expected \[V, D\], got \[5\]"),
    "empty weight": ((_h(2, 3), _h(0, 3), T), {}, "weight: expected at least one row"),
    "targets shape": ((_h(2, 3), _h(5, 3), T[:1]), {}, r"targets: expected \[2\] to fit hidden, got \[1\]"),
    "targets dtype": ((_h(2, 3), _h(5, 3), T.float()), {}, "targets: expected int64 or int32, got torch.float32"),
    "hidden dtype": ((_h(2, 3, dtype=torch.int8), _h(5, 3), T), {}, "hidden: expected float16, bfloat16, float32 or float64"),
    "weight device": ((_h(2, 3), _h(5, 3, device="meta"), T), {}, "weight: expected to be on cpu as targets are, got meta"),
    "bias shape": ((_h(2, 3), _h(5, 3), T), {"bias": _h(4)}, r"bias: expected \[5\], got \[4\]"),
    "bias device": ((_h(2, 3), _h(5, 3), T), {"bias": _h(5, device="meta")}, "bias: expected to be on cpu"),
    "target high": ((_h(2, 3), _h(5, 3), torch.tensor([0, 5])), {}, r"targets: expected -100 .* value in \[0, 5\), got 5 at index 1"),
    "target low": ((_h(2, 3), _h(5, 3), torch.tensor([-1, 0])), {}, "got -1 at index 0"),
    "validate": ((_h(2, 3), _h(5, 3), torch.tensor([0, 7])), {"validate": True}, "got 7 at index 1"),
    "temperature": ((_h(2, 3), _h(5, 3), T), {"temperature": 0.0}, "temperature: expected a positive finite number, got 0.0"),
    "temperatures": ((_h(2, 3), _h(5, 3), T), {"temperature": torch.ones(3)}, r"temperature: expected a number or \[2\], got \[3\]"),
    "temperature value": ((_h(2, 3), _h(5, 3), T), {"temperature": -torch.ones(2)}, "expected positive finite numbers, got -1.0"),
    "temperature device": ((_h(2, 3), _h(5, 3), T), {"temperature": torch.ones(2, device="meta")}, "temperature: expected floats on cpu"),
    "logit_scale tensor": ((_h(2, 3), _h(5, 3), T), {"logit_scale": torch.ones((), requires_grad=True)}, "logit_scale: expected a number"),
    "ignore_index": ((_h(2, 3), _h(5, 3), T.int()), {"ignore_index": 2**32}, "ignore_index: expected a number that torch.int32"),
    "workspace inf": ((_h(2, 3), _h(5, 3), T), {"max_workspace_mb": float("inf")}, "max_workspace_mb: expected a positive number"),
    "max_scored float": ((_h(2, 3), _h(5, 3), T), {"max_scored": 1.0}, "max_scored: expected 0 to 2"),
    "temperature grad": ((_h(2, 3), _h(5, 3), T), {"temperature": torch.ones(2, requires_grad=True)}, "without gradient"),
    "softcap": ((_h(2, 3), _h(5, 3), T), {"softcap": -1.0}, "softcap: expected a positive finite number or None, got -1.0"),
    "logit_scale": ((_h(2, 3), _h(5, 3), T), {"logit_scale": 0.0}, "logit_scale: expected a finite number other than 0"),
    "max_scored": ((_h(2, 3), _h(5, 3), T), {"max_scored": 3}, r"max_scored: expected 0 to 2 \(the number of targets\), got 3"),
    "workspace": ((_h(2, 3), _h(5, 3), T), {"max_workspace_mb": 0}, "max_workspace_mb: expected a positive number or None, got 0"),
    "workspace small": ((_h(2, 3), _h(5, 3), T), {"max_workspace_mb": 1e-6}, "max_workspace_mb: expected at least"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend, case):
    args, kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        linear_logprob(*args, backend=backend, **kwargs)


def test_a_head_holds_its_own_checks():
    with pytest.raises(ValueError, match=r"bias: expected \[5\], got \[1\]"):
        LMHead(_h(5, 3), _h(1))
    assert not LMHead(_h(5, 3)).requires_grad()
    assert LMHead(_h(5, 3), _h(5).requires_grad_()).requires_grad()


def _ours(sample, backend, **options):
    return sample.grads(lambda h, w, b: linear_logprob(h, w, sample.targets, backend=backend, **options))[:3]


def _dense(sample, dtype, **options):
    return sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, bias=b, **options), dtype)
