"""`linear_kl(..., logprobs=True)`: log-probs of both models from the divergence's own pass, against fp64 autograd over dense logits."""

import math
from dataclasses import replace

import pytest
import torch
from test_linear_kl import BACKENDS, DTYPES, HEADS, KINDS, NAMES, PLAIN, Pair, make_pair

from isdaa_kernels import KlLogprobs, LMHead, NoBackend, linear_kl, linear_logprob
from isdaa_kernels.testing import (
    FlopCounter,
    assert_error_contract,
    denormal_numbers_in_products,
    dense_kl,
    dense_logprob,
    poisoned_empty,
    relative_error,
)

OUTPUTS = ("divergence", "logprob", "reference_logprob", *NAMES[1:])


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def dense_all(hidden, head, reference_hidden, reference_head, *, targets, temperature=1.0, **options) -> KlLogprobs:
    divergence = dense_kl(
        hidden, head, reference_hidden, reference_head, targets=targets, temperature=temperature, **options
    )
    logprobs = []
    for x, side in ((hidden, head), (reference_hidden, reference_head)):
        transform = {"bias": side.bias, "logit_scale": side.logit_scale, "softcap": side.softcap}
        logprobs.append(dense_logprob(x, side.weight, targets, temperature=temperature, **transform))
    return KlLogprobs(divergence, logprobs[0], logprobs[1].detach())


def run(pair: Pair, function, weights=(1.0, 1.0), dtype=None, **options) -> list[torch.Tensor]:
    """OUTPUTS, with upstream gradients of their own for divergence and log-prob, times `weights`."""
    outputs = []
    other = torch.randn(len(pair.targets), generator=torch.Generator().manual_seed(5)).to(pair.upstream.device)

    def both(*args, **kwargs):
        outputs.extend(function(*args, **kwargs, **options))
        divergence, logprob, _ = outputs
        return torch.where(pair.targets == -100, 0, weights[0] * divergence + weights[1] * other * logprob)

    _, *grads = pair.grads(both, dtype)
    return [x.detach() for x in (*outputs, *grads)]


def ours(pair: Pair, backend, weights=(1.0, 1.0), **options):
    return run(pair, lambda *a, **k: linear_kl(*a, **k, logprobs=True, backend=backend), weights, **options)


def assert_contract(pair: Pair, found, weights=(1.0, 1.0), **options) -> None:
    plain, truth = (run(pair, dense_all, weights, dtype, **options) for dtype in (None, torch.float64))
    for name, *tensors in zip(OUTPUTS, found, plain, truth, strict=False):
        assert_error_contract(name, *tensors)


# One vector and less, ragged tiles of tokens and vocabulary, two hidden sizes.
@pytest.mark.parametrize(("N", "D", "E", "V"), [(1, 7, 7, 3), (129, 1, 5, 53), (600, 33, 19, 4499)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, kind, dtype, N, D, E, V):
    pair = make_pair(N, D, V, DTYPES[dtype], E=E, ignored=0.3)
    found = ours(pair, backend, **KINDS[kind])
    assert [x.dtype for x in found[:3]] == [torch.float64 if dtype == "fp64" else torch.float32] * 3
    for x in found[:4]:
        assert (x[pair.targets == -100] == 0).all()
    assert_contract(pair, found, **KINDS[kind])
    plain = linear_kl(
        pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, backend=backend,
        **KINDS[kind],
    )  # fmt: skip
    assert torch.equal(found[0], plain)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["reverse", "jsd 0.9"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_transforms(backend, kind, head):
    pair = make_pair(150, 24, 2100, ignored=0.2)
    policy, reference, options = HEADS[head]
    pair.head, pair.reference_head = replace(pair.head, **policy), replace(pair.reference_head, **reference)
    assert_contract(pair, ours(pair, backend, **KINDS[kind], **options), **KINDS[kind], **options)
    options = {**KINDS[kind], "temperature": torch.linspace(0.5, 1.5, 150)}
    assert_contract(pair, ours(pair, backend, **options), **options)


# Only one of the two outputs in the loss; the other one's coefficient is exactly 0.
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1e-30, 1.0), (1.0, 1e-12), (3e-31, 1e-30)])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_of_different_size(backend, kind, weights):
    pair = make_pair(140, 16, 2300, ignored=0.2)
    with denormal_numbers_in_products() as denormal:
        found = ours(pair, backend, weights, **KINDS[kind])
    assert backend == "reference" or not any(denormal)
    assert_contract(pair, found, weights, **KINDS[kind])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_alone_in_the_loss(backend):
    """The gradients of an output that nobody uses are None, not 0."""
    pair = make_pair(30, 8, 200)
    both = ours(pair, backend, (1.0, 0.0), direction="reverse")
    alone = pair.grads(lambda *a, **k: linear_kl(*a, **k, logprobs=True, direction="reverse", backend=backend)[0])
    for a, b in zip(alone, [both[0], *both[3:]], strict=True):
        assert torch.equal(a, b)
    logprob = pair.grads(lambda *a, **k: linear_kl(*a, **k, logprobs=True, direction="jsd", backend=backend)[1])
    exact = pair.grads(
        lambda hidden, head, *_, targets: linear_logprob(hidden, head.weight, targets, bias=head.bias, backend=backend)
    )
    for a, b in zip(logprob, exact, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    pair = make_pair(7, 4, 11, torch.float64, E=3, ignored=0.3)
    leaves = [x.requires_grad_() for x in (pair.hidden, pair.head.weight, pair.head.bias)]
    temperature = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    call = lambda h, w, b: linear_kl(  # noqa: E731
        h, LMHead(w, b, logit_scale=0.8, softcap=3.0), pair.reference_hidden, pair.reference_head, targets=pair.targets,
        temperature=temperature, logprobs=True, backend=backend, **KINDS[kind],
    )[:2]  # fmt: skip
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
def test_the_last_digits_of_a_confident_policy(backend, kind):
    """1 - p of the target where p is 1 - 1e-6: by itself, beside a divergence whose coefficient is 0."""
    hidden, weight = torch.eye(4), torch.zeros(300, 4)
    weight[11:15] = torch.eye(4) * (14.0 + math.log(300))
    pair = Pair(
        hidden, LMHead(weight), hidden, LMHead(weight * 0.5), torch.arange(11, 15), torch.tensor([1.0, -2.0, 0.5, 3.0])
    )
    found, truth = (
        run(pair, f, (0.0, 1.0), dtype, **KINDS[kind])
        for f, dtype in (
            (lambda *a, **k: linear_kl(*a, **k, logprobs=True, backend=backend), None),
            (dense_all, torch.float64),
        )
    )
    assert 5e-7 < -truth[1].max() < 2e-6
    for a, b in zip(found[3:], truth[3:], strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_an_infinite_divergence_leaves_the_log_probs_alone(backend, direction):
    """One model has no probability where the other has: with the coefficient 0 the divergence adds nothing."""
    call = lambda pair, *args, **options: ours(pair, backend, *args, **options)  # noqa: E731
    check_an_infinite_divergence(lambda: make_pair(20, 8, 400), call, direction)


def check_an_infinite_divergence(make, call, direction: str) -> None:
    """make: the same pair each time; call(pair, weights, direction=): OUTPUTS."""
    pair = make()
    (pair.reference_head if direction == "reverse" else pair.head).bias[7] = -math.inf
    pair.targets[pair.targets == 7] = 8
    found = call(pair, (0.0, 1.0), direction=direction)
    assert (found[0] == math.inf).all()
    masked = replace(pair, reference_head=make().reference_head)
    masked.head = replace(masked.head, bias=masked.head.bias.masked_fill(masked.head.bias == -math.inf, -1e4))
    truth = run(masked, dense_all, (0.0, 1.0), torch.float64, direction="jsd")
    for i in (1, 3, 4, 5):
        assert relative_error(found[i], truth[i]) < 4e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("where", ["logprob", "divergence"])
def test_a_non_finite_coefficient_stays_in_its_row(backend, kind, where):
    pair = make_pair(140, 8, 300, bias=False)
    leaves = pair.hidden.requires_grad_(), pair.head.weight.requires_grad_()
    out = linear_kl(
        pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets, logprobs=True,
        backend=backend, **KINDS[kind],
    )  # fmt: skip
    outputs, ones = (out.divergence, out.logprob), torch.ones(140)
    clean = torch.autograd.grad(outputs, leaves, (ones, ones), retain_graph=True)
    bad = ones.clone()
    bad[5] = math.nan
    grads = (bad, ones) if where == "divergence" else (ones, bad)
    found = torch.autograd.grad(outputs, leaves, grads)
    others = torch.arange(140) != 5
    assert not found[0][5].isfinite().any()
    assert relative_error(found[0][others], clean[0][others]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wants", ["hidden", "weight", "bias"])
def test_partial_requires_grad(backend, wants):
    pair = make_pair(50, 8, 200, ignored=0.2)
    whole = ours(pair, backend, direction="reverse")
    leaves = {"hidden": pair.hidden, "weight": pair.head.weight, "bias": pair.head.bias}
    leaves[wants].requires_grad_()
    found = linear_kl(
        pair.hidden, pair.head, pair.reference_hidden, pair.reference_head, targets=pair.targets.int(), logprobs=True,
        direction="reverse", backend=backend,
    )  # fmt: skip
    assert not found.reference_logprob.requires_grad
    other = torch.randn(50, generator=torch.Generator().manual_seed(5))
    (found.divergence * pair.upstream + found.logprob * other * pair.upstream).sum().backward()
    assert relative_error(leaves[wants].grad, whole[3 + list(leaves).index(wants)]) < 1e-6
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != wants)


# In units of a product of the policy, the reference's hidden size half of it: not one more than of the divergence alone.
@pytest.mark.parametrize("kind", PLAIN)
def test_matrix_work(kind):
    N, D, V = 300, 16, 600
    pair = make_pair(N, D, V, E=8, bias=False)
    with FlopCounter() as counter:
        ours(pair, "cpu", **KINDS[kind])
    assert counter.flop / (2 * N * D * V) == pytest.approx(2 * 1.5 + 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes_and_nothing_to_score(backend):
    pair = make_pair(6, 4, 9)
    fold = lambda x: x.reshape(2, 3, *x.shape[1:])  # noqa: E731
    out = linear_kl(
        fold(pair.hidden), pair.head, fold(pair.reference_hidden), pair.reference_head, targets=fold(pair.targets),
        direction="jsd", logprobs=True, backend=backend,
    )  # fmt: skip
    for x, whole in zip(out, ours(pair, backend, direction="jsd"), strict=False):
        assert x.shape == (2, 3)
        assert torch.equal(x.detach().reshape(6), whole)
    for empty in (make_pair(0, 5, 7), make_pair(6, 5, 7, ignored=2.0)):
        found = ours(empty, backend, direction="reverse")
        assert all((x == 0).all() for x in found)
        assert found[1].shape == empty.targets.shape


def test_errors():
    pair = make_pair(6, 4, 9)
    given = (pair.hidden, pair.head, pair.reference_hidden, pair.reference_head)
    with pytest.raises(ValueError, match="targets: expected one for each token with logprobs=True, got None"):
        linear_kl(*given, direction="reverse", logprobs=True)
    pair.targets[2] = 9
    with pytest.raises(ValueError, match="targets"):
        linear_kl(*given, direction="reverse", logprobs=True, targets=pair.targets)
    with pytest.raises((NoBackend, ValueError), match="reference_head: expected the policy's 9 vocabulary rows, got 8"):
        linear_kl(*given[:3], LMHead(pair.reference_head.weight[:8]), direction="reverse", targets=pair.targets)


@pytest.mark.slow
def test_fullgraph_compile():
    pair = make_pair(40, 8, 60, ignored=0.3)

    def loss(*args, **kwargs):
        divergence, logprob, reference = linear_kl(*args, **kwargs, direction="reverse", logprobs=True)
        return divergence * 2 + logprob.exp() - reference

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(pair.grads(compiled), pair.grads(loss), strict=True):
        assert torch.equal(a, b)
