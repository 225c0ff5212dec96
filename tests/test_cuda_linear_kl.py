"""linear_kl on the CUDA backend against fp64 autograd over dense logits: on a GPU where there is one that it takes, else in the emulator,
on small problems. What is asked of every backend, and how problems are made, is in tests/test_linear_kl.py."""

import math
from dataclasses import replace

import pytest
import torch
from emulated_cuda import emulated_module
from gpu_backends import DEVICE
from test_linear_kl import (
    DTYPES,
    HEADS,
    KINDS,
    NAMES,
    PLAIN,
    Pair,
    check_a_non_finite_row,
    dense,
    dense_masked,
    make_pair,
    to_device,
)
from test_linear_kl import ours as ours_of

from isdaa_kernels import LMHead, NoBackend, check, explain_backends, linear_kl, ops, plan
from isdaa_kernels.backends import cuda
from isdaa_kernels.backends.cuda import extension, linear_kl_backward, linear_kl_plan
from isdaa_kernels.backends.cuda import linear_kl as cuda_linear_kl
from isdaa_kernels.backends.gpu import plan as plans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.divergence import Divergence
from isdaa_kernels.testing import FlopCounter, assert_error_contract, poisoned_empty, relative_error, walled_empty

STEP = 128 if DEVICE == "cpu" else 256  # of tokens in a slab of the backward
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and extension.native is None, reason="a GPU, but no compiled part")
on_the_host = pytest.mark.skipif(DEVICE == "cuda", reason="what is counted or walled in here are tensors of the CPU")


@pytest.fixture(autouse=True)
def _backend(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(extension, "native", emulated_module())
    with poisoned_empty():
        yield


@pytest.fixture
def _small_slabs(monkeypatch):
    """Several slabs of tokens, chunks of vocabulary and pieces of d_weight in a small problem."""
    monkeypatch.setattr(plans, "SLAB_TOKENS", (2 * STEP, STEP))
    monkeypatch.setattr(plans, "CHUNK_COLUMNS", (128,))
    monkeypatch.setattr(plans, "WEIGHT_ROWS", 48)


def ours(pair: Pair, **options) -> list[torch.Tensor]:
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return [x.cpu() for x in ours_of(to_device(pair, DEVICE), "cuda", **options)]


def without_head(pair: Pair, **options) -> list[torch.Tensor]:
    """(value, d_hidden): with a head that is frozen, whose gradient's many rows take the emulator long."""
    moved = to_device(pair, DEVICE)
    hidden = moved.hidden.detach().clone().requires_grad_()
    value = linear_kl(
        hidden, moved.head, moved.reference_hidden, moved.reference_head, targets=moved.targets, backend="cuda", **options
    )  # fmt: skip
    value.backward(moved.upstream)
    return [value.detach().cpu(), hidden.grad.cpu()]


def assert_contract(pair: Pair, found: list[torch.Tensor], **options) -> None:
    for name, *tensors in zip(
        NAMES, found, dense(pair, **options), dense(pair, torch.float64, **options), strict=False
    ):
        assert_error_contract(name, *tensors)


# N: one, and more than a slab of the emulated forward. V: ragged, a whole slot on 16-byte borders, and two chunks, the second ragged.
# D, E: 1, odd, a multiple of 8, equal and not.
@pytest.mark.parametrize(("N", "D", "E", "V"), [(1, 7, 7, 3), (5, 1, 5, 2048), (37, 16, 19, 2149)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("forward", "fp32"),
        ("forward", "bf16"),
        ("reverse", "fp32"),
        ("reverse", "fp16"),
        ("jsd", "bf16"),
        ("jsd 0.1", "fp32"),
    ],
)
def test_values_and_gradients(kind, dtype, N, D, E, V):
    pair = make_pair(N, D, V, DTYPES[dtype], E=E, ignored=0.3)
    found = ours(pair, **KINDS[kind])
    assert found[0].dtype == torch.float32
    assert [d.dtype for d in found[1:]] == [DTYPES[dtype]] * 3
    assert (found[0][pair.targets == -100] == 0).all()
    assert (found[1][pair.targets == -100] == 0).all()
    assert_contract(pair, found, **KINDS[kind])


@pytest.mark.parametrize("head", [*HEADS, "temperatures"])
@pytest.mark.parametrize("kind", PLAIN)
def test_head_transforms(kind, head):
    pair = make_pair(33, 24, 300, torch.float32 if head == "temperatures" else torch.bfloat16, ignored=0.2)
    policy, reference, options = HEADS["all"] if head == "temperatures" else HEADS[head]
    if head == "temperatures":
        options = {"temperature": torch.rand(33) + 0.5}
    pair.head, pair.reference_head = replace(pair.head, **policy), replace(pair.reference_head, **reference)
    assert_contract(pair, ours(pair, **KINDS[kind], **options), **KINDS[kind], **options)


@pytest.mark.parametrize("which", ["policy", "reference", "neither"])
@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_a_bias_on_either_head(kind, which):
    pair = make_pair(20, 8, 300)
    if which != "policy":
        pair.head = replace(pair.head, bias=None)
    if which != "reference":
        pair.reference_head = replace(pair.reference_head, bias=None)
    found = ours(pair, **KINDS[kind])
    assert len(found) == (4 if which == "policy" else 3)
    assert_contract(pair, found, **KINDS[kind])


# V = 513: the last chunk has one column. One slab ("single") makes d_weight in pieces.
@pytest.mark.parametrize(
    ("way", "dtype"), [("one pass", "fp32"), ("one pass", "bf16"), ("split", "bf16"), ("single", "bf16")]
)
@pytest.mark.usefixtures("_small_slabs")
def test_many_slabs_and_chunks(monkeypatch, way, dtype):
    N = 60 if way == "single" else 2 * STEP + 22
    pair = make_pair(N, 20, 513, DTYPES[dtype], E=12, ignored=0.2)
    if way == "split":
        made = cuda_linear_kl.make_plan
        monkeypatch.setattr(linear_kl_backward, "make_plan", lambda *args: replace(made(*args), split=True))
    found = ours(pair, direction="reverse")
    assert_contract(pair, found, direction="reverse")
    if way == "one pass":
        for a, b in zip(found, ours(pair, direction="reverse"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_16_bit_gradient_loses_nothing_that_its_outputs_keep(kind, dtype):
    """The rows of a real head have much in common, which the gradient, whose rows add up to 0, does not see: a chunk rounded to 16 bits
    would leave up to twice the error of rounding d_hidden."""
    pair = make_pair(40, 32, 1000, distance=0.03, bias=False)
    common = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    for name in ("head", "reference_head"):
        weight = getattr(pair, name).weight
        setattr(pair, name, LMHead((weight + 2 * weight.std() * common).to(DTYPES[dtype])))
    pair.hidden, pair.reference_hidden = (x.to(DTYPES[dtype]) for x in (pair.hidden, pair.reference_hidden))
    found, plain, truth = (
        ours(pair, **KINDS[kind]),
        dense(pair, **KINDS[kind]),
        dense(pair, torch.float64, **KINDS[kind]),
    )
    for name, a, b, c in zip(NAMES[1:], found[1:], plain[1:], truth[1:], strict=False):
        assert relative_error(a, c) <= 1.05 * relative_error(b, c), name


@pytest.mark.parametrize("wants", ["hidden", "weight", "bias", "hidden bias", ""])
def test_partial_requires_grad(wants):
    pair = to_device(make_pair(40, 8, 200, torch.bfloat16, ignored=0.2), DEVICE)
    whole = dict(zip(("value", "hidden", "weight", "bias"), ours_of(pair, "cuda", direction="jsd"), strict=True))
    leaves = {"hidden": pair.hidden, "weight": pair.head.weight, "bias": pair.head.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wants.split())
    others = (pair.reference_hidden.requires_grad_(), pair.reference_head.weight.requires_grad_())
    out = linear_kl(
        pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, direction="jsd", backend="cuda"
    )  # fmt: skip
    assert torch.equal(out.detach(), whole["value"])
    assert out.requires_grad == bool(wants)
    if wants:
        out.backward(pair.upstream)
    for name, leaf in leaves.items():
        if name in wants.split():
            assert relative_error(leaf.grad, whole[name]) < 2e-3
        else:
            assert leaf.grad is None
    assert all(leaf.grad is None for leaf in others)


def test_any_strides():
    pair = to_device(make_pair(34, 10, 130), DEVICE)
    plain = ours_of(pair, "cuda", direction="forward")
    hidden = pair.hidden.T.contiguous().T.requires_grad_()
    weight = torch.cat([pair.head.weight] * 2, 1)[:, :10].requires_grad_()
    bias = pair.head.bias.repeat_interleave(2)[::2].requires_grad_()
    reference = LMHead(pair.reference_head.weight.T.contiguous().T, pair.reference_head.bias.repeat_interleave(3)[::3])
    out = linear_kl(
        hidden, LMHead(weight, bias), torch.cat([pair.reference_hidden] * 2, 1)[:, :10], reference,
        targets=pair.targets.repeat_interleave(2)[::2].int(), direction="forward", backend="cuda",
    )  # fmt: skip
    out.backward(pair.upstream)
    for a, b in zip((out.detach(), hidden.grad, weight.grad, bias.grad), plain, strict=True):
        assert relative_error(a, b) < 1e-6


def test_mixed_dtypes():
    """The policy's products are of bf16, the reference's of fp32, and the other way round."""
    pair = make_pair(20, 12, 500, torch.bfloat16, E=9)
    pair.reference_hidden = pair.reference_hidden.half()
    pair.head = replace(pair.head, bias=pair.head.bias.double())
    found = ours(pair, direction="reverse")
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float64]
    assert_contract(pair, found, direction="reverse")
    pair.hidden, pair.reference_hidden = pair.hidden.float(), pair.reference_hidden.bfloat16()
    found = ours(pair, direction="jsd")
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16, torch.float64]
    assert_contract(pair, found, direction="jsd")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", PLAIN)
def test_identical_heads_are_exactly_0_apart(kind, dtype):
    pair = make_pair(20, 24, 2100, DTYPES[dtype], sharpness=8.0)
    pair.head = replace(pair.head, logit_scale=0.3, softcap=9.0)
    pair.reference_hidden, pair.reference_head = pair.hidden, pair.head
    for tensor in ours(pair, **KINDS[kind], temperature=0.7):
        assert (tensor == 0).all()


# As in tests/test_linear_kl.py: the policy a training step from its reference, and a hundred.
@pytest.mark.parametrize(("distance", "most"), [(1e-4, 1e-2), (1e-2, 1e-4)])
@pytest.mark.parametrize("kind", PLAIN)
def test_small_divergences_keep_their_digits(kind, distance, most):
    pair = make_pair(12, 16, 2500, distance=distance)
    bias = (pair.head.bias * 1024).round() / 1024
    pair.head, pair.reference_head = (
        replace(h, bias=b) for h, b in ((pair.head, bias), (pair.reference_head, bias + 64.0))
    )
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    found = without_head(pair, **KINDS[kind])
    assert (found[0] >= 0).all()
    assert relative_error(found[0], truth[0]) < min(most, relative_error(plain[0], truth[0]) / 4)
    assert_error_contract("d_hidden", found[1], plain[1], truth[1])


@pytest.mark.parametrize("kind", PLAIN)
def test_a_few_rows_far_apart_in_a_small_divergence(kind):
    """Their terms are not of the form that small ones have; in both slots."""
    pair = make_pair(12, 16, 2500, distance=1e-3)
    bias = pair.reference_head.bias.clone()
    bias[100:110] += 1.0
    bias[2100:2110] -= 2.0
    pair.reference_head = replace(pair.reference_head, bias=bias)
    found, truth = without_head(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])
    assert truth[0].median() < 0.1
    assert relative_error(found[0], truth[0]) < 2e-6
    assert_error_contract("d_hidden", found[1], dense(pair, **KINDS[kind])[1], truth[1])


@pytest.mark.parametrize(("kind", "scale"), [("forward", 1e4), ("reverse", 30.0), ("reverse", 1e4), ("jsd 0.1", 1e4)])
def test_sharp_policies_and_large_logits(kind, scale):
    pair = make_pair(12, 16, 2500, sharpness=scale)
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    # Where a token is all but certain its gradient is what fp32 leaves of the difference of two numbers near 1.
    floors = (0.0, 1e-7 * pair.upstream.norm() * pair.head.weight.norm(dim=1).max())
    for name, a, b, c, floor in zip(NAMES, without_head(pair, **KINDS[kind]), plain, truth, floors, strict=False):
        assert a.isfinite().all()
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 3e-7 * c.norm() + floor, name


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_policies(kind):
    """Logits of +-1e4 on one row, in two slots: the reference agrees, puts its mass elsewhere, or knows nothing."""
    hidden, weight, other_weight = torch.eye(3), torch.zeros(2200, 3), torch.zeros(2200, 3)
    weight[5, 0] = weight[2106, 1] = weight[7, 2] = 1e4
    other_weight[5, 0] = other_weight[9, 1] = 1e4
    pair = Pair(hidden, LMHead(weight), hidden, LMHead(other_weight), torch.arange(3), torch.ones(3))
    found, truth = without_head(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])
    for a, b in zip(found, truth, strict=False):
        assert a.isfinite().all()
        assert torch.allclose(a, b.float(), rtol=2e-6, atol=1e-9)
    if kind != "reverse":
        assert found[0][0] == 0


@pytest.mark.parametrize("kind", PLAIN)
def test_rows_masked_in_both_heads(kind):
    """A whole slot without probability, the first, and what is behind the others."""
    pair = make_pair(8, 8, 2800)
    for head in (pair.head, pair.reference_head):
        head.bias[:2100] = head.bias[2700:] = -math.inf
    small = replace(pair, targets=pair.targets % 600)
    small.head, small.reference_head = (
        LMHead(h.weight[2100:2700], h.bias[2100:2700]) for h in (pair.head, pair.reference_head)
    )
    found, truth = ours(pair, **KINDS[kind]), dense(small, torch.float64, **KINDS[kind])
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert relative_error(a[2100:2700] if i > 1 else a, b) < 1e-5
        if i > 1:
            assert (a[:2100] == 0).all()
            assert (a[2700:] == 0).all()


# The rows that one head lacks: some of a slot, and a whole slot that holds most of the other's probability.
@pytest.mark.parametrize("rows", [slice(7, 300), slice(0, 2048)])
@pytest.mark.parametrize("where", ["policy", "reference"])
def test_rows_masked_in_one_head(where, rows):
    pair = make_pair(8, 8, 2500)
    lacking, other = (pair.head, pair.reference_head) if where == "policy" else (pair.reference_head, pair.head)
    lacking.bias[rows] = -math.inf
    infinite, finite = ("forward", "reverse") if where == "policy" else ("reverse", "forward")
    value, d_hidden = without_head(pair, direction=infinite)
    assert (value == math.inf).all()
    if infinite == "forward":
        assert relative_error(d_hidden, dense(pair, torch.float64, direction="forward")[1]) < 4e-6
    else:
        assert not d_hidden.isfinite().any()
    for options in (KINDS[finite], KINDS["jsd"]):
        for a, b in zip(without_head(pair, **options), dense_masked(pair, **options), strict=False):
            assert relative_error(a, b) < 1e-5
    other.bias[:] = -math.inf
    assert without_head(pair, direction=finite)[0].isnan().all()  # a head without any probability is no distribution


@pytest.mark.parametrize("kind", PLAIN)
def test_slots_far_apart(kind):
    """Each head's probability in a slot of its own, and another where both have next to nothing: the slots' centers differ by hundreds,
    and what is lost in one must not drown the rest."""
    pair = make_pair(5, 8, 4200, sharpness=1.0)
    pair.head.bias[:2048], pair.head.bias[2048:4096], pair.head.bias[4096:] = 0.0, -300.0, -40.0
    other_bias = pair.reference_head.bias
    other_bias[:2048], other_bias[2048:4096], other_bias[4096:] = -20.0, 1.0, -900.0
    plain, truth = dense(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])
    for name, *tensors in zip(NAMES, without_head(pair, **KINDS[kind]), plain, truth, strict=False):
        assert tensors[0].isfinite().all()
        assert_error_contract(name, *tensors)


@pytest.mark.parametrize("kind", PLAIN)
def test_nothing_to_score(kind):
    for pair in (make_pair(0, 5, 7), make_pair(6, 5, 7, ignored=2.0)):
        for found in (ours(pair, **KINDS[kind]), ours(pair, **KINDS[kind], max_scored=0)):
            assert found[0].shape == pair.targets.shape
            assert all((tensor == 0).all() for tensor in found)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["hidden", "reference_hidden", "upstream", "ignored"])
@pytest.mark.parametrize("kind", ["reverse"])
def test_a_non_finite_row_stays_in_its_row(kind, where, bad):
    check_a_non_finite_row(make_pair(20, 8, 60, bias=False), lambda p: ours(p, **KINDS[kind]), where, bad)


@pytest.mark.skipif(DEVICE == "cpu", reason="targets on the CPU raise at once")
def test_a_target_outside_the_vocabulary():
    pair = make_pair(6, 8, 30)
    clean, pair.targets[2] = ours(pair, direction="jsd"), 30
    value, d_hidden, d_weight, _ = ours(pair, direction="jsd")
    others = torch.arange(6) != 2
    assert value[2].isnan()
    assert d_hidden[2].isnan().all()
    assert d_weight.isnan().any()
    assert torch.equal(value[others], clean[0][others])
    with pytest.raises(ValueError, match="targets: 30 at index 2"):
        check()


def test_more_scored_tokens_than_promised():
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="max_scored: expected at least the 6 targets that are scored, got 4"):
            ours(make_pair(6, 8, 30), direction="forward", max_scored=4)
        return
    value, d_hidden, *_ = ours(make_pair(6, 8, 30), direction="forward", max_scored=4)
    assert value.isnan().tolist() == [False] * 4 + [True] * 2
    assert (d_hidden[4:] == 0).all()


@pytest.mark.parametrize("kind", PLAIN)
def test_a_token_does_not_see_its_batch(kind):
    pair = to_device(make_pair(50, 19, 2500, torch.bfloat16, E=32), DEVICE)

    def call(rows, **options):
        p = pair.rows(rows)
        return linear_kl(
            p.hidden, p.head, p.reference_hidden, p.reference_head, backend="cuda", **KINDS[kind], **options
        )

    whole = call(slice(None))
    for rows in (slice(0, 1), slice(0, 33), slice(41, 42)):
        assert torch.equal(call(rows), whole[rows])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(call(order), whole[order])


@on_the_host
def test_jsd_passes_twice_where_memory_is_short():
    N, D, V = 40, 6, 4200
    pair = make_pair(N, D, V)
    values = []
    for workspace, units in ((0.9, 4.0), (64.0, 2.0)):
        with FlopCounter() as counter:
            values.append(
                linear_kl(pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, direction="jsd",
                          max_workspace_mb=workspace, backend="cuda")
            )  # fmt: skip
        assert counter.flop == units * 2 * 64 * D * V  # slabs of 32
        frozen = {"frozen_hidden": True, "frozen_head": True, "max_workspace_mb": workspace}
        made = plan(N, V, D, direction="jsd", backend="cuda", **frozen)
        assert made.units == units
        assert made.bytes <= workspace * 2**20
    assert torch.equal(*values)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_coefficients_of_any_size(kind, dtype):
    """Gradients scale exactly with their coefficients: the 16-bit chunk neither underflows nor overflows."""
    pair = make_pair(24, 16, 300, DTYPES[dtype], sharpness=6.0)
    pair.upstream *= 2.0**-4
    plain = ours(pair, **KINDS[kind])
    for power in (-12, 12) if dtype == "fp16" else (-80, 30):
        scaled = replace(pair, upstream=pair.upstream * 2.0**power)
        for found, base in zip(ours(scaled, **KINDS[kind])[1:], plain[1:], strict=True):
            info = torch.finfo(found.dtype)
            seen = base.abs().double() * 2.0**power >= info.tiny
            seen &= (base.abs() >= info.tiny) & (base.abs().double() * 2.0**power < info.max)
            assert torch.equal(found.double()[seen], base.double()[seen] * 2.0**power)
            assert found[base.abs().double() * 2.0**power < info.max].isfinite().all()


def test_a_reverse_divergence_of_thousands_fits_into_fp16():
    """p (log(p / q) - KL) goes up to KL / 4 or more, beyond what fp16 holds of 2 ** 13 times it."""
    hidden, weight, other = torch.eye(2, dtype=torch.float16), torch.zeros(300, 2), torch.zeros(300, 2)
    weight[4, :] = weight[9, :] = 60.0
    other[4, 0] = other[9, 1] = -4000.0
    weight[9, 1] -= 1.0
    pair = Pair(hidden, LMHead(weight.half()), hidden, LMHead(other.half()), torch.arange(2), torch.tensor([1.0, 0.25]))
    assert_contract(pair, ours(pair, direction="reverse"), direction="reverse")


@on_the_host
@pytest.mark.parametrize(("dtype", "scored"), [("fp32", 0), ("bf16", 20), ("bf16", 150)])
@pytest.mark.usefixtures("_small_slabs")
def test_nothing_is_written_outside_the_buffers(dtype, scored):
    """Slabs wholly behind the last live token included."""
    pair = make_pair(150, 12, 200, DTYPES[dtype])
    pair.targets[scored:] = -100
    plain = torch.empty
    with walled_empty() as walls:
        found = ours(pair, direction="jsd")
    assert torch.empty is plain
    assert len(walls) > 20
    assert all((wall == 7).all() for wall in walls)
    if scored >= 20:
        assert_contract(pair, found, direction="jsd")
    else:
        assert all((tensor == 0).all() for tensor in found)


@on_the_host
@pytest.mark.parametrize(("kind", "targets"), [("reverse", False), ("jsd", True)])
def test_opcheck(kind, targets):
    pair = make_pair(20, 6, 40, E=5, ignored=0.3)
    sides = (pair.hidden, pair.head.weight, pair.head.bias)
    for leaf in sides:
        leaf.requires_grad_()
    tensors = (*sides, pair.reference_hidden, pair.reference_head.weight, pair.reference_head.bias,
               pair.targets if targets else None, None if targets else torch.rand(20) + 0.5)  # fmt: skip
    options = (0.9, [1.1, 1.0], [4.0, 0.0], -100, 20, kind, 0.5, False, None)
    torch.library.opcheck(ops.linear_kl_forward, (*tensors, *options, [True, True], "cuda"))


# In units of a product of the policy; the reference's hidden size is half of it. 384 is a multiple of both slabs. A 16-bit gradient is
# multiplied in two halves.
@on_the_host
@pytest.mark.parametrize(
    ("kind", "dtype", "wants", "work"),
    [
        ("forward", "fp32", "hidden weight", 5.0),
        ("reverse", "bf16", "hidden weight", 7.0),
        ("forward", "fp32", "", 1.5),
        ("jsd", "fp32", "hidden", 4.0),
    ],
)
def test_matrix_work(kind, dtype, wants, work):
    N, D, V = 384, 16, 2300
    pair = make_pair(N + 40, D, V, DTYPES[dtype], E=8, bias=False)
    pair.targets[N:] = -100
    for name, leaf in (("hidden", pair.hidden), ("weight", pair.head.weight)):
        leaf.requires_grad_(name in wants.split())
    with FlopCounter() as counter:
        out = linear_kl(
            pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, max_scored=N,
            backend="cuda", **KINDS[kind],
        )  # fmt: skip
        if wants:
            out.backward(pair.upstream)
    assert counter.flop / (2 * N * D * V) == pytest.approx(work, rel=1e-6)
    frozen = {"frozen_hidden": "hidden" not in wants, "frozen_head": "weight" not in wants}
    assert plan(N, V, D, DTYPES[dtype], direction=kind, reference_D=8, backend="cuda", **frozen).units == work


@on_the_host
@pytest.mark.parametrize(("kind", "workspace"), [("reverse", 3.0), ("jsd", None)])
def test_the_bytes_of_the_plan_hold(kind, workspace):
    N, D, V = 300, 64, 3000
    pair = make_pair(N, D, V, bias=False)
    pair.hidden.requires_grad_(), pair.head.weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_kl(
            pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, max_workspace_mb=workspace, backend="cuda", **KINDS[kind]
        ).backward(pair.upstream)  # fmt: skip
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    gradients = sum(x.numel() * x.element_size() for x in (pair.hidden, pair.head.weight))
    made = plan(N, V, D, direction=kind, max_workspace_mb=workspace, backend="cuda")
    assert gradients < peak <= gradients + made.bytes + (64 << 10)
    assert made.bytes <= (workspace or 64) * 2**20


def problem_of(kind: str, **changes) -> Problem:
    divergence = Divergence(kind, 0.5, changes.pop("E", 4096), torch.bfloat16, torch.bfloat16)
    return Problem(**{"device_type": "cuda", "hidden_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "N": 8192, "D": 4096,
                      "V": 128256, "arch": "sm_90", "divergence": divergence, **changes})  # fmt: skip


def test_the_plan_of_a_large_problem():
    """Half a gibibyte beside the fp32 sums of d_hidden, as every plan of a GPU without a budget."""
    most = plans.DEFAULT_MIB * 2**20 + 4 * 8192 * 4096
    for kind, units in (("forward", 8.0), ("reverse", 8.0), ("jsd", 8.0)):
        made = cuda_linear_kl.make_plan(problem_of(kind))
        assert made.units == units
        assert made.bytes <= most
    assert linear_kl_plan.forward_shape(problem_of("forward")) == (1024, 8192)
    assert [linear_kl_plan.forward_shape(problem_of("jsd", V=V))[0] for V in (32000, 50000, 128256, 262144)] == [
        1024,
        512,
        256,
        256,
    ]
    wide, tight = problem_of("jsd", V=262144), problem_of("jsd", max_workspace_mb=400.0)
    assert [linear_kl_plan.keeps_stripe(p) for p in (problem_of("jsd"), wide, tight)] == [True, False, True]
    assert cuda_linear_kl.make_plan(wide).units == 10.0
    assert cuda_linear_kl.make_plan(problem_of("reverse", E=1024, need_weight=False)).units == 2 * 1.25 + 2


def test_a_budget_that_is_too_small_names_the_least():
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least") as refusal:
        cuda_linear_kl.make_plan(problem_of("reverse", max_workspace_mb=1.0))
    least = float(str(refusal.value).split("at least ")[1].split()[0])
    made = cuda_linear_kl.make_plan(problem_of("reverse", max_workspace_mb=least))
    assert made.split
    assert made.units == 10.0
    assert made.bytes <= least * 2**20


def test_refusals():
    assert cuda.refusal(problem_of("jsd", device_type="cpu", arch=None)) is None or DEVICE == "cuda"
    double = Divergence("jsd", 0.5, 4, torch.bfloat16, torch.float64)
    sentence = "linear_kl: of the reference, takes float16, bfloat16 and float32, not weight in torch.float64"
    assert cuda.refusal(problem_of("jsd", divergence=double)) == sentence
    assert cuda.refusal(problem_of("jsd", hidden_dtype=torch.float64)).startswith("linear_kl: of the policy, takes")
    assert f"refuses: {sentence}" in explain_backends(problem_of("jsd", divergence=double))
    with pytest.raises(NoBackend, match="backend 'cuda' refuses: linear_kl: of the policy"):
        ours(make_pair(3, 4, 5, torch.float64), direction="forward")


@on_the_host
def test_bad_arguments_name_kernel_and_argument():
    kernels = emulated_module()
    fold = dict.fromkeys(
        ("base", "other", "base_bias", "base_bias_dtype", "other_bias", "other_bias_dtype", "inverse_temperature", "count", "base_max",
         "other_max", "base_sum", "other_sum", "center", "gap_sum", "excess_sum", "linear_sum", "apart_sum", "first", "T", "begin", "end",
         "stride_base", "stride_other", "base_scale", "base_softcap", "other_scale", "other_softcap"), 0,
    )  # fmt: skip
    for changes, message in (
        ({"begin": 5}, "linear_kl_fold: begin: expected the beginning of a slot, got 5"),
        ({"begin": 2048}, "linear_kl_fold: end: expected no less than begin, got 0"),
        ({"base_bias": 1, "base_bias_dtype": 5}, "linear_kl_fold: base_bias_dtype: expected 0, 1 or 2, got 5"),
        ({"center": 1}, "linear_kl_fold: center: expected none, or one beside gap_sum"),
        ({"T": 1}, "linear_kl_fold: base: expected a tensor, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.linear_kl_fold(0, **{**fold, **changes})
