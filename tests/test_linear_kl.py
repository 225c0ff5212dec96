"""Values and every gradient of linear_kl, on each backend, against fp64 autograd over dense logits; extremes; its numerics contract."""

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from isdaa_kernels import LMHead, NoBackend, explain_backends, linear_kl, ops, plan
from isdaa_kernels.backends.cpu import extension
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.divergence import Divergence
from isdaa_kernels.testing import (
    FlopCounter,
    assert_error_contract,
    denormal_numbers_in_products,
    dense_kl,
    poisoned_empty,
    relative_error,
)

BACKENDS = ["cpu", "reference"]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {
    "forward": {"direction": "forward"},
    "reverse": {"direction": "reverse"},
    "jsd": {"direction": "jsd"},
    "jsd 0.1": {"direction": "jsd", "jsd_weight": 0.1},
    "jsd 0.9": {"direction": "jsd", "jsd_weight": 0.9},
}
PLAIN = ["forward", "reverse", "jsd"]
NAMES = ("divergence", "d_hidden", "d_weight", "d_bias")


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@dataclass
class Pair:
    """Two models on the same tokens, and an upstream gradient."""

    hidden: Tensor  # [N, D]
    head: LMHead
    reference_hidden: Tensor  # [N, E]
    reference_head: LMHead
    targets: Tensor  # [N]
    upstream: Tensor  # [N]

    def grads(self, function, dtype=None) -> list[Tensor]:
        """(value, d_hidden, d_weight[, d_bias]) of function(hidden, head, reference_hidden, reference_head, targets=...)."""
        to = lambda x: None if x is None else x.detach().to(dtype or x.dtype)  # noqa: E731
        head, other = (replace(h, weight=to(h.weight), bias=to(h.bias)) for h in (self.head, self.reference_head))
        leaves = [x.requires_grad_() for x in (to(self.hidden), head.weight, head.bias) if x is not None]
        value = function(leaves[0], head, to(self.reference_hidden), other, targets=self.targets)
        value.backward(self.upstream.to(value.dtype))
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    def rows(self, rows) -> "Pair":
        taken = {n: getattr(self, n)[rows] for n in ("hidden", "reference_hidden", "targets", "upstream")}
        return replace(self, **taken)


def make_pair(
    N, D, V, dtype=torch.float32, *, E=None, bias=True, ignored=0.0, sharpness=3.0, distance=None, seed=0
) -> Pair:
    """Logits of standard deviation `sharpness`; two models that know nothing of each other, or that are `distance` apart."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    hidden, weight, bias_V = normal(N, D), normal(V, D) * sharpness / D**0.5, normal(V)
    if distance is None:
        other, other_weight = normal(N, E or D), normal(V, E or D) * sharpness / (E or D) ** 0.5
        other_bias = normal(V)
    else:
        other, other_weight = hidden + distance * normal(N, D), weight + distance * sharpness / D**0.5 * normal(V, D)
        other_bias = bias_V
    targets = torch.randint(V, (N,), generator=random)
    targets[torch.rand(N, generator=random) < ignored] = -100
    heads = [
        LMHead(w.to(dtype), b.to(dtype) if bias else None) for w, b in ((weight, bias_V), (other_weight, other_bias))
    ]
    return Pair(hidden.to(dtype), heads[0], other.to(dtype), heads[1], targets, normal(N))


def to_device(pair: Pair, device: str) -> Pair:
    moved = {name: getattr(pair, name).to(device) for name in ("hidden", "reference_hidden", "targets", "upstream")}
    for name in ("head", "reference_head"):
        head = getattr(pair, name)
        moved[name] = replace(
            head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device)
        )
    return replace(pair, **moved)


def ours(pair, backend=None, **options):
    return pair.grads(lambda *a, **k: linear_kl(*a, **k, backend=backend, **options))


def dense(pair, dtype=None, **options):
    return pair.grads(lambda *a, **k: dense_kl(*a, **k, **options), dtype)


def assert_contract(pair, found, **options):
    for name, *tensors in zip(
        NAMES, found, dense(pair, **options), dense(pair, torch.float64, **options), strict=False
    ):
        assert_error_contract(name, *tensors)


@lru_cache(maxsize=1)
def pair_and_dense(kind, dtype, N, D, E, V):
    pair = make_pair(N, D, V, DTYPES[dtype], E=E, ignored=0.3)
    return pair, dense(pair, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])


# N: 1, below and above the least tile of 128 and the forward tile of 512. V: below one vector of any instruction set, ragged, one whole
# tile, two tiles and a ragged third. D, E: 1, odd, a multiple of 16, equal and not.
@pytest.mark.parametrize("backend", BACKENDS)  # one after the other, so that one truth serves them
@pytest.mark.parametrize(
    ("N", "D", "E", "V"), [(1, 7, 7, 3), (129, 1, 5, 53), (200, 16, 16, 2048), (600, 33, 19, 4499)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend, kind, dtype, N, D, E, V):
    pair, *expected = pair_and_dense(kind, dtype, N, D, E, V)
    found = ours(pair, backend, **KINDS[kind])
    assert found[0].dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    assert [d.dtype for d in found[1:]] == [DTYPES[dtype]] * 3
    assert (found[0][pair.targets == -100] == 0).all()
    assert (found[1][pair.targets == -100] == 0).all()
    for name, *tensors in zip(NAMES, found, *expected, strict=False):
        assert_error_contract(name, *tensors)


HEADS = {
    "scales": ({"logit_scale": 0.25}, {"logit_scale": -1.5}, {}),
    "softcap of the policy": ({"softcap": 5.0}, {}, {"temperature": 0.7}),
    "softcap of the reference": ({}, {"softcap": 4.0, "logit_scale": 2.0}, {"temperature": 1.3}),
    "all": ({"softcap": 6.0, "logit_scale": -1.5}, {"softcap": 5.0, "logit_scale": 0.5}, {"temperature": 0.8}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_transforms(backend, kind, dtype, head):
    pair = make_pair(150, 24, 2100, DTYPES[dtype], ignored=0.2)
    policy, reference, options = HEADS[head]
    pair.head, pair.reference_head = replace(pair.head, **policy), replace(pair.reference_head, **reference)
    assert_contract(pair, ours(pair, backend, **KINDS[kind], **options), **KINDS[kind], **options)


@pytest.mark.parametrize("which", ["policy", "reference", "neither"])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_bias_on_either_head(kind, which):
    pair = make_pair(40, 8, 300)
    if which != "policy":
        pair.head = replace(pair.head, bias=None)
    if which != "reference":
        pair.reference_head = replace(pair.reference_head, bias=None)
    found = ours(pair, **KINDS[kind])
    assert len(found) == (4 if which == "policy" else 3)
    assert_contract(pair, found, **KINDS[kind])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_temperature_of_each_token(backend, kind):
    pair = make_pair(70, 8, 300, ignored=0.2)
    temperature = torch.rand(70, generator=torch.Generator().manual_seed(0)) + 0.5
    found = ours(pair, backend, **KINDS[kind], temperature=temperature)
    assert_contract(pair, found, **KINDS[kind], temperature=temperature)
    one, same = (ours(pair, backend, **KINDS[kind], temperature=t)[0] for t in (torch.tensor(0.5), 0.5))
    assert torch.allclose(one, same)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    pair = make_pair(7, 4, 11, torch.float64, E=3, ignored=0.3)
    leaves = [x.requires_grad_() for x in (pair.hidden, pair.head.weight, pair.head.bias)]
    head = {"logit_scale": 0.8, "softcap": 3.0}
    temperature = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    call = lambda h, w, b: linear_kl(  # noqa: E731
        h, LMHead(w, b, **head), pair.reference_hidden, pair.reference_head, targets=pair.targets,
        temperature=temperature, backend=backend, **KINDS[kind],
    )  # fmt: skip
    assert torch.autograd.gradcheck(call, leaves)


def test_mixed_dtypes():
    pair = make_pair(60, 12, 500)
    truth = dense(pair, torch.float64, direction="reverse")
    pair.reference_hidden, pair.reference_head = (
        pair.reference_hidden.double(),
        LMHead(pair.reference_head.weight.double(), pair.reference_head.bias),
    )
    found = ours(pair, direction="reverse")
    assert [x.dtype for x in found] == [torch.float64, torch.float32, torch.float32, torch.float32]
    for a, b in zip(found, truth, strict=True):
        assert relative_error(a, b) < 1e-7
    mixed = linear_kl(
        pair.hidden.bfloat16(),
        pair.head,
        pair.reference_hidden.half(),
        pair.reference_head.weight.float(),
        direction="jsd",
    )
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_any_strides(backend, kind):
    pair = make_pair(66, 10, 130)
    plain = ours(pair, backend, **KINDS[kind])
    strange = lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]  # noqa: E731
    hidden = pair.hidden.T.contiguous().T.requires_grad_()
    weight = strange(pair.head.weight).requires_grad_()
    bias = pair.head.bias.repeat_interleave(2)[::2].requires_grad_()
    reference = LMHead(pair.reference_head.weight.T.contiguous().T, pair.reference_head.bias.repeat_interleave(3)[::3])
    targets = pair.targets.repeat_interleave(2)[::2].int()
    out = linear_kl(
        hidden,
        LMHead(weight, bias),
        strange(pair.reference_hidden),
        reference,
        targets=targets,
        backend=backend,
        **KINDS[kind],
    )
    out.backward(pair.upstream)
    for a, b in zip((out.detach(), hidden.grad, weight.grad, bias.grad), plain, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4)])
def test_leading_shapes_and_no_targets(backend, leading):
    random = torch.Generator().manual_seed(1)
    hidden, reference = (torch.randn(*leading, d, generator=random) for d in (6, 4))
    heads = [LMHead(torch.randn(9, d, generator=random)) for d in (6, 4)]
    hidden.requires_grad_()
    out = linear_kl(hidden, heads[0], reference, heads[1], direction="jsd", backend=backend)
    assert out.shape == leading
    torch.testing.assert_close(out, dense_kl(hidden, heads[0], reference, heads[1], direction="jsd"))
    out.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert (hidden.grad != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants", ["hidden", "weight", "bias", "hidden weight", "weight bias", ""])
@pytest.mark.parametrize("kind", PLAIN)
def test_partial_requires_grad(backend, kind, wants):
    """The reference's tensors get none, even where they ask."""
    pair = make_pair(50, 8, 200, torch.bfloat16, ignored=0.2)
    whole = dict(zip(("value", "hidden", "weight", "bias"), ours(pair, backend, **KINDS[kind]), strict=True))
    leaves = {"hidden": pair.hidden, "weight": pair.head.weight, "bias": pair.head.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wants.split())
    others = (pair.reference_hidden, pair.reference_head.weight, pair.reference_head.bias)
    for leaf in others:
        leaf.requires_grad_()
    out = linear_kl(
        pair.hidden,
        pair.head,
        pair.reference_hidden,
        pair.reference_head,
        targets=pair.targets,
        backend=backend,
        **KINDS[kind],
    )
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_identical_heads_are_exactly_0_apart(backend, kind):
    pair = make_pair(140, 24, 3000, sharpness=8.0)
    pair.reference_hidden, pair.reference_head = pair.hidden, pair.head
    for tensor in ours(pair, backend, **KINDS[kind]):
        assert (tensor == 0).all()


# The policy a training step, ten and a hundred away from its reference. Dense fp32 has lost all digits at the first, where the error
# that is left comes with the logits' own rounding, which is 1e-7 of them against a difference of 1e-4.
@pytest.mark.parametrize(("distance", "most"), [(1e-4, 1e-2), (1e-3, 1e-3), (1e-2, 1e-4)])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_divergences_keep_their_digits(backend, kind, distance, most):
    pair = make_pair(60, 16, 5000, distance=distance)
    offset = 64.0  # a head that is another by 64 gives the same distribution; so does its bias, on this grid
    bias = (pair.head.bias * 1024).round() / 1024
    pair.head, pair.reference_head = (
        replace(h, bias=b) for h, b in ((pair.head, bias), (pair.reference_head, bias + offset))
    )
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    found = ours(pair, backend, **KINDS[kind])
    assert (found[0] >= 0).all()
    assert truth[0].max() < 300 * distance**2
    assert relative_error(found[0], truth[0]) < most
    assert relative_error(found[0], truth[0]) < relative_error(plain[0], truth[0]) / 4
    for name, *tensors in zip(NAMES[1:], found[1:], plain[1:], truth[1:], strict=True):
        assert_error_contract(name, *tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_sharp_policies_and_large_logits(backend, kind, scale):
    pair = make_pair(40, 16, 2500, sharpness=scale)
    truth, plain = dense(pair, torch.float64, **KINDS[kind]), dense(pair, **KINDS[kind])
    found = ours(pair, backend, **KINDS[kind])
    for name, *tensors in zip(NAMES, found, plain, truth, strict=True):
        assert tensors[0].isfinite().all()
        assert relative_error(tensors[0], tensors[2]) <= 1.5 * relative_error(tensors[1], tensors[2]) + 3e-7, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_policies(backend, kind):
    """Logits of +-1e4 on one row: the reference agrees, puts its mass elsewhere, or knows nothing."""
    hidden, weight = torch.eye(3), torch.zeros(200, 3)
    weight[5, 0] = weight[6, 1] = weight[7, 2] = 1e4
    other_weight = torch.zeros(200, 3)
    other_weight[5, 0] = other_weight[9, 1] = 1e4
    pair = Pair(hidden, LMHead(weight), hidden, LMHead(other_weight), torch.arange(3), torch.ones(3))
    found, truth = ours(pair, backend, **KINDS[kind]), dense(pair, torch.float64, **KINDS[kind])
    for a, b in zip(found, truth, strict=True):
        assert a.isfinite().all()
        assert torch.allclose(a, b.float(), rtol=2e-6, atol=1e-9)
    if kind != "reverse":
        assert found[0][0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_masked_in_both_heads(backend, kind):
    """Whole tiles without probability, the first among them."""
    pair = make_pair(20, 8, 6200)
    for head in (pair.head, pair.reference_head):
        head.bias[:2100] = head.bias[3000:] = -math.inf
    small = replace(pair, targets=pair.targets % 900)
    small.head, small.reference_head = (
        LMHead(h.weight[2100:3000], h.bias[2100:3000]) for h in (pair.head, pair.reference_head)
    )
    found, truth = ours(pair, backend, **KINDS[kind]), dense(small, torch.float64, **KINDS[kind])
    for i, (a, b) in enumerate(zip(found, truth, strict=True)):
        assert relative_error(a[2100:3000] if i > 1 else a, b) < 4e-6
        if i > 1:
            assert (a[:2100] == 0).all()
            assert (a[3000:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["policy", "reference"])
def test_rows_masked_in_one_head(backend, where):
    pair = make_pair(20, 8, 2500)
    lacking, other = (pair.head, pair.reference_head) if where == "policy" else (pair.reference_head, pair.head)
    lacking.bias[7] = lacking.bias[2200] = -math.inf
    infinite, finite = ("forward", "reverse") if where == "policy" else ("reverse", "forward")
    value, *grads = ours(pair, backend, direction=infinite)
    assert (value == math.inf).all()
    if infinite == "forward":
        truth = dense(pair, torch.float64, direction="forward")
        for a, b in zip(grads, truth[1:], strict=True):
            assert relative_error(a, b) < 4e-6
    else:
        assert not any(d.isfinite().all() for d in grads)
    for options in (KINDS[finite], KINDS["jsd"], KINDS["jsd 0.1"]):
        found, truth = ours(pair, backend, **options), dense_masked(pair, **options)
        for a, b in zip(found, truth, strict=True):
            assert relative_error(a, b) < 4e-6
    other.bias[:] = -math.inf
    assert ours(pair, backend, direction=finite)[0].isnan().all()  # a head without any probability is no distribution


def dense_masked(pair, **options):
    """-inf as -1e4, which autograd over dense logits can take: in fp64 the probability is 0 all the same."""
    masked = lambda h: replace(h, bias=h.bias.masked_fill(h.bias == -math.inf, -1e4))  # noqa: E731
    pair = replace(pair, head=masked(pair.head), reference_head=masked(pair.reference_head))
    return dense(pair, torch.float64, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_nothing_to_score(backend, kind):
    for pair in (make_pair(0, 5, 7), make_pair(6, 5, 7, ignored=2.0)):
        with FlopCounter() as counter:
            found = ours(pair, backend, **KINDS[kind])
        assert found[0].shape == pair.targets.shape
        assert all((tensor == 0).all() for tensor in found)
        assert counter.flop == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["hidden", "reference_hidden", "upstream", "ignored"])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_non_finite_row_stays_in_its_row(backend, kind, where, bad):
    check_a_non_finite_row(make_pair(140, 8, 300, bias=False), lambda p: ours(p, backend, **KINDS[kind]), where, bad)


def check_a_non_finite_row(pair: Pair, call, where: str, bad: float, bar: float = 1e-6) -> None:
    """Row 5 of one input, or of both hidden states where the token is ignored, becomes `bad`; `call(pair)` without bias."""
    clean = call(pair)
    for name in ("hidden", "reference_hidden") if where == "ignored" else (where,):
        getattr(pair, name)[5] = bad
    if where == "ignored":
        pair.targets[5] = -100
    value, d_hidden, d_weight = call(pair)
    others = torch.arange(len(value), device=value.device) != 5
    assert torch.equal(value[others], clean[0][others])
    assert relative_error(d_hidden[others], clean[1][others]) < bar
    if where == "ignored":
        assert value[5] == 0
        assert (d_hidden[5] == 0).all()
        assert d_weight.isfinite().all()
    else:
        assert value[5].isfinite() == (where == "upstream")
        assert not d_hidden[5].isfinite().all()
        assert not d_weight.isfinite().all()


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_token_does_not_see_its_batch(dtype, kind):
    pair = make_pair(300, 19, 2500, DTYPES[dtype], E=32)

    def call(rows, **options):
        p = pair.rows(rows)
        return linear_kl(p.hidden, p.head, p.reference_hidden, p.reference_head, **KINDS[kind], **options)

    whole = call(slice(None))
    for N in (1, 2, 3, 7, 16, 127, 128, 129, 255, 257, 299):
        assert torch.equal(call(slice(0, N)), whole[:N])
    for i in range(0, 300, 29):
        assert torch.equal(call(slice(i, i + 1)), whole[i : i + 1])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(order), whole[order])
    for workspace in (9.0, 64.0):  # jsd: two passes, and one
        assert torch.equal(call(slice(None), max_workspace_mb=workspace), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_two_runs_are_bit_equal(backend, kind):
    pair = make_pair(600, 24, 5000, ignored=0.3)
    for a, b in zip(ours(pair, backend, **KINDS[kind]), ours(pair, backend, **KINDS[kind]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", PLAIN)
def test_gradients_scale_exactly_with_the_coefficients(kind):
    pair = make_pair(200, 16, 3000)
    plain = ours(pair, **KINDS[kind])
    pair.upstream *= 2.0**-100
    for found, base in zip(ours(pair, **KINDS[kind])[1:], plain[1:], strict=True):
        seen = base.abs() * 2.0**-100 >= torch.finfo(torch.float32).smallest_normal
        assert torch.equal(found.double()[seen], base.double()[seen] * 2.0**-100)


@pytest.mark.parametrize("kind", PLAIN)
def test_tiny_coefficients_meet_no_denormal_number(kind):
    pair = make_pair(200, 32, 3000, sharpness=12.0)
    pair.upstream = torch.cat([torch.full((100,), 1e-30), torch.full((100,), 1e-3)])
    with denormal_numbers_in_products() as seen:
        ours(pair, **KINDS[kind])
    assert len(seen) > 6
    assert not any(seen)


# In units of a product of the policy; the reference's hidden size is half of it. 128 divides N, so that nothing is padded.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wants", "work"), [("hidden weight", 5.0), ("hidden", 4.0), ("weight", 4.0), ("", 1.5)])
@pytest.mark.parametrize("kind", PLAIN)
def test_matrix_work(backend, kind, wants, work):
    N, D, V = 768, 16, 5000
    pair = make_pair(N + 300, D, V, E=8, bias=False)
    pair.targets[N:] = -100
    for name, leaf in (("hidden", pair.hidden), ("weight", pair.head.weight)):
        leaf.requires_grad_(name in wants.split())
    with FlopCounter() as counter:
        out = linear_kl(
            pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, max_scored=N,
            backend=backend, **KINDS[kind],
        )  # fmt: skip
        if wants:
            out.backward(pair.upstream)
    assert counter.flop / (2 * N * D * V) == pytest.approx(work, rel=1e-6)
    frozen = {"frozen_hidden": "hidden" not in wants, "frozen_head": "weight" not in wants}
    assert plan(N, V, D, direction=kind, reference_D=8, backend=backend, **frozen).units == work


def test_a_small_workspace_makes_jsd_pass_twice():
    N, D, V = 768, 16, 5000
    tight, wide = (plan(N, V, D, direction="jsd", max_workspace_mb=mb) for mb in (4.0, 64.0))
    assert (tight.units, wide.units) == (8.0, 6.0)
    pair = make_pair(N, D, V)
    plain = ours(pair, direction="jsd")
    with FlopCounter() as counter:
        found = ours(pair, direction="jsd", max_workspace_mb=4.0)
    assert counter.flop == 8 * 2 * N * D * V
    assert torch.equal(found[0], plain[0])
    for a, b in zip(found, plain, strict=True):
        assert relative_error(a, b) < 1e-6
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least") as refusal:
        ours(pair, direction="jsd", max_workspace_mb=0.5)
    least = float(str(refusal.value).split("at least ")[1].split()[0])
    ours(pair, direction="jsd", max_workspace_mb=least)


def test_two_passes_where_the_sums_of_d_hidden_do_not_fit():
    N, D, V = 3000, 64, 300
    for budget in range(100, 800, 2):
        try:
            made = plan(N, V, D, torch.bfloat16, direction="reverse", max_workspace_mb=budget / 100)
        except ValueError:
            continue
        break
    assert (made.split, made.units) == (True, 8.0)
    pair = make_pair(N, D, V, torch.bfloat16)
    with FlopCounter() as counter:
        found = ours(pair, direction="reverse", max_workspace_mb=budget / 100)
    assert counter.flop / (2 * N * D * V) == pytest.approx(8.0, rel=0.03)
    for a, b in zip(found, ours(pair, direction="reverse"), strict=True):
        assert relative_error(a, b) < 2e-3


def test_a_coefficient_of_zero_costs_nothing():
    pair = make_pair(512, 8, 3000, bias=False)
    pair.hidden.requires_grad_(), pair.head.weight.requires_grad_()
    out = linear_kl(pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, direction="forward")
    with FlopCounter() as counter:
        out.backward((torch.arange(512) < 256).float())
    assert counter.flop == 4 * 2 * 256 * 8 * 3000
    assert (pair.hidden.grad[256:] == 0).all()


# The logits of both heads would take 69 MiB.
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("workspace", [None, 24.0, 64.0])
@pytest.mark.parametrize("kind", PLAIN)
def test_the_bytes_of_the_plan_hold(kind, workspace, dtype):
    N, D, V = 1500, 128, 6000
    pair = make_pair(N, D, V, DTYPES[dtype], bias=False)
    pair.hidden.requires_grad_(), pair.head.weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_kl(
            pair.hidden,
            pair.head,
            pair.reference_hidden,
            pair.reference_head,
            max_workspace_mb=workspace,
            **KINDS[kind],
        ).backward(pair.upstream)
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    gradients = sum(x.numel() * x.element_size() for x in (pair.hidden, pair.head.weight))
    made = plan(N, V, D, DTYPES[dtype], direction=kind, max_workspace_mb=workspace)
    assert gradients < peak <= gradients + made.bytes + (64 << 10)
    assert made.bytes <= (workspace or 64) * 2**20


def test_a_bound_on_the_scored_tokens():
    pair = make_pair(40, 8, 90, ignored=0.5)
    scored = int((pair.targets != -100).sum())
    for a, b in zip(ours(pair, direction="jsd", max_scored=scored), ours(pair, direction="jsd"), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f"max_scored: expected at least the {scored}"):
        ours(pair, direction="jsd", max_scored=scored - 1)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set(name, kind):
    best = extension.native.instruction_set()
    try:
        extension.native.use_instruction_set(name)
    except ValueError:
        return
    try:
        pair = make_pair(30, 16, 2077)
        pair.head = replace(pair.head, softcap=8.0)
        assert_contract(pair, ours(pair, "cpu", **KINDS[kind]), **KINDS[kind])
        near = make_pair(30, 16, 2077, distance=1e-3)
        truth = dense(near, torch.float64, **KINDS[kind])
        assert relative_error(ours(near, "cpu", **KINDS[kind])[0], truth[0]) < 1e-3
    finally:
        extension.native.use_instruction_set(best)


# What tracing sees of the operators asks no backend: one is traced, each is compared with their fake results.
@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(("targets", "logprobs"), [(True, True), (True, False), (False, False)])
def test_opcheck(backend, kind, targets, logprobs):
    pair = make_pair(20, 6, 40, E=5, ignored=0.3)
    sides = (pair.hidden, pair.head.weight, pair.head.bias)
    for leaf in sides:
        leaf.requires_grad_()
    tensors = (*sides, pair.reference_hidden, pair.reference_head.weight, pair.reference_head.bias,
               pair.targets if targets else None, None if targets else torch.rand(20) + 0.5)  # fmt: skip
    options = (0.9, [1.1, 1.0], [4.0, 0.0], -100, 20, kind, 0.5, logprobs, None)
    tests = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")} if backend != "cpu" else {}
    torch.library.opcheck(ops.linear_kl_forward, (*tensors, *options, [True, True], backend), **tests)
    value, logprob, numbers = (x.detach() for x in ops.linear_kl_forward(*tensors, *options, [True, True], backend))
    assert (logprob.shape, numbers.shape) == ((2 * logprobs, 20), (4, 20))
    grads = (torch.ones_like(value), torch.ones_like(value) if logprobs else None)
    tensors = tuple(None if x is None else x.detach() for x in tensors)
    for need in ([True, True, True], [True, False, False], [False, True, True]):
        torch.library.opcheck(
            ops.linear_kl_backward, (*grads, *tensors, logprob, numbers, *options, need, backend), **tests
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
def test_fullgraph_compile(kind):
    pair = make_pair(40, 8, 60, ignored=0.3)

    def loss(*args, **kwargs):
        return linear_kl(*args, **kwargs, **KINDS[kind], temperature=0.8) * 2 + 1

    for a, b in zip(
        pair.grads(torch.compile(loss, fullgraph=True, backend="aot_eager")), pair.grads(loss), strict=True
    ):
        assert torch.equal(a, b)


def test_autocast_touches_hidden_and_weight_only():
    pair = make_pair(50, 8, 90)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, *grads = ours(pair, direction="reverse")
    assert value.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.float32] * 3
    rounded = replace(pair, hidden=pair.hidden.bfloat16(), reference_hidden=pair.reference_hidden.bfloat16())
    rounded.head, rounded.reference_head = (
        replace(h, weight=h.weight.bfloat16()) for h in (pair.head, pair.reference_head)
    )
    assert torch.equal(value, ours(rounded, direction="reverse")[0])
    double = make_pair(50, 8, 90, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(double, direction="jsd")
    assert all(torch.equal(a, b) for a, b in zip(inside, ours(double, direction="jsd"), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused_by_name(backend):
    pair = make_pair(5, 4, 9)
    hidden = pair.hidden.requires_grad_()
    out = linear_kl(hidden, pair.head, pair.reference_hidden, pair.reference_head, direction="reverse", backend=backend)
    (d_hidden,) = torch.autograd.grad(out.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="isdaa_kernels: linear_kl has no second derivative"):
        d_hidden.sum().backward()


def test_output_used_twice_and_graph_kept():
    pair = make_pair(40, 8, 100)
    hidden = pair.hidden.requires_grad_()
    out = linear_kl(hidden, pair.head, pair.reference_hidden, pair.reference_head, direction="jsd")
    (out.sum() + (2 * out).sum()).backward(retain_graph=True)
    first = hidden.grad.clone()
    out.backward(torch.full_like(out, 3.0))
    assert torch.allclose(hidden.grad, 2 * first, rtol=1e-5, atol=1e-6)


def test_cuda_refuses_and_says_so():
    problem = Problem("cpu", torch.float32, torch.float32, 1, 1, 1,
                      divergence=Divergence("jsd", 0.5, 1, torch.float32, torch.float32))  # fmt: skip
    lines = dict(line.split(": ", 1) for line in explain_backends(problem).splitlines())
    reason = "the compiled part is missing|takes tensors on NVIDIA"
    assert re.search(f"refuses: ({reason})", lines["cuda"])
    with pytest.raises(NoBackend, match=f"backend 'cuda' refuses: ({reason})"):
        ours(make_pair(3, 4, 5), "cuda", direction="forward")
    assert all(lines[name].endswith("takes it") for name in BACKENDS)


def test_plans_refuse_nonsense():
    for options, message in (
        ({"direction": "sideways"}, "direction: expected one of forward, reverse, jsd, got 'sideways'"),
        ({"reference_D": 4}, "reference_D: expected None without a direction, got 4"),
        ({"direction": "jsd", "reference_D": 0}, "reference_D: expected a positive number or None, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(4, 5, 6, **options)


def _z(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


FORWARD = {"direction": "forward"}
TARGETS = torch.ones(2, dtype=torch.int64)
GOOD = (_z(2, 3), _z(5, 3), _z(2, 4), _z(5, 4))
BAD = {
    "direction": (GOOD, {"direction": "both"}, "direction: expected one of forward, reverse, jsd, got 'both'"),
    "weight of the mixture": (GOOD, {"direction": "jsd", "jsd_weight": 1.0}, "jsd_weight: expected a number between 0 and 1, .* got 1.0"),
    "weight of no mixture": (GOOD, {**FORWARD, "jsd_weight": 0.5}, "jsd_weight: expected None with direction='forward', got 0.5"),
    "policy size": ((_z(2, 4), *GOOD[1:]), FORWARD, r"policy_hidden: expected \[\.\.\., 3\] to fit its head \[5, 3\], got \[2, 4\]"),
    "reference size": ((*GOOD[:3], _z(5, 3)), FORWARD, r"reference_hidden: expected \[\.\.\., 3\] to fit its head \[5, 3\], got \[2, 4\]"),
    "another vocabulary": ((*GOOD[:3], _z(6, 4)), FORWARD, "reference_head: expected the policy's 5 vocabulary rows, got 6"),
    "other tokens": ((*GOOD[:2], _z(3, 4), GOOD[3]), FORWARD, r"reference_hidden: expected \[2\] tokens as policy_hidden, got \[3\]"),
    "head axes": ((GOOD[0], _z(5), *GOOD[2:]), FORWARD, r"weight: expected \[V, D\], got \[5\]"),
    "empty head": ((GOOD[0], _z(0, 3), GOOD[2], _z(0, 4)), FORWARD, "policy_head: expected at least one row and one column"),
    "dtype": ((_z(2, 3, dtype=torch.int8), *GOOD[1:]), FORWARD, "policy_hidden: expected float16, bfloat16, float32 or float64"),
    "device": ((*GOOD[:3], _z(5, 4, device="meta")), FORWARD, "reference_head: expected to be on cpu as policy_hidden is, got meta"),
    "bias device": ((*GOOD[:3], LMHead(GOOD[3], _z(5, device="meta"))), FORWARD, "reference_head's bias: expected to be on cpu"),
    "targets shape": (GOOD, {**FORWARD, "targets": TARGETS[:1]}, r"targets: expected \[2\] to fit policy_hidden, got \[1\]"),
    "targets dtype": (GOOD, {**FORWARD, "targets": TARGETS.float()}, "targets: expected int64 or int32, got torch.float32"),
    "targets device": (GOOD, {**FORWARD, "targets": TARGETS.to("meta")}, "targets: expected to be on cpu"),
    "target": (GOOD, {**FORWARD, "targets": torch.tensor([0, 5])}, r"targets: expected -100 .* value in \[0, 5\), got 5 at index 1"),
    "validate": (GOOD, {**FORWARD, "targets": torch.tensor([-1, 0]), "validate": True}, "got -1 at index 0"),
    "temperature": (GOOD, {**FORWARD, "temperature": 0.0}, "temperature: expected a positive finite number, got 0.0"),
    "temperatures": (GOOD, {**FORWARD, "temperature": torch.ones(3)}, r"temperature: expected a number or \[2\], got \[3\]"),
    "max_scored": (GOOD, {**FORWARD, "max_scored": 3}, r"max_scored: expected 0 to 2 \(the number of tokens\), got 3"),
    "workspace": (GOOD, {**FORWARD, "max_workspace_mb": 0}, "max_workspace_mb: expected a positive number or None, got 0"),
    "workspace small": (GOOD, {**FORWARD, "max_workspace_mb": 1e-6}, "max_workspace_mb: expected at least"),
    "backend": (GOOD, {**FORWARD, "backend": "rocm"}, "backend: expected one of .* got 'rocm'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    args, kwargs, message = BAD[case]
    for backend in [None] if "backend" in kwargs else BACKENDS:
        with pytest.raises(ValueError, match=message):
            linear_kl(*args, **{"backend": backend, **kwargs})


def test_a_direction_must_be_chosen():
    with pytest.raises(TypeError, match="direction"):
        linear_kl(*GOOD)
