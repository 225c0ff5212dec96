"""`linear_kl` by the kernels of the GPU backends, against fp64 autograd over dense logits: on a GPU where there is one, else interpreted or
emulated on small problems. What is asked of every backend, and how problems are made, is in tests/test_linear_kl.py and
tests/test_linear_kl_logprobs.py."""

import math
from dataclasses import replace

import pytest
import torch
from emulated_cuda import emulated_module
from gpu_backends import DEVICE, names, under, use_small_slabs
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
from test_linear_kl import assert_contract as assert_contract_of
from test_linear_kl import ours as ours_of
from test_linear_kl_logprobs import assert_contract as assert_contract_of_all
from test_linear_kl_logprobs import check_an_infinite_divergence, dense_all, run
from test_linear_kl_logprobs import ours as all_of

from isdaa_kernels import LMHead, check, explain_backends, linear_kl, ops, plan
from isdaa_kernels.backends.cuda import extension
from isdaa_kernels.backends.gpu import kl_backward_pass, kl_forward_pass, kl_tokens, library
from isdaa_kernels.backends.gpu import plan as plans
from isdaa_kernels.backends.gpu.call import Call
from isdaa_kernels.dispatch import Problem, linear_kl_module, refusal
from isdaa_kernels.divergence import Divergence
from isdaa_kernels.testing import FlopCounter, assert_error_contract, poisoned_empty, relative_error, walled_empty

on_the_host = pytest.mark.skipif(DEVICE == "cuda", reason="what is counted or walled in here are tensors of the CPU")


@pytest.fixture(autouse=True, params=sorted({name.partition(" ")[0] for name in names()}))
def _kernel_set(request, monkeypatch):
    under.name = request.param
    if under.name == "cuda" and DEVICE == "cpu":
        monkeypatch.setattr(extension, "native", emulated_module())
    with poisoned_empty():
        yield


@pytest.fixture
def _small_slabs(monkeypatch):
    use_small_slabs(monkeypatch)


def pair_of(*args, **kwargs) -> Pair:
    return to_device(make_pair(*args, **kwargs), DEVICE)


def ours(pair: Pair, **options) -> list[torch.Tensor]:
    return ours_of(pair, under.name, **options)


def without_head(pair: Pair, **options) -> list[torch.Tensor]:
    """(value, d_hidden): with a head that is frozen, whose gradient's many rows take the emulator long."""
    hidden = pair.hidden.detach().clone().requires_grad_()
    value = linear_kl(
        hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, backend=under.name, **options
    )  # fmt: skip
    value.backward(pair.upstream)
    return [value.detach(), hidden.grad]


def ours_and_logprobs(pair: Pair, *args, **options) -> list[torch.Tensor]:
    return all_of(pair, under.name, *args, **options)


def assert_contract(pair: Pair, **options) -> list[torch.Tensor]:
    found = ours(pair, **options)
    assert_contract_of(pair, found, **options)
    return found


def assert_contract_with_logprobs(pair: Pair, *args, **options) -> list[torch.Tensor]:
    found = ours_and_logprobs(pair, *args, **options)
    assert_contract_of_all(pair, found, *args, **options)
    return found


def fold_columns() -> int:
    """Of a slot of partial results where the library makes the products."""
    divergence = Divergence("reverse", 0.5, 8, torch.float32, torch.float32)
    return under.kernels.fold_columns(Problem(DEVICE, torch.float32, torch.float32, 1, 8, 8, divergence=divergence))


# A slab and a ragged second one, a chunk and a ragged second one; hidden sizes of the heads that differ, in whole steps and not.
@pytest.mark.parametrize(
    ("kind", "dtype", "logprobs"),
    [
        ("forward", "fp32", True),
        ("forward", "bf16", False),
        ("reverse", "bf16", True),
        ("reverse", "fp16", False),
        ("jsd 0.1", "fp32", False),
        ("jsd 0.9", "fp16", True),
    ],
)
@pytest.mark.usefixtures("_small_slabs")
def test_values_and_gradients(kind, dtype, logprobs):
    pair = pair_of(under.step + 6, 24, 150, DTYPES[dtype], E=19 if dtype == "fp32" else 16, ignored=0.3)
    if not logprobs:
        found = assert_contract(pair, **KINDS[kind])
    else:
        found = assert_contract_with_logprobs(pair, **KINDS[kind])
        alone = linear_kl(
            pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, backend=under.name,
            **KINDS[kind],
        )  # fmt: skip
        assert torch.equal(found[0], alone)
        assert (found[1][pair.targets == -100] == 0).all()
        assert (found[2][pair.targets == -100] == 0).all()
    assert found[0].dtype == torch.float32
    assert [d.dtype for d in found[-3:]] == [DTYPES[dtype]] * 3
    assert (found[0][pair.targets == -100] == 0).all()
    assert (found[-3][pair.targets == -100] == 0).all()
    if kind == "reverse":
        again = (ours_and_logprobs if logprobs else ours)(pair, **KINDS[kind])
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


# Two or three entries are the whole gradient of a token. Sizes of 1, odd ones, rows of the weights off 16-byte borders.
@pytest.mark.parametrize(("N", "D", "E", "V"), [(1, 1, 5, 2), (20, 7, 7, 3)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_few_entries(dtype, N, D, E, V):
    pair = pair_of(N, D, V, DTYPES[dtype], E=E)
    for kind in PLAIN:
        assert_contract(pair, **KINDS[kind])
    if N > 1:
        assert_contract_with_logprobs(pair, direction="reverse")


# More than a slot of partial results of either set, the last one ragged.
@pytest.mark.parametrize(("kind", "dtype"), [("forward", "fp32"), ("jsd", "bf16")])
def test_many_slots(kind, dtype):
    pair = pair_of(5, 8, fold_columns() + 101, DTYPES[dtype])
    pair.targets[:2] = torch.tensor([fold_columns() + 3, fold_columns() - 1])
    assert_contract_with_logprobs(pair, **KINDS[kind])


def test_two_walks(monkeypatch):
    """d_hidden, then d_weight: each makes the logits for itself."""
    pair = pair_of(33, 16, 150, torch.bfloat16, E=8)
    made = kl_backward_pass.make_plan
    monkeypatch.setattr(kl_backward_pass, "make_plan", lambda *args: replace(made(*args), split=True))
    assert_contract(pair, direction="reverse")


@pytest.mark.parametrize(("head", "kind", "dtype"), [("all", "jsd 0.1", "fp32"), ("all", "forward", "bf16"), ("scales", "jsd", "bf16"),
                                                     ("softcap of the reference", "reverse", "fp16")])  # fmt: skip
def test_head_transforms(head, kind, dtype):
    pair = pair_of(32, 24, 150, DTYPES[dtype], ignored=0.2)
    policy, reference, options = HEADS[head]
    pair.head, pair.reference_head = replace(pair.head, **policy), replace(pair.reference_head, **reference)
    if head == "all" and dtype == "bf16":
        pair.reference_head = replace(pair.reference_head, bias=None)
        options = {"temperature": torch.linspace(0.5, 1.5, 32, device=DEVICE)}
    assert_contract_with_logprobs(pair, **KINDS[kind], **options)


def test_no_bias_of_the_policy():
    pair = pair_of(20, 8, 150)
    pair.head = replace(pair.head, bias=None)
    assert len(assert_contract(pair, direction="jsd")) == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_strides(dtype):
    pair = pair_of(32, 10, 70, DTYPES[dtype], E=8)
    plain = ours(pair, direction="reverse")
    strange = lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]  # noqa: E731
    hidden = pair.hidden.T.contiguous().T.requires_grad_()
    weight = strange(pair.head.weight).requires_grad_()
    bias = pair.head.bias.repeat_interleave(2)[::2].requires_grad_()
    reference = LMHead(pair.reference_head.weight.T.contiguous().T, pair.reference_head.bias.repeat_interleave(3)[::3])
    out = linear_kl(
        hidden, LMHead(weight, bias), strange(pair.reference_hidden), reference,
        targets=pair.targets.repeat_interleave(2)[::2].int(), direction="reverse", backend=under.name,
    )  # fmt: skip
    out.backward(pair.upstream)
    for a, b in zip((out.detach(), hidden.grad, weight.grad, bias.grad), plain, strict=True):
        assert relative_error(a, b) < (1e-6 if dtype == "fp32" or a is out else 3e-3)


def test_mixed_dtypes():
    """The policy's products are of bf16, the reference's of fp32, and the other way round."""
    pair = pair_of(20, 12, 150, torch.bfloat16, E=9)
    pair.reference_hidden = pair.reference_hidden.half()
    pair.head = replace(pair.head, bias=pair.head.bias.double())
    found = assert_contract(pair, direction="reverse")
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float64]
    pair.hidden, pair.reference_hidden = pair.hidden.float(), pair.reference_hidden.bfloat16()
    found = assert_contract_with_logprobs(pair, direction="jsd")
    assert [x.dtype for x in found[3:]] == [torch.float32, torch.bfloat16, torch.float64]


def test_partial_requires_grad():
    pair = pair_of(20, 8, 60, torch.bfloat16, ignored=0.2)
    whole = dict(zip(("value", "hidden", "weight", "bias"), ours(pair, direction="jsd"), strict=True))
    for wants in ("hidden", "weight", "hidden bias"):
        leaves = {"hidden": pair.hidden, "weight": pair.head.weight, "bias": pair.head.bias}
        for name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(name in wants.split())
        out = linear_kl(
            pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, direction="jsd",
            backend=under.name,
        )  # fmt: skip
        assert torch.equal(out.detach(), whole["value"])
        out.backward(pair.upstream)
        for name, leaf in leaves.items():
            if name in wants.split():
                assert torch.equal(leaf.grad, whole[name])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize(
    ("kind", "dtype"), [("forward", "bf16"), ("reverse", "bf16"), ("jsd", "bf16"), ("jsd", "fp32")]
)
def test_identical_heads_are_exactly_0_apart(kind, dtype):
    pair = pair_of(20, 24, 150, DTYPES[dtype], sharpness=8.0)
    pair.head = replace(pair.head, logit_scale=0.3, softcap=9.0)
    pair.reference_hidden, pair.reference_head = pair.hidden, pair.head
    for tensor in ours(pair, **KINDS[kind], temperature=0.7):
        assert (tensor == 0).all()


# As in tests/test_linear_kl.py: the policy a training step from its reference, and a hundred.
@pytest.mark.parametrize(
    ("kind", "distance", "most"),
    [("forward", 1e-4, 1e-2), ("reverse", 1e-4, 1e-2), ("jsd", 1e-4, 1e-2), ("forward", 1e-2, 1e-4)],
)
def test_small_divergences_keep_their_digits(kind, distance, most):
    pair = pair_of(20, 16, 700, distance=distance)
    bias = (pair.head.bias * 1024).round() / 1024
    pair.head, pair.reference_head = replace(pair.head, bias=bias), replace(pair.reference_head, bias=bias + 64.0)
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    found = ours(pair, **KINDS[kind])
    assert (found[0] >= 0).all()
    assert relative_error(found[0], truth[0]) < min(most, relative_error(plain[0], truth[0]) / 4)
    for name, *tensors in zip(NAMES[1:], found[1:], plain[1:], truth[1:], strict=True):
        assert_error_contract(name, *tensors)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_few_rows_far_apart_in_a_small_divergence(kind):
    """Their terms are not of the form that small ones have; in both slots."""
    pair, other = pair_of(12, 16, fold_columns() + 200, distance=1e-3), fold_columns() + 50
    bias = pair.reference_head.bias.clone()
    bias[100:110] += 1.0
    bias[other : other + 10] -= 2.0
    pair.reference_head = replace(pair.reference_head, bias=bias)
    found, truth = without_head(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])
    assert truth[0].median() < 0.1
    assert relative_error(found[0], truth[0]) < 4e-6
    assert_error_contract("d_hidden", found[1], dense(pair, **KINDS[kind])[1], truth[1])


@pytest.mark.parametrize(("kind", "scale"), [("forward", 1e4), ("reverse", 30.0), ("reverse", 1e4), ("jsd 0.1", 1e4)])
def test_sharp_policies_and_large_logits(kind, scale):
    pair = pair_of(20, 16, 600, sharpness=scale)
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    # Where a token is all but certain its gradient is what fp32 leaves of the difference of two numbers near 1.
    floors = (0.0, 1e-7 * pair.upstream.norm() * pair.head.weight.norm(dim=1).max(), 1e-7 * pair.upstream.norm(), 1e-7)
    for name, a, b, c, floor in zip(NAMES, ours(pair, **KINDS[kind]), plain, truth, floors, strict=True):
        assert a.isfinite().all()
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 3e-7 * c.norm() + floor, name


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_policies(kind):
    """Logits of +-1e4 on one row, in two slots: the reference agrees, puts its mass elsewhere, or knows nothing."""
    V = fold_columns() + 100
    hidden, weight, other = torch.eye(3), torch.zeros(V, 3), torch.zeros(V, 3)
    weight[5, 0] = weight[V - 60, 1] = weight[7, 2] = other[5, 0] = other[9, 1] = 1e4
    pair = to_device(Pair(hidden, LMHead(weight), hidden, LMHead(other), torch.arange(3), torch.ones(3)), DEVICE)
    found, truth = without_head(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])
    for a, b in zip(found, truth, strict=False):
        assert a.isfinite().all()
        assert torch.allclose(a, b.float(), rtol=2e-6, atol=1e-9)
    if kind != "reverse":
        assert found[0][0] == 0


@pytest.mark.parametrize("where", ["policy", "reference"])
def test_rows_without_probability_in_one_head(where):
    """A whole slot among them: what the other has there still counts."""
    rows = slice(0, fold_columns() + 8)
    pair = pair_of(8, 8, rows.stop + 192)
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


@pytest.mark.parametrize("kind", ["reverse", "jsd"])
def test_rows_without_probability_in_both_heads(kind):
    """A whole slot and a part of the next; what is behind the others."""
    W = fold_columns()
    pair = pair_of(8, 8, W + 300)
    for head in (pair.head, pair.reference_head):
        head.bias[: W + 40] = head.bias[W + 200 :] = -math.inf
    small = replace(pair, targets=pair.targets % 160)
    small.head, small.reference_head = (
        LMHead(h.weight[W + 40 : W + 200], h.bias[W + 40 : W + 200]) for h in (pair.head, pair.reference_head)
    )
    found, truth = ours(pair, **KINDS[kind]), dense(small, torch.float64, **KINDS[kind])
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert relative_error(a[W + 40 : W + 200] if i > 1 else a, b) < 1e-5
        if i > 1:
            assert (a[: W + 40] == 0).all()
            assert (a[W + 200 :] == 0).all()


@pytest.mark.parametrize("kind", PLAIN)
def test_slots_far_apart(kind):
    """Each head's probability in a slot of its own, and another where both have next to nothing: the slots' centers differ by hundreds,
    and what is lost in one must not drown the rest."""
    W = fold_columns()
    pair = pair_of(5, 8, 2 * W + 104, sharpness=1.0)
    pair.head.bias[:W], pair.head.bias[W : 2 * W], pair.head.bias[2 * W :] = 0.0, -300.0, -40.0
    other_bias = pair.reference_head.bias
    other_bias[:W], other_bias[W : 2 * W], other_bias[2 * W :] = -20.0, 1.0, -900.0
    plain, truth = dense(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])
    for name, *tensors in zip(NAMES, without_head(pair, **KINDS[kind]), plain, truth, strict=False):
        assert tensors[0].isfinite().all()
        if kind != "jsd" or name == "divergence":  # the gradient of one that cannot grow is next to nothing
            assert_error_contract(name, *tensors)


def test_nothing_to_score():
    for pair in (pair_of(0, 5, 7, torch.bfloat16), pair_of(6, 5, 7, ignored=2.0)):
        for found in (ours(pair, direction="jsd"), ours(pair, direction="reverse", max_scored=0)):
            assert found[0].shape == pair.targets.shape
            assert all((tensor == 0).all() for tensor in found)
        assert all((tensor == 0).all() for tensor in ours_and_logprobs(pair, direction="forward"))


@pytest.mark.parametrize(("dtype", "bad"), [("fp32", math.nan), ("bf16", math.inf)])
@pytest.mark.parametrize("where", ["hidden", "reference_hidden", "upstream", "ignored"])
def test_a_non_finite_row_stays_in_its_row(where, dtype, bad):
    pair, bar = pair_of(20, 8, 60, DTYPES[dtype], bias=False), 1e-6 if dtype == "fp32" else 4e-3
    check_a_non_finite_row(pair, lambda p: ours(p, direction="reverse"), where, bad, bar)


@pytest.mark.parametrize("where", ["logprob", "divergence"])
def test_a_non_finite_coefficient_stays_in_its_row(where):
    pair = pair_of(20, 8, 60, torch.bfloat16, bias=False)
    leaves = pair.hidden.requires_grad_(), pair.head.weight.requires_grad_()
    out = linear_kl(
        pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, logprobs=True,
        direction="reverse", backend=under.name,
    )  # fmt: skip
    outputs, ones = (out.divergence, out.logprob), torch.ones(20, device=DEVICE)
    clean = torch.autograd.grad(outputs, leaves, (ones, ones), retain_graph=True)
    bad = ones.clone()
    bad[5] = math.nan
    found = torch.autograd.grad(outputs, leaves, (bad, ones) if where == "divergence" else (ones, bad))
    others = torch.arange(20, device=DEVICE) != 5
    assert not found[0][5].isfinite().any()
    assert relative_error(found[0][others], clean[0][others]) < 4e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="targets on the CPU raise at once")
def test_a_target_outside_the_vocabulary():
    pair = pair_of(6, 8, 30)
    clean, pair.targets[2] = ours_and_logprobs(pair, direction="jsd"), 30
    *values, d_hidden, d_weight, _ = ours_and_logprobs(pair, direction="jsd")
    others = torch.arange(6, device=DEVICE) != 2
    for value, whole in zip(values, clean, strict=False):
        assert value[2].isnan()
        assert torch.equal(value[others], whole[others])
    assert d_hidden[2].isnan().all()
    assert d_weight.isnan().any()
    with pytest.raises(ValueError, match="targets: 30 at index 2"):
        check()


def test_more_scored_tokens_than_promised():
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="max_scored: expected at least the 6 targets that are scored, got 4"):
            ours(pair_of(6, 8, 30), direction="forward", max_scored=4)
        return
    value, d_hidden, *_ = ours(pair_of(6, 8, 30), direction="forward", max_scored=4)
    assert value.isnan().tolist() == [False] * 4 + [True] * 2
    assert (d_hidden[4:] == 0).all()


@pytest.mark.parametrize(("kind", "dtype"), [("forward", "bf16"), ("reverse", "fp32"), ("jsd", "bf16")])
@pytest.mark.usefixtures("_small_slabs")
def test_a_token_does_not_see_its_batch(kind, dtype):
    pair = pair_of(40, 19, 150, DTYPES[dtype], E=16)

    def call(rows):
        p = pair.rows(rows)
        return linear_kl(
            p.hidden, p.head, p.reference_hidden, p.reference_head, targets=p.targets, logprobs=True, backend=under.name, **KINDS[kind]
        )  # fmt: skip

    whole = call(slice(None))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    # The interpreter multiplies by NumPy, which rounds the rows of a product one way here, another there.
    for rows in (slice(0, 1), slice(0, 33), slice(39, 40) if under.name == "triton" and DEVICE == "cpu" else order):
        assert all(torch.equal(a, b[rows]) for a, b in zip(call(rows), whole, strict=True))


@on_the_host
def test_jsd_passes_twice_where_memory_is_short():
    N, D, V = 40, 6, 2100
    pair, frozen = (
        pair_of(N, D, V),
        {"frozen_hidden": True, "frozen_head": True, "direction": "jsd", "backend": under.name},
    )
    assert plan(N, V, D, **frozen).units == 2.0
    values, least = [], plan(N, V, D, **frozen).bytes / 2**20
    for workspace, units in ((least - 0.01, 4.0), (least + 0.01, 2.0)):
        with FlopCounter() as counter:
            values.append(
                linear_kl(pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, direction="jsd",
                          max_workspace_mb=workspace, backend=under.name)
            )  # fmt: skip
        assert counter.flop == units * 2 * 64 * D * V  # slabs of 32
        made = plan(N, V, D, max_workspace_mb=workspace, **frozen)
        assert made.units == units
        assert made.bytes <= workspace * 2**20
    assert torch.equal(*values)


@pytest.mark.parametrize(("dtype", "logprobs"), [("fp32", False), ("bf16", True), ("fp16", False)])
def test_gradients_scale_exactly_with_their_coefficients(logprobs, dtype):
    """The 16-bit chunk neither underflows nor overflows; 2 ** -100 is 8e-31."""
    pair = pair_of(24, 16, 150, DTYPES[dtype], sharpness=6.0)
    pair.upstream *= 2.0**-4
    take = ours_and_logprobs if logprobs else ours
    plain = take(pair, direction="reverse")
    for power in (-12, 12) if dtype == "fp16" else (-100, 30):
        scaled = replace(pair, upstream=pair.upstream * 2.0**power)
        for found, base in zip(take(scaled, direction="reverse")[-3:], plain[-3:], strict=True):
            info, expected = torch.finfo(found.dtype), base.double() * 2.0**power
            seen = (base.abs() >= info.tiny) & (expected.abs() >= info.tiny) & (expected.abs() < info.max)
            assert torch.equal(found.double()[seen], expected[seen])
            assert found[expected.abs() < info.max].isfinite().all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_faint_tokens_keep_their_digits(dtype):
    """Coefficients over 40 powers of two, hidden states over 20, so that every token but the first is in the shade of another."""
    pair = pair_of(32, 16, 150, torch.float32, bias=False)
    pair.hidden *= torch.logspace(0, -6, 32, device=DEVICE)[:, None]
    pair.hidden, pair.reference_hidden = (x.to(DTYPES[dtype]) for x in (pair.hidden, pair.reference_hidden))
    for name in ("head", "reference_head"):
        setattr(pair, name, LMHead(getattr(pair, name).weight.to(DTYPES[dtype])))
    least = -12 if dtype == "bf16" else -3
    pair.upstream = torch.logspace(0, least, 32, device=DEVICE)
    found, plain, truth = (
        ours(pair, direction="reverse"),
        dense(pair, direction="reverse"),
        dense(pair, torch.float64, direction="reverse"),
    )
    assert_error_contract("d_weight", found[2], plain[2], truth[2])
    for a, b, c in zip(found[1], plain[1], truth[1], strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + 1e-5
    twice = replace(pair, upstream=pair.upstream * 2.0**-70 if dtype == "bf16" else pair.upstream * 0.5)
    twice.upstream[0] = 1.0  # the others contribute next to nothing to d_weight
    alone = ours(twice, direction="reverse")[1][1:].double() * (2.0**70 if dtype == "bf16" else 2.0)
    for a, b in zip(alone, truth[1][1:], strict=True):
        assert relative_error(a, b) < 2 ** (-6 if dtype == "bf16" else -8) or dtype == "fp16"


def test_faint_hidden_states_weigh_in_d_bias():
    """A token whose hidden state is 2 ** -30 of another's, but not its coefficient."""
    pair = pair_of(8, 16, 60, torch.bfloat16)
    pair.hidden[1:] *= 2.0**-30
    assert_contract(pair, direction="forward")


def test_rows_that_no_token_expects_keep_their_digits():
    """Entries of 1e-10 beside others of 1: fp16 does not hold both."""
    pair = pair_of(20, 16, 150, torch.bfloat16, sharpness=1.0)
    for head in (pair.head, pair.reference_head):
        head.bias[40:] -= 21.0
    found, plain, truth = (
        f(pair, **KINDS["forward"]) for f in (ours, dense, lambda p, **k: dense(p, torch.float64, **k))
    )
    assert 1e-11 < truth[2][40:].norm() / truth[2].norm() < 1e-8
    assert_error_contract("d_weight", found[2][40:], plain[2][40:], truth[2][40:])


@pytest.mark.parametrize(("kind", "dtype"), [("forward", "bf16"), ("jsd", "bf16"), ("reverse", "fp16")])
def test_what_rows_of_the_head_have_in_common(kind, dtype):
    """The rows of a real head have much in common, which the gradient, whose entries add up to 0, does not see: a chunk rounded as its
    results are would leave up to twice their error."""
    pair = make_pair(24, 32, 400, distance=0.03, bias=False)
    common = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    for name in ("head", "reference_head"):
        weight = getattr(pair, name).weight
        setattr(pair, name, LMHead((weight + 2 * weight.std() * common).to(DTYPES[dtype])))
    pair.hidden, pair.reference_hidden = (x.to(DTYPES[dtype]) for x in (pair.hidden, pair.reference_hidden))
    pair = to_device(pair, DEVICE)
    found, plain = ours(pair, **KINDS[kind]), dense(pair, **KINDS[kind])
    truth = dense(pair, torch.float64, **KINDS[kind])
    for name, a, b, c in zip(NAMES[1:], found[1:], plain[1:], truth[1:], strict=False):
        assert relative_error(a, c) <= (1.15 if dtype == "bf16" else 1.05) * relative_error(b, c), name


def test_a_reverse_divergence_of_thousands_fits_into_fp16():
    """p (log(p / q) - KL) goes up to KL / 4 or more, beyond what fp16 holds of 2 ** 13 times it."""
    hidden, weight, other = torch.eye(2, dtype=torch.float16), torch.zeros(300, 2), torch.zeros(300, 2)
    weight[4, :] = weight[9, :] = 60.0
    other[4, 0] = other[9, 1] = -4000.0
    weight[9, 1] -= 1.0
    pair = Pair(hidden, LMHead(weight.half()), hidden, LMHead(other.half()), torch.arange(2), torch.tensor([1.0, 0.25]))
    assert_contract(to_device(pair, DEVICE), direction="reverse")


def test_the_bound_of_an_entry():
    """No entry of a gradient is above what a token is scaled by, nor far below it where two rows are all of it."""
    random = torch.Generator().manual_seed(0)
    for V, spread in ((2, 0.01), (2, 3.0), (5, 0.1), (5, 10.0), (60, 2.0)):
        z, y = (torch.randn(500, V, generator=random, dtype=torch.float64) * spread for _ in range(2))
        for kind in KINDS:
            head = LMHead(torch.eye(V, dtype=torch.float64))
            pair = Pair(z, head, y, head, torch.zeros(500, dtype=torch.int64), torch.ones(500))
            value, d_z, _ = dense(pair, **KINDS[kind])
            weight = KINDS[kind].get("jsd_weight", 0.5)
            if "jsd" in kind:
                log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
                log_m = torch.logaddexp(log_p + math.log1p(-weight), log_q + math.log(weight))
                value = (log_p.exp() * (log_p - log_m)).sum(-1)
            bound = kl_tokens.bound_of_entries(
                Divergence(KINDS[kind]["direction"], weight, V, *[torch.float64] * 2), value
            )
            largest = d_z.abs().amax(1)
            assert (largest <= bound * (1 + 1e-9)).all()
            assert (largest >= bound / 40)[largest > 1e-3].float().mean() > 0.5 or V > 2


# Only one of the two outputs in the loss; the other one's coefficient is exactly 0, or next to nothing.
@pytest.mark.parametrize("weights", [(1.0, 0.0), (1e-30, 1.0)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_coefficients_of_different_size(dtype, weights):
    pair = pair_of(24, 16, 150, DTYPES[dtype], ignored=0.2)
    assert_contract_with_logprobs(pair, weights, direction="jsd")


@pytest.mark.parametrize("kind", PLAIN)
def test_the_last_digits_of_a_confident_policy(kind):
    """1 - p of the target where p is 1 - 1e-6: by itself, beside a divergence whose coefficient is 0."""
    hidden, weight = torch.eye(4), torch.zeros(150, 4)
    weight[11:15] = torch.eye(4) * (14.0 + math.log(150))
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0])
    pair = Pair(hidden, LMHead(weight), hidden, LMHead(weight * 0.5), torch.arange(11, 15), upstream)
    pair = to_device(pair, DEVICE)
    found = ours_and_logprobs(pair, (0.0, 1.0), **KINDS[kind])
    truth = run(pair, dense_all, (0.0, 1.0), torch.float64, **KINDS[kind])
    assert 5e-7 < -truth[1].max() < 2e-6
    for a, b in zip(found[3:], truth[3:], strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_an_infinite_divergence_leaves_the_log_probs_alone(direction):
    """One model has no probability where the other has: with the coefficient 0 the divergence adds nothing."""
    check_an_infinite_divergence(lambda: pair_of(20, 8, 150), ours_and_logprobs, direction)


@on_the_host
@pytest.mark.parametrize(("dtype", "scored"), [("fp32", 0), ("bf16", 20), ("bf16", 150)])
@pytest.mark.usefixtures("_small_slabs")
def test_nothing_is_written_outside_the_buffers(dtype, scored):
    """Slabs wholly behind the last live token included."""
    N = 150 if under.name == "cuda" else 70
    pair = pair_of(N, 12, 200, DTYPES[dtype])
    pair.targets[scored:] = -100
    plain = torch.empty
    with walled_empty() as walls:
        found = ours_and_logprobs(pair, direction="jsd")
    assert torch.empty is plain
    assert len(walls) > 20
    assert all((wall == 7).all() for wall in walls)
    if scored >= 20:
        assert_contract_of_all(pair, found, direction="jsd")
    else:
        assert all((tensor == 0).all() for tensor in found)


@on_the_host
def test_opcheck():
    pair = pair_of(8, 6, 40, E=5, ignored=0.3)
    sides = (pair.hidden, pair.head.weight, pair.head.bias)
    for leaf in sides:
        leaf.requires_grad_()
    tensors = (*sides, pair.reference_hidden, pair.reference_head.weight, pair.reference_head.bias, pair.targets, None)
    options = (0.9, [1.1, 1.0], [4.0, 0.0], -100, 8, "jsd", 0.5, True, None)
    torch.library.opcheck(ops.linear_kl_forward, (*tensors, *options, [True, True], under.name))


# In units of a product of the policy; the reference's hidden size is half of it. Fused kernels' products are none of the library's. Each
# part of a 16-bit gradient is a product: bf16 takes one for d_hidden and two for d_weight, fp16 two for each.
@pytest.mark.parametrize(
    ("kind", "dtype", "wants", "logits", "work"),
    [
        ("forward", "fp32", "hidden weight", 3.0, 2.0),
        ("reverse", "bf16", "hidden weight", 3.0, 3.0),
        ("reverse", "bf16", "hidden", 3.0, 1.0),
        ("reverse", "fp16", "hidden weight", 3.0, 4.0),
        ("forward", "fp32", "", 1.5, 0.0),
        ("jsd", "fp32", "hidden", 3.0, 1.0),
    ],
)
def test_matrix_work(kind, dtype, wants, logits, work):
    N, D, V = 1024 if DEVICE == "cuda" else under.step, 16, 300  # whole slabs
    pair = pair_of(N + 10, D, V, DTYPES[dtype], E=8, bias=False)
    pair.targets[N:] = -100
    for name, leaf in (("hidden", pair.hidden), ("weight", pair.head.weight)):
        leaf.requires_grad_(name in wants.split())
    with FlopCounter() as counter:
        out = linear_kl(
            pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, max_scored=N,
            logprobs=True, backend=under.name, **KINDS[kind],
        )  # fmt: skip
        if wants:
            (out.divergence * pair.upstream + out.logprob).sum().backward()
    fused = under.name == "triton" and dtype != "fp32"
    assert counter.flop / (2 * N * D * V) == pytest.approx(work + (0.0 if fused else logits), rel=1e-6)
    frozen = {"frozen_hidden": "hidden" not in wants, "frozen_head": "weight" not in wants}
    made = plan(N, V, D, DTYPES[dtype], direction=kind, reference_D=8, backend=under.name, **frozen)
    assert made.units == logits + work


@pytest.mark.parametrize(("kind", "below"), [("reverse", 20.0), ("reverse", 30.0), ("jsd", 40.0)])
def test_rows_that_no_token_expects(kind, below):
    """Half of the vocabulary e^-20 to e^-40 as likely as the rest: rows of d_weight keep their digits, though fp16 has none for them."""
    pair = pair_of(40, 8, 200, DTYPES["bf16"])
    for head in (pair.head, pair.reference_head):
        head.bias[100:] -= below
    *_, d_weight, _ = assert_contract(pair, **KINDS[kind])
    assert (d_weight[100:] != 0).any(1).all()


@on_the_host
@pytest.mark.parametrize("_kernel_set", ["cuda"], indirect=True)  # Triton's interpreter allocates for itself
@pytest.mark.parametrize(
    ("kind", "dtype", "workspace"), [("reverse", "fp32", 3.0), ("jsd", "fp32", None), ("forward", "bf16", 4.0)]
)
def test_the_bytes_of_the_plan_hold(monkeypatch, kind, dtype, workspace):
    if dtype == "bf16":  # products of 16-bit factors are widened on the host
        nothing = lambda a, b, out, *args: out.zero_()  # noqa: E731
        for module in (kl_forward_pass, kl_backward_pass, library):
            monkeypatch.setattr(module, "product", nothing)
        monkeypatch.setattr(library, "accumulate", nothing)
    N, D, V = 200, 64, 2500
    pair = pair_of(N, D, V, DTYPES[dtype], bias=False)
    pair.hidden.requires_grad_(), pair.head.weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_kl(
            pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, max_workspace_mb=workspace, backend=under.name,
            **KINDS[kind],
        ).backward(pair.upstream)  # fmt: skip
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    gradients = sum(x.numel() * x.element_size() for x in (pair.hidden, pair.head.weight))
    made = plan(N, V, D, DTYPES[dtype], direction=kind, max_workspace_mb=workspace, backend=under.name)
    assert gradients < peak <= gradients + made.bytes + (64 << 10)
    assert made.bytes <= (workspace or 64) * 2**20


def problem_of(kind: str, **changes) -> Problem:
    divergence = Divergence(kind, 0.5, changes.pop("E", 4096), torch.bfloat16, torch.bfloat16)
    return Problem(**{"device_type": "cuda", "hidden_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "N": 8192, "D": 4096,
                      "V": 128256, "arch": "sm_90", "divergence": divergence, **changes})  # fmt: skip


def made_plan(kind: str, **changes):
    return linear_kl_module(under.module).make_plan(problem_of(kind, **changes))


def test_the_plan_of_a_large_problem():
    """Half a gibibyte beside the fp32 sums of d_hidden, as every plan of a GPU without a budget."""
    most, fused = plans.DEFAULT_MIB * 2**20 + 4 * 8192 * 4096, under.name == "triton"
    for kind, units in (("forward", 7.0), ("reverse", 7.0), ("jsd", 9.0 if fused else 7.0)):
        made = made_plan(kind)
        assert made.units == units
        assert made.bytes <= most
    assert made_plan("reverse", hidden_dtype=torch.float16, weight_dtype=torch.float16).units == 8.0
    assert made_plan("reverse", E=1024, need_weight=False).units == 2 * 1.25 + 1
    assert made_plan("reverse", max_workspace_mb=400).bytes <= 400 * 2**20


def test_how_many_tokens_keep_their_logits():
    """fp32 factors, whose products both sets leave to the library; jsd alone keeps any."""
    fp32 = dict.fromkeys(("hidden_dtype", "weight_dtype"), torch.float32)
    calls = {V: Call(under.kernels, problem_of("jsd", V=V, **fp32)) for V in (32000, 50000, 128256, 262144)}
    assert [plans.forward_shape(call)[0] for call in calls.values()] == [1024, 512, 256, 256]
    assert plans.forward_shape(Call(under.kernels, problem_of("forward", **fp32))) == (1024, 8192)
    assert [plans.keeps_logits(call) for call in calls.values()] == [True, True, True, False]
    assert not plans.keeps_logits(Call(under.kernels, problem_of("jsd", max_workspace_mb=200.0, **fp32)))
    assert made_plan("jsd", V=262144, **fp32).units == made_plan("jsd", **fp32).units + 2.0


def test_a_budget_that_is_too_small_names_the_least():
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least") as error:
        made_plan("reverse", max_workspace_mb=1.0)
    least = float(str(error.value).split("at least ")[1].split()[0])
    made = made_plan("reverse", max_workspace_mb=least)
    assert made.split
    assert made.units == 9.0
    assert made.bytes <= least * 2**20


def test_refusals():
    double = Divergence("jsd", 0.5, 4, torch.bfloat16, torch.float64)
    sentence = "takes float16, bfloat16 and float32, not the reference's weight in torch.float64"
    assert refusal(under.name, problem_of("jsd", divergence=double)) == sentence
    lines = dict(line.split(": ", 1) for line in explain_backends(problem_of("jsd", divergence=double)).splitlines())
    assert sentence in lines[under.name]
    assert "not hidden in torch.float64" in refusal(under.name, problem_of("jsd", hidden_dtype=torch.float64))


@on_the_host
@pytest.mark.parametrize("_kernel_set", ["cuda"], indirect=True)  # Triton's kernels check nothing
def test_bad_arguments_name_kernel_and_argument():
    kernels = emulated_module()
    fold = dict.fromkeys(
        ("base", "other", "base_bias", "base_bias_dtype", "other_bias", "other_bias_dtype", "inverse_temperature", "targets", "base_target",
         "other_target", "count", "partial", "first", "T", "S", "begin", "end", "stride_base", "stride_other", "base_scale", "base_softcap",
         "other_scale", "other_softcap", "divergence"), 0,
    )  # fmt: skip
    gradient = dict.fromkeys(
        ("policy", "reference", "out", "low", "out_dtype", "low_dtype", "policy_bias", "policy_bias_dtype", "reference_bias",
         "reference_bias_dtype", "targets", "tokens", "live", "bias_sums", "T", "begin", "end", "stride_policy", "stride_reference",
         "stride_out", "policy_scale", "policy_softcap", "reference_scale", "reference_softcap", "low_factor", "direction", "jsd_weight"),
        0,
    )  # fmt: skip
    for kernel, arguments, changes, message in (
        ("fold", fold, {"begin": 5}, "begin: expected the beginning of a slot, got 5"),
        ("fold", fold, {"begin": 2048}, "end: expected no less than begin, got 0"),
        ("fold", fold, {"base_bias": 1, "base_bias_dtype": 5}, "base_bias_dtype: expected 0, 1 or 2, got 5"),
        ("fold", fold, {"targets": 1}, "targets: expected none, or some beside base_target and other_target"),
        ("fold", fold, {"T": 1}, "base: expected a tensor, got none"),
        ("gradient", gradient, {"low": 1}, "low: expected none beside a gradient that is not fp16"),
        ("gradient", gradient, {"out_dtype": 2}, "out_dtype: expected 0 or 1, got 2"),
        ("gradient", gradient, {"out_dtype": 1, "low": 1}, "low_dtype: expected 1 or 2, got 0"),
        ("gradient", gradient, {"direction": 3}, "direction: expected 0, 1 or 2, got 3"),
    ):
        with pytest.raises(ValueError, match=f"linear_kl_{kernel}: {message}"):
            getattr(kernels, f"linear_kl_{kernel}")(0, **{**arguments, **changes})
