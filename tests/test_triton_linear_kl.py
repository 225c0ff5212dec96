"""What `linear_kl` is asked of Triton's kernels: on a GPU where there is one, else interpreted on small problems."""

import math
from dataclasses import replace

import pytest
import torch
from gpu_backends import DEVICE
from test_linear_kl import (
    KINDS,
    NAMES,
    PLAIN,
    Pair,
    check_a_non_finite_row,
    dense,
    dense_masked,
    make_pair,
    ours,
    to_device,
)

from isdaa_kernels import LMHead, explain_backends, linear_kl, plan
from isdaa_kernels.backends.gpu import plan as plans
from isdaa_kernels.backends.triton import linear_kl as triton_kl
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.divergence import Divergence
from isdaa_kernels.testing import FlopCounter, assert_error_contract, poisoned_empty, relative_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture
def _small_slabs(monkeypatch):
    """Several slabs of tokens, chunks of vocabulary and pieces of d_weight in a small problem."""
    step = 32 if DEVICE == "cpu" else 256
    monkeypatch.setattr(plans, "SLAB_TOKENS", (2 * step, step))
    monkeypatch.setattr(plans, "CHUNK_COLUMNS", (128,))
    monkeypatch.setattr(plans, "WEIGHT_ROWS", 48)
    monkeypatch.setattr(plans, "_FORWARD_TOKENS", step)


def pair_of(*args, **kwargs) -> Pair:
    return to_device(make_pair(*args, **kwargs), DEVICE)


def of_triton(pair: Pair, **options) -> list[torch.Tensor]:
    return ours(pair, "triton", **options)


def assert_contract(pair: Pair, found: list[torch.Tensor], **options) -> None:
    plain, truth = dense(pair, **options), dense(pair, torch.float64, **options)
    for name, *tensors in zip(NAMES, found, plain, truth, strict=False):
        assert_error_contract(name, *tensors)


def assert_few_entries(pair: Pair, found: list[torch.Tensor], **options) -> None:
    """In 16 bits, where a few entries make up the whole gradient: `kl_backward_pass` says how much their rounding adds at most."""
    plain, truth = dense(pair, **options), dense(pair, torch.float64, **options)
    assert_error_contract("divergence", found[0], plain[0], truth[0])
    for a, b, c in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert relative_error(a, c) <= 2.4 * relative_error(b, c)


RICH = {"softcap": 6.0, "logit_scale": -1.5}, {"softcap": 5.0, "logit_scale": 0.5}, {"temperature": 0.8}


# Several tiles each way and a ragged last one; hidden sizes of the heads that differ, in whole steps and not.
@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in PLAIN for dtype in ("fp32", "bf16")] + [("reverse", "fp16")]
)
@pytest.mark.usefixtures("_small_slabs")
def test_values_and_gradients(kind, dtype):
    pair = pair_of(56, 40, 200, DTYPES[dtype], E=24, ignored=0.3)
    found = of_triton(pair, **KINDS[kind])
    assert found[0].dtype == torch.float32
    assert [d.dtype for d in found[1:]] == [DTYPES[dtype]] * 3
    assert (found[0][pair.targets == -100] == 0).all()
    assert (found[1][pair.targets == -100] == 0).all()
    assert_contract(pair, found, **KINDS[kind])
    if kind == "forward":
        for a, b in zip(found, of_triton(pair, **KINDS[kind]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "jsd 0.1"), ("bf16", "forward"), ("bf16", "jsd 0.9")])
def test_head_transforms(dtype, kind):
    pair = pair_of(40, 24, 150, DTYPES[dtype], ignored=0.2)
    policy, reference, options = RICH
    pair.head, pair.reference_head = replace(pair.head, **policy), replace(pair.reference_head, **reference, bias=None)
    temperature = torch.linspace(0.5, 1.5, 40, device=DEVICE) if dtype == "bf16" else options["temperature"]
    options = {**KINDS[kind], "temperature": temperature}
    check = assert_few_entries if dtype == "bf16" else assert_contract
    check(pair, of_triton(pair, **options), **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_odd_sizes_and_strides(dtype):
    """Rows of the weights off 16-byte borders."""
    pair = pair_of(33, 7, 45, DTYPES[dtype], E=5)
    plain = of_triton(pair, direction="reverse")
    truth = dense(pair, torch.float64, direction="reverse")
    for a, b in zip(plain, truth, strict=True):
        assert relative_error(a, b) < (2e-6 if dtype == "fp32" or a is plain[0] else 4e-3)
    strange = lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]  # noqa: E731
    hidden = pair.hidden.T.contiguous().T.requires_grad_()
    weight = strange(pair.head.weight).requires_grad_()
    reference = LMHead(pair.reference_head.weight.T.contiguous().T, pair.reference_head.bias.repeat_interleave(3)[::3])
    out = linear_kl(
        hidden, LMHead(weight, pair.head.bias), strange(pair.reference_hidden), reference, targets=pair.targets.int(),
        direction="reverse", backend="triton",
    )  # fmt: skip
    out.backward(pair.upstream)
    for a, b in zip((out.detach(), hidden.grad, weight.grad), plain, strict=False):
        assert relative_error(a, b) < (1e-6 if dtype == "fp32" or a is plain[0] else 3e-3)


def test_mixed_dtypes():
    pair = pair_of(40, 24, 150, E=16)
    pair.hidden, pair.head = pair.hidden.bfloat16(), replace(pair.head, weight=pair.head.weight.bfloat16())
    pair.reference_hidden = pair.reference_hidden.half()
    assert_few_entries(pair, of_triton(pair, direction="jsd"), direction="jsd")
    pair.head = replace(pair.head, weight=pair.head.weight.float())
    assert_contract(pair, of_triton(pair, direction="reverse"), direction="reverse")


@pytest.mark.parametrize("wants", ["hidden", "weight", "bias", "hidden bias"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_partial_requires_grad(wants, dtype):
    pair = pair_of(40, 24, 150, DTYPES[dtype], ignored=0.2)
    whole = dict(zip(("value", "hidden", "weight", "bias"), of_triton(pair, direction="forward"), strict=True))
    leaves = {"hidden": pair.hidden, "weight": pair.head.weight, "bias": pair.head.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wants.split())
    out = linear_kl(
        pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, direction="forward", backend="triton"
    )  # fmt: skip
    assert torch.equal(out.detach(), whole["value"])
    out.backward(pair.upstream)
    for name, leaf in leaves.items():
        if name in wants.split():
            assert torch.equal(leaf.grad, whole[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", PLAIN)
def test_identical_heads_are_exactly_0_apart(kind, dtype):
    pair = pair_of(20, 24, 150, DTYPES[dtype], sharpness=8.0)
    pair.reference_hidden, pair.reference_head = pair.hidden, pair.head
    for tensor in of_triton(pair, **KINDS[kind]):
        assert (tensor == 0).all()


@pytest.mark.parametrize("kind", PLAIN)
def test_small_divergences_keep_their_digits(kind):
    pair = pair_of(33, 16, 700, distance=1e-3)
    bias = (pair.head.bias * 1024).round() / 1024
    pair.head, pair.reference_head = replace(pair.head, bias=bias), replace(pair.reference_head, bias=bias + 64.0)
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    found = of_triton(pair, **KINDS[kind])
    assert (found[0] >= 0).all()
    assert relative_error(found[0], truth[0]) < min(1e-3, relative_error(plain[0], truth[0]) / 4)
    for name, *tensors in zip(NAMES[1:], found[1:], plain[1:], truth[1:], strict=True):
        assert_error_contract(name, *tensors)


@pytest.mark.parametrize("kind", PLAIN)
def test_large_logits_and_one_hot_policies(kind):
    pair = pair_of(33, 16, 600, sharpness=1e4)
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    for name, a, b, c in zip(NAMES, of_triton(pair, **KINDS[kind]), plain, truth, strict=True):
        assert a.isfinite().all()
        assert relative_error(a, c) <= 1.5 * relative_error(b, c) + 3e-7, name
    hidden, weight, other = torch.eye(3, device=DEVICE), torch.zeros(200, 3), torch.zeros(200, 3)
    weight[5, 0] = weight[6, 1] = weight[7, 2] = other[5, 0] = other[9, 1] = 1e4
    heads = LMHead(weight.to(DEVICE)), LMHead(other.to(DEVICE))
    pair = Pair(hidden, heads[0], hidden, heads[1], torch.arange(3, device=DEVICE), torch.ones(3, device=DEVICE))
    for a, b in zip(of_triton(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind]), strict=True):
        assert torch.allclose(a, b.float(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("where", ["policy", "reference", "both"])
def test_rows_without_probability(where):
    """Whole tiles of one head among them: what the other has there still counts."""
    pair = pair_of(20, 8, 700)
    for name in ("policy", "reference") if where == "both" else (where,):
        (pair.head if name == "policy" else pair.reference_head).bias[:520] = -math.inf
    infinite, finite = ("forward", "reverse") if where == "policy" else ("reverse", "forward")
    if where != "both":
        assert (of_triton(pair, direction=infinite)[0] == math.inf).all()
    for options in (KINDS[finite], KINDS["jsd"]):
        found, truth = of_triton(pair, **options), dense_masked(pair, **options)
        masked = lambda h: replace(h, bias=h.bias.masked_fill(h.bias == -math.inf, -1e4))  # noqa: E731
        finite_heads = replace(pair, head=masked(pair.head), reference_head=masked(pair.reference_head))
        for a, b, c in zip(found, dense(finite_heads, **options), truth, strict=True):
            assert relative_error(a, c) <= 1.5 * relative_error(b, c) + 4e-6
        if where != "reference":
            assert (found[2][:520] == 0).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["hidden", "reference_hidden", "upstream", "ignored"])
def test_a_non_finite_row_stays_in_its_row(where, dtype):
    pair, bar = pair_of(40, 8, 150, DTYPES[dtype], bias=False), 1e-6 if dtype == "fp32" else 4e-3
    check_a_non_finite_row(pair, lambda p: of_triton(p, direction="forward"), where, math.nan, bar)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["reverse", "jsd"])
@pytest.mark.usefixtures("_small_slabs")
def test_a_token_does_not_see_its_batch(dtype, kind):
    pair = pair_of(40, 24, 150, DTYPES[dtype], E=16)

    def call(rows):
        p = pair.rows(rows)
        return linear_kl(
            p.hidden, p.head, p.reference_hidden, p.reference_head, backend="triton", **KINDS[kind]
        )  # fmt: skip

    whole = call(slice(None))
    for rows in (slice(0, 1), slice(0, 33), slice(39, 40)):
        assert torch.equal(call(rows), whole[rows])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_gradients_scale_exactly_with_the_coefficients(dtype):
    """2 ** -100 is 8e-31; a reverse divergence of thousands has gradients far above its coefficient, which fp16 must hold too."""
    pair = pair_of(33, 16, 150, DTYPES[dtype], sharpness=3.0 if dtype != "fp16" else 60.0)
    plain = of_triton(pair, direction="reverse")
    assert all(x.isfinite().all() for x in plain)
    power = -100 if dtype != "fp16" else 2
    pair.upstream *= 2.0**power
    for found, base in zip(of_triton(pair, direction="reverse")[1:], plain[1:], strict=True):
        expected = base.double() * 2.0**power
        seen = expected.abs() >= 4 * torch.finfo(DTYPES[dtype]).smallest_normal
        assert torch.equal(found.double()[seen], expected[seen])


def test_nothing_to_score():
    for pair in (pair_of(0, 8, 50, torch.bfloat16), pair_of(6, 8, 50, ignored=2.0)):
        for tensor in of_triton(pair, direction="jsd"):
            assert (tensor == 0).all()


# In units of a product of the policy; the reference's hidden size is half of it. The fused kernels' products are none of the library's.
@pytest.mark.parametrize(("dtype", "units"), [("fp32", 5.0), ("bf16", 2.0)])
def test_matrix_work(dtype, units):
    N, D, V = 1024 if DEVICE == "cuda" else 32, 16, 600
    pair = pair_of(N, D, V, DTYPES[dtype], E=8, bias=False)
    with FlopCounter() as counter:
        of_triton(pair, direction="forward")
    assert counter.flop / (2 * N * D * V) == pytest.approx(units, rel=1e-6)
    problem = Problem(
        DEVICE, *[DTYPES[dtype]] * 2, N, D, V, divergence=Divergence("forward", 0.5, 8, *[DTYPES[dtype]] * 2)
    )
    assert triton_kl.make_plan(problem).units == 5.0


def test_plans_of_a_gpu():
    options = {"dtype": torch.bfloat16, "arch": "sm_90", "backend": "triton"}
    made = plan(8192, 128256, 4096, direction="reverse", **options)
    assert made.units == 6.0
    assert plan(8192, 128256, 4096, direction="jsd", reference_D=2048, **options).units == 6.5
    assert (
        made.bytes < 2 * 8192 * 128256 * 2 / 4
    )  # a quarter of one head's logits in 16 bits each, sums of d_hidden included
    limited = plan(8192, 128256, 4096, direction="reverse", max_workspace_mb=400, **options)
    assert limited.bytes <= 400 * 2**20
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least"):
        plan(8192, 128256, 4096, direction="reverse", max_workspace_mb=1, **options)


def test_a_reference_in_fp64_is_refused_by_name():
    divergence = Divergence("jsd", 0.5, 1, torch.float64, torch.float32)
    problem = Problem("cuda", torch.float32, torch.float32, 1, 1, 1, arch="sm_90", divergence=divergence)
    lines = dict(line.split(": ", 1) for line in explain_backends(problem).splitlines())
    assert "takes float16, bfloat16 and float32, not the reference's hidden in torch.float64" in lines["triton"]
