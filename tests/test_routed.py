"""The routed backward: its rules, its bound on adversarial distributions, the CPU's against the definition, where it is exact."""

import re
from copy import copy

import pytest
import torch

from isdaa_kernels import (
    Routed,
    VocabOrder,
    linear_logprob,
    linear_logprob_stats,
    linear_preference_loss,
    make_vocab_order,
    sequence_logprob,
)
from isdaa_kernels.backends.cpu import routed as cpu_routed
from isdaa_kernels.backends.cpu.products import PanelBuffer
from isdaa_kernels.routing import choose_routes
from isdaa_kernels.stats import STATS
from isdaa_kernels.testing import (
    FlopCounter,
    denormal_numbers_in_products,
    dense_logprob,
    make_sample,
    poisoned_empty,
    relative_error,
)

BACKENDS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture
def always_routed(monkeypatch):
    """The CPU routes however flat the probability is."""
    monkeypatch.setattr(cpu_routed, "FLAT_SHARE", 1.0)


def ours(sample, gradient, **options):
    return sample.grads(
        lambda h, w, b: linear_logprob(h, w, sample.targets, bias=b, gradient=gradient, **{"backend": "cpu", **options})
    )


def some_order(V: int) -> VocabOrder:
    return VocabOrder(torch.randperm(V, generator=torch.Generator().manual_seed(1)))


def test_an_order_that_does_not_lie_in_one_piece():
    """A column of a matrix is a permutation like another."""
    sample, order = sharp(bias=True), some_order(2777)
    apart = VocabOrder(torch.stack([order.rows, order.rows.flip(0)], 1)[:, 0])
    for a, b in zip(
        ours(sample, Routed(1e-3), vocab_order=apart), ours(sample, Routed(1e-3), vocab_order=order), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ignored", [0.0, 1.0])
def test_nothing_to_score_reads_no_weight(monkeypatch, ignored):
    def refuse(*_, **__):
        raise AssertionError("weight was read")

    for name in ("of_columns", "of_rows"):
        monkeypatch.setattr(PanelBuffer, name, refuse)
    sample = sharp(N=6 if ignored else 0, bias=True, ignored=ignored)
    for gradient in ("exact", Routed()):
        for value in ours(sample, gradient):
            assert not value.any()


# Sharp states, so that most of the probability is in few blocks; V ragged in blocks and in tiles.
def sharp(N=60, D=16, V=2777, dtype=torch.float32, **options):
    return make_sample(N, D, V, dtype, sharpness=6.0, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("head", [{}, {"logit_scale": -0.5, "temperature": 0.7}])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.usefixtures("always_routed")
def test_the_cpu_makes_what_the_definition_says(dtype, head, block, ordered):
    sample = sharp(dtype=dtype, bias=True, ignored=0.3)
    options = {**head, "vocab_order": some_order(2777) if ordered else None}
    for tolerance in (0.0, 1e-3, 1e-1):
        gradient = Routed(tolerance, block=block)
        defined = ours(sample, gradient, backend="reference", **options)
        found = ours(sample, gradient, **options)
        bar = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 3e-3}[dtype]
        for name, a, b in zip(("logprob", "d_hidden", "d_weight", "d_bias"), found, defined, strict=True):
            assert relative_error(a, b) < bar, (name, tolerance)


@pytest.mark.usefixtures("always_routed")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.7, "per token"])
def test_tolerance_0_is_exact(backend, temperature):
    sample = sharp(dtype=torch.float64, bias=True, ignored=0.2)
    if temperature == "per token":
        temperature = torch.linspace(0.5, 2.0, 60, dtype=torch.float64)
    options = {"temperature": temperature, "logit_scale": 1.3}
    exact = sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, bias=b, **options))
    for order in (None, some_order(2777)):
        found = ours(sample, Routed(0.0), backend=backend, vocab_order=order, **options)
        for a, b in zip(found, exact, strict=True):
            assert relative_error(a, b) < 1e-12


def logit_gradient(z, targets, upstream, gradient, of="hidden"):
    """Gradient of the final logits themselves: an identity for a head makes hidden the logits, one for hidden makes weight theirs."""
    leaf, identity = z.clone().requires_grad_(), torch.eye(z.shape[1 if of == "hidden" else 0], dtype=z.dtype)
    hidden, weight = (leaf, identity) if of == "hidden" else (identity, leaf.T)
    linear_logprob(hidden, weight, targets, gradient=gradient, backend="reference").backward(upstream)
    return leaf.grad


def distributions(V: int) -> dict[str, torch.Tensor]:
    base = torch.zeros(V, dtype=torch.float64)
    hot, peaks, border, blocks = base.clone(), base.clone(), base.clone(), base.clone()
    hot[5] = 40
    peaks[3], peaks[V - 2] = 9, 9
    border[31], border[32] = 8, 8
    blocks[32:64] = 3
    ramp = torch.linspace(0, 12, V, dtype=torch.float64)
    return {
        "uniform": base,
        "one-hot": hot,
        "two peaks": peaks,
        "a peak on a border": border,
        "constant in blocks": blocks,
        "ramp": ramp,
    }


@pytest.mark.parametrize("of", ["hidden", "weight"])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 1.0, 1e6])
@pytest.mark.parametrize("name", list(distributions(300)))
def test_the_bound_holds(name, tolerance, of):
    """L1 error of each token's logit gradient: at most 2 |a| times its mass that is not routed, and 2 tolerance * scale a block."""
    V, N, block = 300, 24, 32
    random = torch.Generator().manual_seed(0)
    z = distributions(V)[name].repeat(N, 1) + 0.3 * torch.randn(N, V, generator=random, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=random)  # most of them in blocks without probability
    upstream = torch.randn(N, generator=random, dtype=torch.float64)
    routed = Routed(tolerance, block=block, row_share=0.5)
    gradient = logit_gradient(z, targets, upstream, routed, of)
    error_N = (gradient - logit_gradient(z, targets, upstream, "exact", of)).abs().sum(1)
    lse = z.logsumexp(1)
    padded = torch.nn.functional.pad(z, (0, -V % block), value=float("-inf"))
    block_lse = padded.view(N, -1, block).logsumexp(-1)
    routes = choose_routes(block_lse, lse, -upstream, targets // block, routed)
    active_BN = routes.hidden_BN if of == "hidden" else routes.weight_BN
    rest_N = routes.mass_BN.masked_fill(active_BN, 0).sum(0)
    assert (error_N <= 2 * upstream.abs() * rest_N + 1e-12).all()
    assert (error_N <= 2 * tolerance * upstream.abs().mean() * (~active_BN).sum(0) + 1e-12).all()
    # The rows of the gradient of the logits still sum to 0.
    assert (gradient.sum(1).abs() < 1e-12 * upstream.abs().max() * V).all()


def test_the_routes_by_hand():
    mass = torch.tensor([[0.9, 0.09, 0.01], [0.2, 0.2, 0.6]], dtype=torch.float64)
    coefficient = torch.tensor([1.0, -3.0], dtype=torch.float64)
    choose = lambda **options: choose_routes(  # noqa: E731
        mass.log(), torch.zeros(2, dtype=torch.float64), coefficient, torch.tensor([2, 0]), Routed(**options)
    )
    # The mean |a| is 2: token 0 goes where its mass is above 0.2, token 1 where 3 * mass is.
    routes = choose(tolerance=0.1, row_share=0.0)
    assert routes.hidden_BN.T.tolist() == [[True, False, True], [True, True, True]]
    assert torch.equal(routes.weight_BN, routes.hidden_BN)
    assert torch.allclose(routes.mass_BN.T, mass)
    fewer = choose(tolerance=0.1, scale=20.0, row_share=0.0)
    assert fewer.hidden_BN.T.tolist() == [[False, False, True], [True, False, False]]
    # 70 % of block 1's sum 0.09 + 0.6 is token 1's; all of it needs both. The gradient of hidden needs neither.
    assert choose(tolerance=10.0, row_share=0.7).weight_BN[1].tolist() == [False, True]
    assert choose(tolerance=10.0, row_share=1.0).weight_BN.all()
    assert not choose(tolerance=10.0, row_share=1.0).hidden_BN[1].any()


@pytest.mark.usefixtures("always_routed")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_of_a_block_is_that_of_its_tokens_distributions(backend):
    """Each routed token counts the same, however much probability it has there. By hand, one block left out for one token."""
    z = torch.tensor([[9.0, 8.0, 0.0, 1.0], [9.0, 8.0, 3.0, 0.0], [20.0, 8.0, 0.0, 0.0]], dtype=torch.float64)
    z = torch.cat([z, torch.full((3, 60), -50.0, dtype=torch.float64)], 1)[
        :, torch.tensor([0, 1, *range(4, 34), 2, 3, *range(34, 64)])
    ]
    targets, upstream = torch.tensor([32, 33, 0]), torch.ones(3, dtype=torch.float64)
    # Block 1 holds the targets of tokens 0 and 1; token 2 (mass 4e-9) is routed nowhere else than to block 0.
    identity = torch.eye(3, dtype=torch.float64)
    weight = z.T.clone().requires_grad_()
    gradient = Routed(1e-3, block=32, row_share=0.0)
    linear_logprob(identity, weight, targets, gradient=gradient, backend=backend).backward(upstream)
    within = (z[:2, 32:] - z[:2, 32:].logsumexp(1, keepdim=True)).exp()
    mass = (z[2, 32:].logsumexp(0) - z[2].logsumexp(0)).exp()
    assert relative_error(weight.grad[32:, 2], -mass * within.mean(0)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_scale_one_large_coefficient_starves_no_other(backend):
    sample = sharp()
    exact = ours(sample, "exact", backend=backend)
    sample.upstream[7] *= 1e6
    large, large_exact = ours(sample, Routed(1e-3, scale=0.8), backend=backend), ours(sample, "exact", backend=backend)
    others = torch.arange(60) != 7
    assert relative_error(large[1][others], exact[1][others]) < 0.02
    assert relative_error(large[1], large_exact[1]) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["upstream", "hidden", "ignored hidden"])
def test_a_non_finite_number_stays_in_its_row(backend, bad, where):
    sample = sharp()
    if where == "ignored hidden":
        sample.targets[7] = -100
    without = ours(_without(sample, 7), Routed(1e-3), backend=backend)
    if where == "upstream":
        sample.upstream[7] = bad
    else:
        sample.hidden[7, 3] = bad
    value, d_hidden, d_weight = ours(sample, Routed(1e-3), backend=backend)
    others = torch.arange(60) != 7
    assert torch.equal(value[others], without[0][others])
    assert relative_error(d_hidden[others], without[1][others]) < 1e-6  # nobody else's routes changed
    if where == "ignored hidden":
        assert (d_hidden[7] == 0).all()
        assert relative_error(d_weight, without[2]) < 1e-6
    else:
        assert not d_hidden[7].isfinite().all()
        assert not d_weight.isfinite().any()


def _without(sample, i):
    """The same problem with coefficient 0 for some tokens."""
    other = copy(sample)
    other.upstream = sample.upstream.clone()
    other.upstream[i] = 0
    return other


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [-100, 60])
def test_gradients_scale_with_the_coefficients(backend, power):
    sample = sharp()
    plain = ours(sample, Routed(1e-3), backend=backend)
    sample.upstream *= 2.0**power
    for found, base in zip(ours(sample, Routed(1e-3), backend=backend)[1:], plain[1:], strict=True):
        expected = base.double() * 2.0**power
        assert relative_error(found, expected) < 1e-6


@pytest.mark.usefixtures("always_routed")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_scale_a_large_coefficient_raises_the_mean_and_no_more(backend):
    sample = sharp()
    sample.upstream[7] = 20.0  # the mean is about 0.8 without it
    exact = ours(sample, "exact", backend=backend)
    scale = float(sample.upstream.abs().mean())
    for a, b in zip(
        ours(sample, Routed(1e-3), backend=backend),
        ours(sample, Routed(1e-3, scale=scale), backend=backend),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6
    assert relative_error(ours(sample, Routed(1e-3), backend=backend)[1], exact[1]) < 0.02


@pytest.mark.usefixtures("always_routed")
def test_faint_tokens_count_as_without_a_gradient():
    sample = sharp()
    sample.upstream[::2] *= 1e-20
    expected = ours(_without(sample, slice(0, None, 2)), Routed(1e-3), backend="reference")
    for backend in BACKENDS:
        for a, b in zip(ours(sample, Routed(1e-3), backend=backend)[1:], expected[1:], strict=True):
            assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_beside_routed_gradients(backend):
    """Every one is the one that stands beside exact gradients: in any order of the vocabulary, those that cannot be routed detached."""
    sample = sharp(ignored=0.2)
    found, ordered, expected = (
        linear_logprob_stats(
            sample.hidden.clone().requires_grad_(), sample.weight, sample.targets, stats=STATS, detached=("entropy", "mean_logit"),
            backend=backend, **gradient
        )[1]
        for gradient in ({"gradient": Routed()}, {"gradient": Routed(), "vocab_order": some_order(2777)}, {})
    )  # fmt: skip
    for name in STATS:
        values = [getattr(stats, name).double() for stats in (ordered, expected)]
        assert torch.allclose(*values, rtol=1e-6, atol=1e-6), name
        assert getattr(found, name).requires_grad == (name == "lse")
        assert torch.allclose(getattr(found, name).double(), getattr(expected, name).double(), rtol=1e-6, atol=1e-6), (
            name
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_beside_detached_statistics(backend):
    """That of a call without them, to the bit, with as much matrix work."""
    sample = sharp(bias=True, ignored=0.2)
    options = {"gradient": Routed(1e-2, block=64), "backend": backend}

    def plain(h, w, b):
        return linear_logprob(h, w, sample.targets, bias=b, **options)

    def beside(h, w, b):
        return linear_logprob_stats(h, w, sample.targets, bias=b, stats=STATS, detached=STATS, **options)[0]

    results = []
    for function in (plain, beside):
        with FlopCounter() as counter:
            grads = sample.grads(function)
        results.append((counter.flop, grads))
    (flop, expected), (found_flop, found) = results
    assert found_flop == flop
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("always_routed")
def test_no_denormal_number_enters_a_product():
    sample = sharp(bias=True)
    sample.upstream[::3] *= 1e-12
    sample.bias[1000:] -= 80
    with denormal_numbers_in_products() as seen:
        ours(sample, Routed(1e-3))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_in_two_parts_with_one_scale(backend):
    """Every token is routed as in the whole batch; only the blocks' mean distributions differ."""
    sample = sharp()
    gradient = Routed(1e-3, scale=0.8, row_share=0.0)
    whole = ours(sample, gradient, backend=backend)
    parts = []
    for rows in (slice(0, 25), slice(25, 60)):
        part = sharp()
        part.hidden, part.targets, part.upstream = part.hidden[rows], part.targets[rows], part.upstream[rows]
        parts.append(ours(part, gradient, backend=backend))
    exact = ours(sample, "exact", backend=backend)
    assert relative_error(torch.cat([p[1] for p in parts]), whole[1]) < 2 * relative_error(whole[1], exact[1])
    assert relative_error(parts[0][2] + parts[1][2], whole[2]) < 2 * relative_error(whole[2], exact[2]) + 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_partial_gradients(backend, need):
    sample = sharp(bias=True)
    whole = ours(sample, Routed(1e-3), backend=backend)[1:]
    leaves = [
        x.clone().requires_grad_(bool(n))
        for x, n in zip((sample.hidden, sample.weight, sample.bias), need, strict=True)
    ]
    linear_logprob(
        leaves[0], leaves[1], sample.targets, bias=leaves[2], gradient=Routed(1e-3), backend=backend
    ).backward(sample.upstream)
    for leaf, wanted, expected in zip(leaves, need, whole, strict=True):
        assert (leaf.grad is not None) == bool(wanted)
        if wanted:
            assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_equal_and_the_log_prob_is_the_exact_one(backend):
    sample = sharp(bias=True, ignored=0.2)
    order = some_order(2777)
    first, second = (ours(sample, Routed(1e-3), backend=backend, vocab_order=order) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = ours(sample, "exact", backend=backend)
    assert relative_error(first[0], plain[0]) < 2e-7


@pytest.mark.usefixtures("always_routed")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_lse(backend):
    sample = sharp(dtype=torch.float64)

    def value(h, w, b, gradient):
        logprob, stats = linear_logprob_stats(h, w, sample.targets, stats=("lse",), gradient=gradient, backend=backend)
        return logprob + 0.3 * stats.lse

    exact = sample.grads(lambda h, w, b: value(h, w, b, "exact"))
    for tolerance, bar in ((0.0, 1e-12), (1e-4, 1e-2)):
        for a, b in zip(sample.grads(lambda h, w, b, t=tolerance: value(h, w, b, Routed(t))), exact, strict=True):
            assert relative_error(a, b) < bar


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_score(backend):
    for sample in (sharp(N=0), sharp(N=5, ignored=2.0)):
        value, d_hidden, d_weight = ours(sample, Routed(), backend=backend)
        assert (value == 0).all()
        assert (d_hidden == 0).all()
        assert (d_weight == 0).all()


@pytest.mark.usefixtures("always_routed")
def test_a_preference_loss_with_routed_gradients():
    sample = sharp(N=40)
    cu_seqlens = torch.tensor([0, 12, 20, 31, 40])
    reference = sequence_logprob(dense_logprob(sample.hidden, sample.weight, sample.targets), cu_seqlens)
    reference = reference + torch.tensor([0.1, -0.2, 0.3, 0.0])

    def grads(gradient):
        hidden, weight = sample.hidden.clone().requires_grad_(), sample.weight.clone().requires_grad_()
        loss, _ = linear_preference_loss(
            hidden, weight, sample.targets, cu_seqlens, reference_logprob=reference, objective="is_dpo", gradient=gradient,
            vocab_order=some_order(2777) if gradient != "exact" else None,
        )  # fmt: skip
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    exact, routed = grads("exact"), grads(Routed(1e-4))
    assert relative_error(routed[0], exact[0]) < 1e-6
    assert 1e-5 < relative_error(routed[1], exact[1]) < 5e-3
    assert 1e-5 < relative_error(routed[2], exact[2]) < 5e-3


@pytest.mark.usefixtures("always_routed")
def test_sharp_states_cost_few_products():
    """Matrix flop of forward and backward: 1 + 3 x share, and the products of the width of the number of blocks."""
    sample = make_sample(512, 32, 16384, sharpness=9.0)
    unit = 2 * 512 * 32 * 16384
    with FlopCounter() as everything:
        ours(sample, Routed(0.0, row_share=0.0))
    assert everything.flop / unit == pytest.approx(4.0, abs=0.03)
    with FlopCounter() as counter:
        ours(sample, Routed(1e-3, row_share=0.0))
    assert 1.2 < counter.flop / unit < 2.5
    with FlopCounter() as exact:
        ours(sample, "exact")
    assert exact.flop / unit == 4.0


@pytest.mark.parametrize("bias", [False, True])
def test_flat_probabilities_get_the_exact_gradient(bias):
    """On the CPU, from as many products; the definition stays routed."""
    sample = make_sample(40, 16, 2777, sharpness=0.01, bias=bias)
    with FlopCounter() as counter:
        found = ours(sample, Routed(1e-6), vocab_order=some_order(2777))
    with FlopCounter() as exact:
        expected = ours(sample, "exact")
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert relative_error(a, b) < 1e-6
    assert counter.flop == exact.flop


@pytest.mark.usefixtures("always_routed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_workspace_with_everything_routed_is_exact(dtype):
    sample = make_sample(400, 16, 2777, dtype, bias=True, ignored=0.1)
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least") as refusal:
        ours(sample, Routed(0.0), max_workspace_mb=0.01)
    least = float(re.search(r"at least ([0-9.]+)", str(refusal.value))[1])
    found = ours(sample, Routed(0.0), max_workspace_mb=least, vocab_order=some_order(2777))
    for a, b in zip(found, ours(sample, "exact"), strict=True):
        assert relative_error(a, b) < (3e-3 if dtype == torch.bfloat16 else 2e-6)


def test_an_order_gathers_rows_that_move_together(tmp_path):
    random = torch.Generator().manual_seed(0)
    kinds = torch.randint(8, (1024,), generator=random)
    directions = torch.randn(8, 16, generator=random)
    weight = directions[kinds] + 0.05 * torch.randn(1024, 16, generator=random)
    hidden = torch.randn(200, 16, generator=random)
    order = make_vocab_order(weight, hidden, block=32)
    blocks = kinds[order.rows].view(-1, 32)
    purity = torch.stack([row.bincount(minlength=8).max() for row in blocks]).float().mean() / 32
    assert purity > 0.8
    assert torch.equal(make_vocab_order(weight, hidden, block=32).rows, order.rows)
    order.save(tmp_path / "order.pt")
    assert torch.equal(VocabOrder.load(tmp_path / "order.pt").rows, order.rows)
    assert [path.name for path in tmp_path.iterdir()] == ["order.pt"]
    ragged = make_vocab_order(weight[:1000], hidden.view(2, 100, 16), block=64)
    assert ragged.rows.sort().values.tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: Routed(-1.0), "tolerance: expected a finite number from 0 on, got -1.0"),
        (lambda s: Routed(scale=0.0), "scale: expected a positive finite number or None, got 0.0"),
        (lambda s: Routed(block=100), "block: expected one of 32, 64, 128, 256, got 100"),
        (lambda s: Routed(row_share=1.5), "row_share: expected a number from 0 to 1, got 1.5"),
        (lambda s: VocabOrder(torch.tensor([0, 0, 1])), "rows: expected each of 0 to 2 once"),
        (lambda s: VocabOrder(torch.tensor([0.0])), "rows: expected an int64 tensor"),
        (lambda s: ours(s, "rooted"), "gradient: expected 'exact' or Routed"),
        (lambda s: ours(s, "exact", vocab_order=some_order(2777)), "vocab_order: expected None with gradient='exact'"),
        (
            lambda s: ours(s, Routed(), vocab_order=some_order(5)),
            "vocab_order: expected 2777 rows on cpu, got 5 on cpu",
        ),
        (lambda s: ours(s, Routed(), softcap=3.0), "softcap: expected None with gradient=Routed"),
        (
            lambda s: linear_logprob_stats(s.hidden.requires_grad_(), s.weight, s.targets, gradient=Routed()),
            "stats: expected none of entropy, .* detached=.'entropy',. gives it without",
        ),
        (lambda s: make_vocab_order(s.weight, s.hidden[:, :3]), "hidden_sample: expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(sharp())
