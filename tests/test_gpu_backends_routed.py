"""Routed gradients of the GPU backends against their definition: on a GPU where there is one, else interpreted or emulated."""

from copy import copy
from dataclasses import replace

import pytest
import torch
from gpu_backends import DEVICE, _under_test, under, use_small_slabs  # noqa: F401 (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

from isdaa_kernels import Routed, VocabOrder, linear_logprob, linear_logprob_stats, ops
from isdaa_kernels.dispatch import Problem, refusal
from isdaa_kernels.lm_head import Transform
from isdaa_kernels.routing import choose_routes
from isdaa_kernels.stats import STATS, StatsRequest, TokenGradient
from isdaa_kernels.testing import (
    Sample,
    assert_error_contract,
    dense_logprob,
    make_sample,
    poisoned_empty,
    relative_error,
    walled_empty,
)

NAMES = ("logprob", "d_hidden", "d_weight", "d_bias")
# Two roundings of the same number to the dtype of the gradients, and of the gradient chunk.
BARS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture
def _small_slabs(monkeypatch):
    use_small_slabs(monkeypatch, ORDER_ROWS=256, WEIGHT_ROWS=64)


# Sharp states, so that most of the probability is in few blocks. V = 300 is ragged in blocks of 64, 128 and 256.
def sample_of(N=45, D=24, V=300, dtype=torch.float32, **options) -> Sample:
    made = make_sample(N, D, V, dtype, **{"sharpness": 6.0, **options})
    return Sample(*(None if x is None else x.to(DEVICE) for x in vars(made).values()))


def some_order(V: int = 300) -> VocabOrder:
    return VocabOrder(torch.randperm(V, generator=torch.Generator().manual_seed(1)).to(DEVICE))


def ours(sample: Sample, gradient, **options) -> tuple[torch.Tensor, ...]:
    return sample.grads(
        lambda h, w, b: linear_logprob(
            h, w, sample.targets, bias=b, gradient=gradient, **{"backend": under.name, **options}
        )
    )


def defined(sample: Sample, gradient, **options) -> tuple[torch.Tensor, ...]:
    return ours(sample, gradient, **{**options, "backend": "reference"})


def assert_close(found, expected, bar: float) -> None:
    for name, a, b in zip(NAMES, found, expected, strict=False):
        assert relative_error(a, b) < (2e-6 if name == "logprob" else bar), name


# Blocks and chunks with a ragged end, natural order and another; with tolerance 3 and no rule by row some blocks have no token.
@pytest.mark.parametrize(
    ("dtype", "block", "ordered", "tolerance", "head"),
    [
        (torch.float32, 64, False, 1e-2, {"logit_scale": -0.5, "temperature": 0.7}),
        (torch.float32, 128, True, 3.0, {}),
        (torch.bfloat16, 64, True, 1e-2, {"logit_scale": 1.5}),
        (torch.float16, 128, False, 1e-2, {"temperature": 0.7}),
        pytest.param(torch.bfloat16, 256, False, 3.0, {"temperature": 2.0}, marks=pytest.mark.slow),
        pytest.param(torch.float16, 64, True, 3.0, {"logit_scale": -2.0}, marks=pytest.mark.slow),
        pytest.param(torch.float32, 256, True, 1e-2, {"logit_scale": 1.5}, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_what_the_definition_says(dtype, block, ordered, tolerance, head):
    sample = sample_of(dtype=dtype, bias=True, ignored=0.3)
    options = {**head, "vocab_order": some_order() if ordered else None}
    gradient = Routed(tolerance, block=block, row_share=0.0 if tolerance == 3.0 else 0.9)
    assert_close(ours(sample, gradient, **options), defined(sample, gradient, **options), BARS[dtype])


# More slabs than one, chunks of two blocks, the last of them ragged.
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_small_slabs")
def test_many_slabs_and_chunks(dtype):
    N = 2 * under.step + 6
    sample = sample_of(N, V=200, dtype=dtype, bias=True, ignored=0.2)
    problem = Problem.of(sample.hidden, sample.weight, N, routed=Routed(1e-2, block=64))
    plan = under.module.make_plan(problem)
    assert plan.token_tile < N
    assert plan.vocab_tile == 128
    gradient, order = Routed(1e-2, block=64), some_order(200)
    found = ours(sample, gradient, vocab_order=order)
    assert_close(found, defined(sample, gradient, vocab_order=order), BARS[dtype])
    for a, b in zip(found, ours(sample, gradient, vocab_order=order), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_small_slabs")
def test_everything_routed_is_exact_in_the_smallest_workspace(dtype):
    """Also with a mean distribution that would be wrong: nothing is left to it, and nothing is lost where all tokens meet in a block."""
    sample = sample_of(80, dtype=dtype, bias=True)
    gradient = Routed(0.0, block=64)
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least") as error:
        ours(sample, gradient, max_workspace_mb=1e-4)
    least = float(str(error.value).split("at least ")[1].split()[0]) + 0.06  # the sentence rounds
    found = ours(sample, gradient, max_workspace_mb=least)

    def dense(h, w, b):
        return dense_logprob(h, w, sample.targets, bias=b)

    for name, *tensors in zip(NAMES, found, sample.grads(dense), sample.grads(dense, torch.float64), strict=True):
        # fp32 logits are products of the library forward and of a kernel backward: a p near 1 shows how differently they round.
        assert_error_contract(name, *tensors, floor=5e-7)


def test_the_log_prob_is_the_exact_one():
    sample = sample_of(dtype=torch.bfloat16, ignored=0.3)
    options = {"backend": under.name, "temperature": torch.linspace(0.5, 2.0, 45, device=DEVICE)}
    exact = linear_logprob(sample.hidden, sample.weight, sample.targets, **options)
    leaf = sample.hidden.clone().requires_grad_()
    routed = linear_logprob(leaf, sample.weight, sample.targets, gradient=Routed(), **options)
    if under.fused:
        assert torch.equal(routed.detach(), exact)
    else:  # other slots of partial results
        assert relative_error(routed.detach(), exact) < 1e-6


def test_strided_inputs_mixed_dtypes_and_a_temperature_for_each_token():
    sample = sample_of(dtype=torch.float32, ignored=0.2)
    wide = torch.full((45, 2, 24), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, 1] = sample.hidden.bfloat16()
    sample.hidden, sample.weight = wide[:, 1], sample.weight.T.contiguous().T
    assert sample.weight.stride() == (1, 300)
    options = {"temperature": torch.linspace(0.5, 2.0, 45, device=DEVICE), "vocab_order": some_order()}
    hidden, weight = wide[:, 1].requires_grad_(), sample.weight.requires_grad_()

    def grads(name: str):
        out = linear_logprob(hidden, weight, sample.targets, gradient=Routed(1e-2, block=64), backend=name, **options)
        return out, *torch.autograd.grad(out, (hidden, weight), sample.upstream)

    expected = grads("reference")
    found = grads(under.name)
    assert (found[1].dtype, found[2].dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(found[0], expected[0]) < 2e-6
    assert relative_error(found[1], expected[1]) < 3e-3
    assert relative_error(found[2], expected[2]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_partial_gradients_are_bit_equal(dtype):
    sample = sample_of(30, V=100, dtype=dtype, bias=True, ignored=0.2)
    gradient = Routed(1e-2, block=64)
    whole = ours(sample, gradient)[1:]
    for need in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        leaves = [
            x.detach().requires_grad_(bool(n))
            for x, n in zip((sample.hidden, sample.weight, sample.bias), need, strict=True)
        ]
        out = linear_logprob(
            leaves[0], leaves[1], sample.targets, bias=leaves[2], gradient=gradient, backend=under.name
        )
        out.backward(sample.upstream)
        for leaf, wanted, expected in zip(leaves, need, whole, strict=True):
            assert (leaf.grad is not None) == bool(wanted)
            if wanted:
                assert torch.equal(leaf.grad, expected)


def test_the_gradient_of_lse():
    sample = sample_of(V=200)

    def value(h, w, b, backend):
        logprob, stats = linear_logprob_stats(
            h, w, sample.targets, stats=("lse", "top_k_mass"), gradient=Routed(1e-2, block=64), backend=backend,
            vocab_order=some_order(200),
        )  # fmt: skip
        assert not stats.top_k_mass.requires_grad
        return logprob + 0.3 * stats.lse

    found, expected = (sample.grads(lambda h, w, b, n=n: value(h, w, b, n)) for n in (under.name, "reference"))
    assert_close(found, expected, 2e-6)


def test_detached_statistics():
    """Beside routed gradients: the values of the call with exact ones, and the gradient of the log-prob alone."""
    sample = sample_of(V=200, bias=True, ignored=0.2)
    options = {"gradient": Routed(1e-2, block=64), "vocab_order": some_order(200)}
    seen = []

    def value(h, w, b):
        logprob, stats = linear_logprob_stats(
            h, w, sample.targets, bias=b, stats=STATS, detached=STATS, top_k=3, backend=under.name, **options
        )
        return seen.append(stats) or logprob

    for a, b in zip(sample.grads(value), ours(sample, **options), strict=True):
        assert torch.equal(a, b)
    expected = linear_logprob_stats(
        sample.hidden.double(), sample.weight.double(), sample.targets, bias=sample.bias.double(), stats=STATS, top_k=3,
        backend="reference",
    )[1]  # fmt: skip
    for name in STATS:
        found = getattr(seen[0], name)
        assert not found.requires_grad
        assert relative_error(found, getattr(expected, name)) < (0.5 if name == "is_top1" else 2e-6), name
    assert torch.equal(seen[0].is_top1, expected.is_top1)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_coefficients_of_any_size(dtype):
    """One of them a million times the others; all of them 2 ** -100 times as large, the coefficient of a saturated pair."""
    sample = sample_of(V=200, dtype=dtype)
    gradient = Routed(1e-2, block=64)
    sample.upstream[7] *= 1e6
    found = ours(sample, gradient)
    assert_close(found, defined(sample, gradient), BARS[dtype])
    sample.upstream *= 2.0**-100
    for small, base in zip(ours(sample, gradient)[1:], found[1:], strict=True):
        expected = base.double() * 2.0**-100
        seen = expected.abs() >= 4 * torch.finfo(dtype).smallest_normal
        assert torch.equal(small.double()[seen], expected[seen])


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        ("upstream", float("inf")),
        ("hidden", float("nan")),
        pytest.param("upstream", float("nan"), marks=pytest.mark.slow),
        pytest.param("hidden", float("inf"), marks=pytest.mark.slow),
        pytest.param("ignored hidden", float("nan"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_a_non_finite_number_stays_in_its_row(dtype, where, bad):
    sample = sample_of(V=200, dtype=dtype, bias=True)
    gradient = Routed(1e-2, block=64)
    if where == "ignored hidden":
        sample.targets[5] = -100
    other = copy(sample)
    other.upstream = sample.upstream.clone()
    other.upstream[5] = 0
    clean = defined(other, gradient)
    if where == "upstream":
        sample.upstream[5] = bad
    else:
        sample.hidden[5, 3] = bad
    value, d_hidden, d_weight, d_bias = ours(sample, gradient)
    others = torch.arange(45, device=DEVICE) != 5
    assert relative_error(value[others], clean[0][others]) < 2e-6
    assert relative_error(d_hidden[others], clean[1][others]) < BARS[dtype]  # nobody else's routes changed
    if where == "ignored hidden":
        assert (d_hidden[5] == 0).all()
        assert relative_error(d_weight, clean[2]) < BARS[dtype]
    else:
        assert d_hidden[5].isnan().all()
        assert d_weight.isnan().all()
        assert d_bias.isnan().all()


def test_masked_vocabulary():
    sample = sample_of(bias=True)
    sample.bias[100:] = float("-inf")  # a block in part and three wholly
    sample.targets %= 100
    found, expected = (ours(sample, Routed(1e-2, block=64), backend=name) for name in (under.name, "reference"))
    assert_close(found, expected, 2e-6)
    assert (found[2][100:] == 0).all()
    assert (found[3][100:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_score(dtype):
    for sample in (sample_of(0, 8, 70, dtype), sample_of(6, 8, 70, dtype, ignored=2.0)):
        for options in ({}, {"max_scored": 0}):
            value, d_hidden, d_weight = ours(sample, Routed(), **options)
            assert value.tolist() == [0.0] * len(sample.targets)
            assert d_hidden.shape == sample.hidden.shape
            assert (d_hidden == 0).all()
            assert (d_weight == 0).all()


def test_max_scored_and_tokens_without_gradient_change_nothing():
    sample = sample_of(V=200, ignored=0.5)
    sample.upstream[20:] = 0
    scored = int((sample.targets != -100).sum())
    loose, tight = (ours(sample, Routed(1e-2, block=64), max_scored=m) for m in (None, scored))
    assert all(torch.equal(a, b) for a, b in zip(loose, tight, strict=True))
    assert (loose[1][20:] == 0).all()


def test_rows_of_the_gradient_of_the_logits_sum_to_0():
    """An identity for a head makes d_hidden the gradient of the logits; here nearly all of it is what is not routed."""
    V = 130
    sample = sample_of(20, V, V)
    sample.weight = torch.eye(V, device=DEVICE)
    sample.hidden *= 2
    _, d_hidden, _ = ours(sample, Routed(5.0, block=64, row_share=0.0))
    assert (d_hidden.double().sum(1).abs() <= 8 * 1.2e-7 * sample.upstream.abs()).all()
    sample.hidden, sample.weight = sample.hidden.bfloat16(), sample.weight.bfloat16()
    _, d_hidden, _ = ours(sample, Routed(5.0, block=64, row_share=0.0))
    # The rest enters with fp32 digits; what is rounded to 16 bits is the routed part and the sums' own entries.
    assert (d_hidden.double().sum(1).abs() <= 2.0**-8 * sample.upstream.abs()).all()


def test_the_routes_and_their_lists():
    """The kernels' routes are those of the definition, the lists hold each of them once: hidden's first, each kind in order."""
    from isdaa_kernels.backends.gpu.routing import RouteLists, Routing
    from isdaa_kernels.backends.gpu.slabs import LiveTokens

    problem = Problem(DEVICE, torch.float32, torch.float32, 1, 8, 300, routed=Routed(block=64))
    sizes = under.kernels.routed_sizes(problem)
    T = max(64, sizes.step)
    N, B, capacity = 150 + 2 * T, 5, 2 * T - 8
    random = torch.Generator().manual_seed(0)
    log_mass_BN = (3 * torch.randn(B, N, generator=random)).log_softmax(0).to(DEVICE)
    mask_N = (torch.rand(N, generator=random) < 0.7).to(DEVICE)
    g_N, placed_N = torch.randn(N, generator=random).to(DEVICE), torch.randint(300, (N,), generator=random).to(DEVICE)
    live, lse_N = LiveTokens(mask_N, capacity), torch.zeros(N, dtype=torch.float64, device=DEVICE)
    count = int(live.count)
    rows = live.rows_M[:count]
    for routed in (
        Routed(0.05, block=64),
        Routed(0.05, scale=2.0, block=64, row_share=0.0),
        Routed(9.0, block=64, row_share=1.0),
    ):
        routing = Routing(under.kernels, routed, TokenGradient(g_N), live, placed_N.int(), lse_N, log_mass_BN)
        routes = choose_routes(log_mass_BN.T[rows], lse_N[rows], -g_N[rows], placed_N[rows] // 64, routed)
        expected = routes.hidden_BN.int() + routes.weight_BN.int()
        assert torch.equal(routing.route_BL[:, :count].int(), expected)
        assert (routing.route_BL[:, count:] == 0).all()
        lists = RouteLists(routing, sizes, T, 3)
        for first in range(0, capacity, T):
            lists.make(2, 3, first)
            for b in range(3):
                route = routing.route_BL[2 + b, first : first + T]
                wanted = torch.cat([(route == kind).nonzero()[:, 0] for kind in (2, 1)]).int()
                assert lists.counts[b] == len(wanted)
                assert torch.equal(lists.lists[b, : len(wanted)], wanted)
                places = torch.full((T,), -1, dtype=torch.int32, device=DEVICE)
                places[wanted[: int((route == 2).sum())].long()] = torch.arange(
                    int((route == 2).sum()), device=DEVICE
                ).int()
                assert torch.equal(lists.places[b], places)
                starts = [int((route[: sizes.step * s] == 2).sum()) for s in range(T // sizes.step + 1)]
                assert lists.starts[b].tolist() == starts


# With one 16-bit factor instead of two halves of it the error would be 2 ** -9 of each term: 2e-3 in bf16, 2e-4 in fp16.
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.float16, 2e-6), (torch.bfloat16, 2e-5)])
def test_what_is_not_recomputed_keeps_its_digits(dtype, bar):
    """The two products of the width of the number of blocks, against fp64: each route enters where it belongs."""
    T, B, D, first, live = 48, 40, 24, 16, 37
    random = torch.Generator().manual_seed(0)
    route_BL = torch.randint(0, 3, (B, first + T), generator=random).to(torch.uint8).to(DEVICE)
    log_mass_BN = (torch.rand(B, 200, generator=random) * -5).to(DEVICE)
    rows_L = torch.randperm(200, generator=random)[: first + T].to(DEVICE)
    tokens = torch.rand(10, T, generator=random).to(DEVICE)
    hidden_TD, mean_BD = (torch.rand(n, D, generator=random).to(DEVICE) for n in (T, B))
    hidden_TD = hidden_TD.to(dtype)
    count, none = torch.tensor([first + live], dtype=torch.int32, device=DEVICE), torch.zeros(1, device=DEVICE)
    found_BD, found_TD = torch.ones(B, D, device=DEVICE), torch.ones(T, D, device=DEVICE)
    given = {
        "route": route_BL,
        "log_mass": log_mass_BN,
        "rows": rows_L,
        "count": count,
        "tokens": tokens,
        "first": first,
    }
    under.kernels.rest_weight(**given, hidden=hidden_TD, poison=none, sums=found_BD, logit_scale=1.5, is_first=False)
    under.kernels.rest_hidden(**given, mean=mean_BD, sums=found_TD, logit_scale=1.5, dtype=dtype)
    rest_BT = log_mass_BN[:, rows_L[first:]].double().exp() * (1.5 * tokens[4] * tokens[0]).double()
    rest_BT[:, live:] = 0
    route_BT = route_BL[:, first:]
    expected = rest_BT.where(route_BT == 0, 0) @ hidden_TD.double()
    assert relative_error(found_BD - 1, expected) < bar
    assert relative_error(found_TD - 1, rest_BT.where(route_BT < 2, 0).T @ mean_BD.double()) < bar


@pytest.mark.parametrize("order", [None, some_order(130).rows])
def test_opcheck(order):
    sample = sample_of(20, 8, 130, bias=True)
    for leaf in (sample.hidden, sample.weight, sample.bias):
        leaf.requires_grad_()
    head = (
        sample.bias,
        None,
        0.9,
        1.1,
        None,
        -100,
    )  # bias, temperature of each token, temperature, scale, softcap, ignore_index
    args = (sample.hidden, sample.weight, sample.targets, *head, 20, None, [True, True], "", 5, under.name, order)
    torch.library.opcheck(ops.linear_logprob_forward, (*args, Routed(block=64).pack()), test_utils="test_faketensor")
    assert ops.linear_logprob_forward(*args, Routed(block=64).pack())[3].shape == (3, 20)


class NoSync(TorchDispatchMode):
    """Refuses every operator whose result the host must wait for."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
        "bincount",
        "repeat_interleave",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").split(".")[0]
        indices = [i for arg in args if isinstance(arg, (list, tuple)) for i in arg if isinstance(i, torch.Tensor)]
        masked = name in ("index", "index_put", "index_put_") and any(
            i.dtype in (torch.bool, torch.uint8) for i in indices
        )
        assert not masked, f"{name} with a mask waits for the device"
        assert not any(name == wait or name.startswith(f"{wait}_") for wait in self.WAITS), (
            f"{name} waits for the device"
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA says itself what waits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_never_waits_for_the_device(monkeypatch, dtype):
    from isdaa_kernels.backends.gpu import forward_pass

    monkeypatch.setattr(forward_pass, "report_bad_targets", lambda *_: None)  # on the CPU it raises at once
    sample = sample_of(V=200, dtype=dtype, bias=True, ignored=0.2)
    problem = Problem.of(sample.hidden, sample.weight, 45, keep_logits=True, routed=Routed(1e-2, block=64))
    transform = Transform(sample.bias, 1.0, None, 1.0, None, some_order(200).rows)
    inputs = (sample.hidden, sample.weight, sample.targets, transform, -100)
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        sample.targets[sample.targets != -100]
    with NoSync():
        logprob, _, lse, kept = under.module.forward(problem, *inputs, StatsRequest())
        grads = under.module.backward(
            problem, TokenGradient(sample.upstream), *inputs, logprob, lse, kept, need_bias=True
        )
    expected = defined(sample, Routed(1e-2, block=64), vocab_order=some_order(200))
    assert_close((logprob, *grads), expected, BARS[dtype])


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA tensors have tools of their own for this")
@pytest.mark.parametrize(
    ("dtype", "scored"),
    [
        (torch.bfloat16, 33),
        pytest.param(torch.float32, 80, marks=pytest.mark.slow),
        *(pytest.param(torch.bfloat16, n, marks=pytest.mark.slow) for n in (0, 3, 80)),
    ],
)
@pytest.mark.usefixtures("_small_slabs")
def test_nothing_is_written_outside_the_buffers(dtype, scored):
    """Slabs wholly behind the last live token included."""
    sample = sample_of(80, V=200, dtype=dtype, bias=True)
    sample.targets[scored:] = -100
    plain = torch.empty
    gradient, order = Routed(1e-2, block=64), some_order(200)
    with walled_empty() as walls:
        found = ours(sample, gradient, vocab_order=order)
    assert torch.empty is plain
    assert len(walls) > 20
    assert all((wall == 7).all() for wall in walls)
    if scored:
        assert_close(found, defined(sample, gradient, vocab_order=order), BARS[dtype])


def test_refusals():
    device, arch = (DEVICE, None) if DEVICE == "cpu" else (DEVICE, "sm_90")
    problem = Problem(device, torch.bfloat16, torch.bfloat16, 8192, 4096, 128256, arch=arch, routed=Routed(block=128))
    assert refusal(under.name, replace(problem, routed=Routed(block=32))) == (
        "routes blocks of 64, 128, 256 vocabulary rows, not of 32"
    )
    assert refusal(under.name, problem) is None


@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's own account of its memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_the_bytes_of_the_plan_hold(dtype):
    N, D, V = 200, 256, 700
    sample = sample_of(N, D, V, dtype)
    hidden, weight = sample.hidden.requires_grad_(), sample.weight.requires_grad_()
    routed, order = Routed(1e-2, block=64), some_order(V)
    with torch.profiler.profile(profile_memory=True) as profile:
        out = linear_logprob(
            hidden, weight, sample.targets, gradient=routed, vocab_order=order, max_workspace_mb=8.0, backend=under.name
        )
        out.backward(sample.upstream)
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    problem = Problem.of(hidden, weight, N, keep_logits=True, routed=routed, max_workspace_mb=8.0)
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
    masses_and_routes = 5 * N * routed.blocks(V)
    assert gradients < peak <= gradients + masses_and_routes + under.module.make_plan(problem).bytes + (64 << 10)


def test_faint_tokens_count_as_without_a_gradient():
    sample = make_sample(60, 16, 700, sharpness=6.0)
    sample.upstream[::2] *= 1e-20
    gradient = Routed(1e-3, block=64)
    assert_close(ours(sample, gradient)[1:], defined(sample, gradient)[1:], 2e-6)
    assert (ours(sample, gradient)[1][::2] == 0).all()
