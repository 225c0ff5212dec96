"""Log-probs and statistics from existing logits, on each backend, against fp64 autograd; and the backward over the logits' own memory."""

import pytest
import torch

from isdaa_kernels import linear_logprob, logprob_from_logits, logprob_stats_from_logits
from isdaa_kernels.stats import DIFFERENTIABLE, STATS
from isdaa_kernels.testing import (
    FlopCounter,
    assert_error_contract,
    dense_logprob_from_logits,
    dense_stats_from_logits,
    poisoned_empty,
    relative_error,
)

BACKENDS = ["cpu", "reference"]  # those of the CPU; tests/test_device.py has the cases for all
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "temperature": {"temperature": 0.7},
    "all": {"logit_scale": -1.5, "softcap": 6.0, "temperature": 1.3},
}
NAMES = ("logprob", *DIFFERENTIABLE)


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def make_logits(N, V, dtype=torch.float32, sharpness=3.0, ignored=0.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(N, V, generator=random) * sharpness).to(dtype)
    targets = torch.randint(V, (N,), generator=random)
    targets[torch.rand(N, generator=random) < ignored] = -100
    return logits, targets, torch.randn(N, generator=random)


def numbers(result):
    return {"logprob": result[0], **{k: v for k, v in vars(result[1]).items() if v is not None}}


def mixed(result, names=NAMES):
    """One number a token with a different coefficient for each of `names`."""
    values, random = numbers(result), torch.Generator().manual_seed(7)
    coefficients = {name: torch.randn(values["logprob"].shape, generator=random) for name in NAMES}
    return sum(values[name] * coefficients[name].to(values[name]) for name in names)


def grad_of(function, logits, upstream, dtype=None):
    """(value, d_logits); the leaf keeps the strides of `logits`."""
    leaf = logits.detach().to(dtype or logits.dtype).requires_grad_()
    value = function(leaf)
    value.backward(upstream.to(value.dtype))
    return value.detach(), leaf.grad


def compare(logits, targets, upstream, backend, names=NAMES, truth_head=None, **head):
    ours = lambda z: logprob_stats_from_logits(z, targets, stats=STATS, backend=backend, **head)  # noqa: E731
    dense = lambda z: dense_stats_from_logits(z, targets, **head)  # noqa: E731
    true = lambda z: dense_stats_from_logits(z, targets, **(truth_head or head))  # noqa: E731
    value, contender, truth = numbers(ours(logits)), numbers(dense(logits)), numbers(true(logits.double()))
    compute = torch.promote_types(logits.dtype, torch.float32)
    for name in value:
        assert value[name].dtype == (torch.bool if name == "is_top1" else compute)
        if name == "is_top1":
            assert torch.equal(value[name], contender[name])
        else:
            assert_error_contract(name, value[name], contender[name], truth[name])
    together = [lambda z, f=f: mixed(f(z), names) for f in (ours, dense)]
    d_ours, d_dense = (grad_of(f, logits, upstream)[1] for f in together)
    d_true = grad_of(lambda z: mixed(true(z), names), logits, upstream, torch.float64)[1]
    assert d_ours.dtype == logits.dtype
    assert_error_contract("d_logits", d_ours, d_dense, d_true)


# N: 1, below and above the tile of 256. V: 1, below top_k and any vector, one whole tile of 2048, two and a ragged third.
@pytest.mark.parametrize(("N", "V"), [(1, 3), (37, 1), (129, 53), (300, 2048), (257, 4499)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, dtype, N, V):
    logits, targets, upstream = make_logits(N, V, DTYPES[dtype], ignored=0.3 if N > 1 else 0.0)
    if V > 1:
        compare(logits, targets, upstream, backend)
        return
    value, d_logits = grad_of(lambda z: logprob_from_logits(z, targets, backend=backend), logits, upstream)
    assert (value == 0).all()
    assert (d_logits == 0).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_transforms(backend, dtype, head):
    compare(*make_logits(150, 2100, DTYPES[dtype], ignored=0.2), backend, **HEADS[head])


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("names", [("logprob",), ("entropy",), NAMES], ids=" ".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_contract_at_every_sharpness(backend, names, sharpness):
    compare(*make_logits(130, 6000, sharpness=sharpness), backend, names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_of_each_token(backend):
    temperature = torch.rand(70) + 0.5
    truth_head = {"temperature": temperature.double()}
    compare(*make_logits(70, 300, ignored=0.2), backend, temperature=temperature, truth_head=truth_head)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    logits, targets, _ = make_logits(6, 11, torch.float64, ignored=0.3)
    head = {"logit_scale": 0.8, "softcap": 3.0, "temperature": torch.rand(6, dtype=torch.float64) + 0.5}

    def call(z):
        result = logprob_stats_from_logits(z, targets, stats=DIFFERENTIABLE, backend=backend, **head)
        return tuple(numbers(result).values())

    assert torch.autograd.gradcheck(call, (logits.requires_grad_(),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_numbers_as_from_hidden_states(backend):
    hidden, weight = torch.randn(40, 8), torch.randn(300, 8)
    targets = torch.randint(300, (40,))
    other = linear_logprob(hidden, weight, targets, backend=backend)
    torch.testing.assert_close(logprob_from_logits(hidden @ weight.T, targets, backend=backend), other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_changes_nothing(backend, dtype):
    logits, targets, _ = make_logits(40, 3000, DTYPES[dtype], ignored=0.3)
    before = logits.clone()
    for head in HEADS.values():
        logprob_stats_from_logits(logits, targets, stats=STATS, overwrite_logits=True, backend=backend, **head)
        assert torch.equal(logits, before)


def layouts():
    """[B, T, V] logits that a model or a caller may hold: whole, sliced, transposed, with a column stride, broadcast."""
    return {
        "contiguous": lambda z: z,
        "shifted": lambda z: torch.cat([z, z[:, :1]], dim=1)[:, :-1],  # logits[:, :-1]
        "columns of a larger matrix": lambda z: torch.cat([z, z], dim=-1)[..., : z.shape[-1]],
        "every other column": lambda z: torch.stack([z, z], dim=-1).flatten(-2)[..., ::2],
        "vocabulary first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "sequence first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("overwrite", [False, True])
def test_any_strides(backend, dtype, layout, overwrite):
    logits, targets, upstream = make_logits(33, 2100, DTYPES[dtype], ignored=0.2)
    shape = (3, 11)
    logits, targets, upstream = logits.view(3, 11, 2100), targets.view(shape), upstream.view(shape)
    plain_value, plain = grad_of(lambda z: logprob_from_logits(z, targets, backend=backend), logits, upstream)
    leaf = logits.clone().requires_grad_()
    strided = layouts()[layout](leaf * 1.0)
    value = logprob_from_logits(strided, targets, backend=backend, overwrite_logits=overwrite)
    value.backward(upstream.to(value.dtype))
    assert torch.equal(value, plain_value)
    assert torch.equal(leaf.grad, plain)
    if overwrite:
        assert torch.equal(strided.detach(), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4)])
def test_leading_shapes(backend, leading):
    random = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(*leading, 9, generator=random), torch.randint(9, leading, generator=random)
    logits.requires_grad_()
    out, stats = logprob_stats_from_logits(logits, targets, stats=STATS, backend=backend)
    assert out.shape == targets.shape == stats.is_top1.shape
    torch.testing.assert_close(out, dense_logprob_from_logits(logits, targets))
    out.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_score(backend):
    for N, ignored in ((0, 0.0), (6, 2.0)):
        logits, targets, upstream = make_logits(N, 7, ignored=ignored)
        logits[:] = float("nan")  # an ignored row is not read
        value, d_logits = grad_of(lambda z, t=targets: logprob_from_logits(z, t, backend=backend), logits, upstream)
        assert value.shape == targets.shape
        assert (value == 0).all()
        assert (d_logits == 0).all()


# The memory of the logits is used where they are fp32 with contiguous rows, and through a buffer for the other dtypes.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_overwriting_gives_the_same_gradient_in_the_same_memory(backend, dtype, head):
    logits, targets, upstream = make_logits(300, 4499, DTYPES[dtype], ignored=0.3)
    options = {"stats": STATS, "backend": backend, **HEADS[head]}
    plain = grad_of(lambda z: mixed(logprob_stats_from_logits(z, targets, **options)), logits, upstream)
    made = logits.clone().requires_grad_() * 1.0
    made.retain_grad()
    address = made.data_ptr()
    value = mixed(logprob_stats_from_logits(made, targets, overwrite_logits=True, **options))
    value.backward(upstream.to(value.dtype))
    assert torch.equal(value, plain[0])
    assert torch.equal(made.grad, plain[1])
    assert torch.equal(made.detach(), plain[1])
    assert made.data_ptr() == address


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_over_destroyed_logits_raises(backend):
    logits, targets, _ = make_logits(5, 9)
    made = logits.requires_grad_() * 1.0
    out = logprob_from_logits(made, targets, overwrite_logits=True, backend=backend)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    # And so does the backward of another that needs them.
    made = logits * 1.0
    other, out = made.exp().mul(made).sum(), logprob_from_logits(made, targets, overwrite_logits=True, backend=backend)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_overwriting_below_a_head(backend):
    """The use it is for: a model's own logits between its head and the loss."""
    hidden, weight = torch.randn(60, 8), torch.randn(500, 8)
    targets = torch.randint(500, (60,))
    grads = []
    for overwrite in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        logits = leaves[0] @ leaves[1].T
        logprob_from_logits(logits, targets, overwrite_logits=overwrite, backend=backend).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_what_may_not_be_overwritten():
    targets = torch.zeros(4, dtype=torch.int64)
    leaf = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(
        ValueError, match="overwrite_logits: expected logits that some operation made, got a leaf that requires grad"
    ):
        logprob_from_logits(leaf, targets, overwrite_logits=True)
    row = torch.randn(1, 6, requires_grad=True) * 1.0
    overlapping = (
        row.expand(4, 6),
        torch.randn(9).as_strided((4, 6), (1, 1)),
        torch.randn(24).as_strided((4, 6), (2, 3)),
    )
    for logits in overlapping:
        with pytest.raises(
            ValueError,
            match=r"overwrite_logits: expected logits whose elements are all distinct in memory, got shape \[4, 6\]",
        ):
            logprob_from_logits(logits, targets, overwrite_logits=True)
    logprob_from_logits(row.expand(4, 6), targets).sum().backward()  # reading such logits is no problem
    with torch.no_grad():
        logprob_from_logits(leaf, targets, overwrite_logits=True)  # no backward will come


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused_by_name(backend):
    logits, targets, _ = make_logits(5, 9)
    logits.requires_grad_()
    calls = {
        "logprob_from_logits has": lambda: logprob_from_logits(logits, targets, backend=backend),
        "logprob_stats_from_logits has": lambda: logprob_stats_from_logits(logits, targets, backend=backend)[1].entropy,
    }
    for name, call in calls.items():
        (d_logits,) = torch.autograd.grad(call().sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match=f"isdaa_kernels: {name} no second derivative"):
            d_logits.sum().backward()
    out = logprob_from_logits(logits * 1.0, targets, overwrite_logits=True, backend=backend)
    with pytest.raises(RuntimeError, match="logprob_from_logits with overwrite_logits=True has no second derivative"):
        torch.autograd.grad(out.sum(), logits, create_graph=True)


def _peak(run) -> int:
    """Bytes alive at most beyond what was there before, by PyTorch's own account."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_memory(dtype, overwrite):
    """A tile and a few numbers a token forward; the gradient on top of that backward, unless the logits' memory serves."""
    N, V = 1500, 12000
    logits, targets, upstream = make_logits(N, V, DTYPES[dtype])
    made = logits.requires_grad_() * 1.0
    results = []
    tile = 8 << 20
    forward = _peak(
        lambda: results.append(logprob_stats_from_logits(made, targets, stats=STATS, overwrite_logits=overwrite))
    )
    assert forward < tile
    logprob, stats = results[0]
    backward = _peak(lambda: torch.autograd.grad((logprob, stats.entropy), made, (upstream, upstream)))
    whole = N * V * made.element_size()
    assert (0 if overwrite else whole) <= backward < tile + (0 if overwrite else whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_matrix_work(backend):
    logits, targets, upstream = make_logits(50, 300)
    with FlopCounter() as counter:
        grad_of(lambda z: mixed(logprob_stats_from_logits(z, targets, stats=STATS, backend=backend)), logits, upstream)
    assert counter.flop == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_a_token_does_not_see_its_batch_nor_the_statistics(dtype):
    logits, targets, upstream = make_logits(300, 4500, DTYPES[dtype], ignored=0.2)
    call = lambda rows: numbers(logprob_stats_from_logits(logits[rows], targets[rows], stats=STATS))  # noqa: E731
    whole = call(slice(None))
    assert torch.equal(logprob_from_logits(logits, targets), whole["logprob"])
    for rows in (slice(0, 1), slice(7, 8), slice(0, 255), slice(100, 299), torch.arange(0, 300, 3)):
        for name, value in call(rows).items():
            assert torch.equal(value, whole[name][rows]), name
    gradient = lambda rows: grad_of(lambda z: logprob_from_logits(z, targets[rows]), logits[rows], upstream[rows])[1]  # noqa: E731
    assert torch.equal(gradient(slice(100, 299)), gradient(slice(None))[100:299])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary_and_impossible_targets(backend):
    logits, targets, upstream = make_logits(20, 4200)
    logits[:, 100:] = float("-inf")
    targets = (targets % 100).index_fill(0, torch.tensor([3]), 2000)
    upstream[3] = 0
    names = ("logprob", "entropy", "lse")
    call = lambda z: logprob_stats_from_logits(z, targets, stats=STATS, backend=backend)  # noqa: E731
    small_targets = targets.clamp_max(99)
    value, truth = numbers(call(logits)), numbers(dense_stats_from_logits(logits[:, :100].double(), small_targets))
    assert value["logprob"][3] == float("-inf")
    assert (value.pop("mean_logit") == float("-inf")).all()
    others = torch.arange(20) != 3
    for name in value:
        assert relative_error(value[name][others], truth[name][others]) < 1e-6
    finite = lambda result: sum(torch.where(others, numbers(result)[name], 0) for name in names)  # noqa: E731
    _, d_logits = grad_of(lambda z: finite(call(z)), logits, upstream)
    _, d_true = grad_of(
        lambda z: finite(dense_stats_from_logits(z, small_targets)), logits[:, :100], upstream, torch.float64
    )
    assert relative_error(d_logits[:, :100], d_true) < 1e-6
    assert (d_logits[:, 100:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_stays_in_its_row(backend, bad):
    logits, targets, upstream = make_logits(20, 3000)
    call = lambda z: mixed(logprob_stats_from_logits(z, targets, stats=STATS, backend=backend))  # noqa: E731
    clean = grad_of(call, logits, upstream)
    logits[5, 2500] = bad
    value, d_logits = grad_of(call, logits, upstream)
    others = torch.arange(20) != 5
    assert torch.equal(value[others], clean[0][others])
    assert torch.equal(d_logits[others], clean[1][others])
    assert value[5].isnan()
    assert d_logits[5].isnan().any()


# Coefficients down to 1e-38: no entry but the target's is a denormal number, of which many would slow the CPU down.
@pytest.mark.parametrize("names", [("logprob",), NAMES], ids=" ".join)
def test_tiny_coefficients(names):
    logits, targets, upstream = make_logits(64, 3000, sharpness=12.0)
    upstream = upstream * 10.0 ** torch.linspace(-38, 3, 64)
    call = lambda function: lambda z: mixed(function(z, targets, stats=STATS), names)  # noqa: E731
    d_logits = grad_of(call(logprob_stats_from_logits), logits, upstream)[1]
    d_true = grad_of(call(dense_stats_from_logits), logits, upstream, torch.float64)[1]
    size = d_logits.abs()
    tiny = torch.finfo(torch.float32).smallest_normal
    assert not ((size > 0) & (size < tiny)).scatter(1, targets[:, None], False).any()
    assert ((d_logits - d_true).norm(dim=1) <= 1e-6 * d_true.norm(dim=1) + 60 * tiny).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_one_use_and_a_kept_graph(backend):
    logits, targets, _ = make_logits(40, 100)
    logits.requires_grad_()
    out = logprob_from_logits(logits, targets, backend=backend)
    (out.sum() + (2 * out).sum()).backward(retain_graph=True)
    first = logits.grad.clone()
    out.backward(torch.full_like(out, 3.0))
    assert torch.allclose(logits.grad, 2 * first, rtol=1e-5, atol=1e-6)


T = torch.tensor([0, 1])
BAD = {
    "no axis": ((torch.tensor(1.0), torch.tensor(0)), {}, r"logits: expected \[\.\.\., V\] with at least one column, got \[\]"),
    "no column": ((torch.zeros(2, 0), T), {}, r"at least one column, got \[2, 0\]"),
    "targets shape": ((torch.zeros(2, 5), T[:1]), {}, r"targets: expected \[2\] to fit logits, got \[1\]"),
    "targets dtype": ((torch.zeros(2, 5), T.float()), {}, "targets: expected int64 or int32, got torch.float32"),
    "logits dtype": ((torch.zeros(2, 5, dtype=torch.int8), T), {}, "logits: expected float16, bfloat16, float32 or float64"),
    "device": ((torch.zeros(2, 5, device="meta"), T), {}, "logits: expected to be on cpu as targets are, got meta"),
    "target high": ((torch.zeros(2, 5), torch.tensor([0, 5])), {}, r"targets: expected -100 .* value in \[0, 5\), got 5 at index 1"),
    "index over all": ((torch.zeros(2, 3, 5)[:, :-1], torch.tensor([[0, 1], [2, -7]])), {}, "got -7 at index 3"),
    "validate": ((torch.zeros(2, 5), torch.tensor([0, 7])), {"validate": True}, "got 7 at index 1"),
    "temperature": ((torch.zeros(2, 5), T), {"temperature": -1.0}, "temperature: expected a positive finite number, got -1.0"),
    "temperatures": ((torch.zeros(2, 5), T), {"temperature": torch.ones(3)}, r"temperature: expected a number or \[2\], got \[3\]"),
    "softcap": ((torch.zeros(2, 5), T), {"softcap": 0.0}, "softcap: expected a positive finite number or None, got 0.0"),
    "logit_scale": ((torch.zeros(2, 5), T), {"logit_scale": 0.0}, "logit_scale: expected a finite number other than 0"),
    "ignore_index": ((torch.zeros(2, 5), T.int()), {"ignore_index": 2**32}, "ignore_index: expected a number that torch.int32"),
    "backend": ((torch.zeros(2, 5), T), {"backend": "tpu"}, "backend: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        logprob_from_logits(*args, **options)
    with pytest.raises(ValueError, match="stats: expected"):
        logprob_stats_from_logits(torch.zeros(2, 5), T, stats=("nothing",))
