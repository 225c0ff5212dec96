"""The kernels of the GPU backends, forward and backward: on a GPU where there is one, else interpreted or emulated on small problems."""

from dataclasses import replace

import pytest
import torch
from gpu_backends import DEVICE, _under_test, under, use_small_slabs  # noqa: F401 (a fixture)

from isdaa_kernels import linear_logprob, linear_logprob_stats, logprob_from_logits, logprob_stats_from_logits
from isdaa_kernels.backends.gpu import backward_pass
from isdaa_kernels.backends.gpu import plan as plans
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.stats import STATS
from isdaa_kernels.testing import (
    FlopCounter,
    Sample,
    assert_error_contract,
    dense_logprob,
    dense_stats,
    make_sample,
    poisoned_empty,
    relative_error,
    walled_empty,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = {}
RICH = {"logit_scale": 0.5, "softcap": 5.0, "temperature": 0.8}


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture
def _small_slabs(monkeypatch):
    use_small_slabs(monkeypatch)


def sample_of(N: int, D: int, V: int, dtype: torch.dtype, **options) -> Sample:
    made = make_sample(N, D, V, dtype, **options)
    return Sample(*(None if x is None else x.to(DEVICE) for x in vars(made).values()))


def ours(sample: Sample, **options) -> tuple[torch.Tensor, ...]:
    return sample.grads(
        lambda h, w, b: linear_logprob(h, w, sample.targets, bias=b, **{"backend": under.name, **options})
    )


def truth_and_dense(sample: Sample, **head):
    def function(h, w, b):
        return dense_logprob(h, w, sample.targets, bias=b, **head)

    return sample.grads(function, torch.float64), sample.grads(function)


def assert_contract(found, dense, truth):
    for name, *tensors in zip(("logprob", "d_hidden", "d_weight", "d_bias"), found, dense, truth, strict=False):
        assert_error_contract(name, *tensors)


# Tiles are 32 x 128 x 32 here: sizes below, at and above whole tiles, several tiles each way, an odd hidden size.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize(("N", "D", "V"), [(75, 40, 300), (64, 32, 256), (33, 7, 45)])
def test_values_and_gradients(dtype, head, N, D, V):
    sample = sample_of(N, D, V, dtype, bias=bool(head), ignored=0.3)
    truth, dense = truth_and_dense(sample, **head)
    assert_contract(ours(sample, **head), dense, truth)


# V = 513: the last chunk has one column. One slab ("single") makes d_weight in pieces.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [None, "split", "single"])
@pytest.mark.usefixtures("_small_slabs")
def test_many_slabs_and_chunks(monkeypatch, dtype, workspace):
    N, D, V = 60 if workspace == "single" else 4 * under.step + 22, 40, 513
    sample = sample_of(N, D, V, dtype, bias=True, ignored=0.2)
    truth, dense = truth_and_dense(sample)
    if workspace == "split":
        monkeypatch.setattr(backward_pass, "make_plan", lambda *args: replace(plans.make_plan(*args), split=True))
    found = ours(sample)
    assert_contract(found, dense, truth)
    for a, b in zip(found, ours(sample), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA tensors have tools of their own for this")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scored", [0, 3, 20, 64, 150])
@pytest.mark.usefixtures("_small_slabs")
def test_nothing_is_written_outside_the_buffers(dtype, scored):
    """Slabs wholly behind the last live token included."""
    sample = sample_of(150, 24, 300, dtype, bias=True)
    sample.targets[scored:] = -100
    plain = torch.empty
    with walled_empty() as walls:
        value, d_hidden, d_weight, d_bias = ours(sample)
    assert torch.empty is plain
    assert len(walls) > 10
    assert all((wall == 7).all() for wall in walls)
    truth, dense = truth_and_dense(sample)
    if scored >= 20:
        assert_contract((value, d_hidden, d_weight, d_bias), dense, truth)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)]
)
def test_mixed_dtypes(dtypes):
    sample = sample_of(40, 24, 150, torch.float32, bias=True)
    sample.hidden, sample.weight = sample.hidden.to(dtypes[0]), sample.weight.to(dtypes[1])
    truth, dense = truth_and_dense(sample)
    assert_contract(ours(sample), dense, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_a_temperature_for_each_token(dtype):
    sample = sample_of(40, 24, 150, dtype)
    temperature = torch.linspace(0.5, 2.0, 40, device=DEVICE)
    truth = sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, temperature=temperature), torch.float64)
    dense = sample.grads(lambda h, w, b: dense_logprob(h, w, sample.targets, temperature=temperature))
    wide = torch.full((40, 2, 24), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, 1] = sample.hidden
    turned = sample.weight.T.contiguous().T
    sample.hidden, sample.weight = wide[:, 1], turned
    assert sample.weight.stride() == (1, 150)

    def function(h, w, b):
        return linear_logprob(h, w, sample.targets, temperature=temperature, backend=under.name)

    assert_contract(sample.grads(function), dense, truth)
    hidden, weight = wide[:, 1].detach(), turned.detach()
    out = linear_logprob(hidden, weight, sample.targets, temperature=temperature, backend=under.name)
    assert_error_contract("logprob", out, dense[0], truth[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_in_fp64(dtype):
    sample = sample_of(40, 24, 150, dtype, bias=True, ignored=0.2)
    narrow = ours(sample)
    sample.bias = sample.bias.double()
    found = ours(sample)
    assert found[3].dtype == torch.float64
    for a, b in zip(found[:3], narrow[:3], strict=True):
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert relative_error(found[3], narrow[3]) < (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_gradients(need, dtype):
    sample = sample_of(40, 24, 300, dtype, bias=True, ignored=0.2)
    whole = ours(sample)[1:]
    leaves = [
        x.detach().requires_grad_(bool(n))
        for x, n in zip((sample.hidden, sample.weight, sample.bias), need, strict=True)
    ]
    linear_logprob(leaves[0], leaves[1], sample.targets, bias=leaves[2], backend=under.name).backward(sample.upstream)
    for leaf, wanted, expected in zip(leaves, need, whole, strict=True):
        if wanted:
            assert torch.equal(leaf.grad, expected)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [PLAIN, RICH], ids=["plain", "rich"])
def test_statistics(dtype, head):
    sample = sample_of(45, 24, 300, dtype, bias=bool(head), ignored=0.3)

    def run(function, cast=None):
        seen = []

        def value(h, w, b):
            logprob, stats = function(h, w, b)
            seen.append(stats)
            return logprob + 0.7 * stats.entropy - 0.3 * stats.lse + 0.2 * stats.mean_logit

        return sample.grads(value, cast), seen[0]

    def of_dense(h, w, b):
        return dense_stats(h, w, sample.targets, bias=b, stats=STATS, top_k=5, **head)

    def of_ours(h, w, b):
        return linear_logprob_stats(h, w, sample.targets, bias=b, stats=STATS, top_k=5, backend=under.name, **head)

    (truth, true_stats), (dense, dense_stats_), (found, stats) = (
        run(of_dense, torch.float64),
        run(of_dense),
        run(of_ours),
    )
    assert_contract(found, dense, truth)
    for name in STATS:
        if name == "is_top1":
            assert torch.equal(stats.is_top1, true_stats.is_top1)
        else:
            assert_error_contract(
                name, getattr(stats, name), getattr(dense_stats_, name), getattr(true_stats, name), 5e-7
            )


def test_statistics_do_not_change_the_log_probs():
    sample = sample_of(45, 24, 300, torch.bfloat16)
    plain = linear_logprob(sample.hidden, sample.weight, sample.targets, backend=under.name)
    logprob, _ = linear_logprob_stats(sample.hidden, sample.weight, sample.targets, stats=STATS, backend=under.name)
    assert torch.equal(plain, logprob)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_logits_that_the_caller_holds(dtype, overwrite):
    sample = sample_of(13, 8, 2500, torch.float32, ignored=0.3)
    logits = (sample.hidden @ sample.weight.T).to(dtype)
    strided = torch.empty(13, 2, 2500, dtype=dtype, device=DEVICE)[:, 0]
    options = {"softcap": 6.0, "temperature": 0.7}

    def loss(function, leaf):
        logprob, stats = function(leaf)
        return (
            (logprob * sample.upstream).sum() + (stats.entropy - 0.5 * stats.lse + 30 * stats.mean_logit).sum(),
            logprob,
            stats,
        )

    def dense(leaf):
        identity = torch.eye(2500, dtype=leaf.dtype, device=DEVICE)
        return dense_stats(leaf, identity, sample.targets, stats=STATS, top_k=3, **options)

    def of_ours(leaf):
        return logprob_stats_from_logits(
            leaf, sample.targets, stats=STATS, top_k=3, overwrite_logits=overwrite, backend=under.name, **options
        )

    results = []
    for function, cast in ((dense, torch.float64), (dense, torch.float32), (of_ours, dtype)):
        leaf = logits.detach().to(cast).requires_grad_()
        used = strided.copy_(leaf.detach()).requires_grad_(False) if function is of_ours and not overwrite else None
        held = used.requires_grad_() if used is not None else leaf * 1
        held.retain_grad()
        value, logprob, stats = loss(function, held)
        value.backward()
        results.append((logprob, held.grad, stats))
    (truth, d_truth, s_truth), (plain, d_plain, _), (found, d_found, s_found) = results
    assert_error_contract("logprob", found, plain, truth)
    assert_error_contract("d_logits", d_found, d_plain.to(dtype), d_truth, 5e-7)
    assert relative_error(s_found.top_k_mass, s_truth.top_k_mass) < 1e-6
    assert relative_error(s_found.entropy, s_truth.entropy) < 1e-6
    assert (d_found[sample.targets == -100] == 0).all()


def test_a_second_backward_over_overwritten_logits_raises():
    logits = torch.randn(4, 50, device=DEVICE, requires_grad=True) * 1
    out = logprob_from_logits(logits, torch.arange(4, device=DEVICE), overwrite_logits=True, backend=under.name).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_small_slabs")
def test_a_token_does_not_see_its_batch(dtype):
    sample = sample_of(70, 24, 300, dtype)
    call = lambda rows: linear_logprob(sample.hidden[rows], sample.weight, sample.targets[rows], backend=under.name)  # noqa: E731
    whole = call(slice(None))
    for N in (1, 2, 31, 32, 33, 69):
        assert torch.equal(call(slice(0, N)), whole[:N])
    for i in (0, 33, 69):
        assert torch.equal(call(slice(i, i + 1)), whole[i : i + 1])
    if DEVICE == "cuda" or dtype == torch.float32:  # the interpreter's products round by the place in the tile
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        assert torch.equal(call(order), whole[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["hidden", "upstream", "ignored hidden"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_stays_in_its_row(dtype, where, bad):
    sample = sample_of(40, 8, 150, dtype)
    clean = ours(sample)
    if where == "upstream":
        sample.upstream[5] = bad
    else:
        sample.hidden[5, 3] = bad
    if where == "ignored hidden":
        sample.targets[5] = -100
    value, d_hidden, d_weight = ours(sample)
    others = torch.arange(40, device=DEVICE) != 5
    assert torch.equal(value[others], clean[0][others])
    assert relative_error(d_hidden[others], clean[1][others]) < (1e-6 if dtype == torch.float32 else 4e-3)
    if where == "ignored hidden":
        assert value[5] == 0
        assert (d_hidden[5] == 0).all()
        assert d_weight.isfinite().all()
    else:
        assert not d_hidden[5].isfinite().all()
        assert not d_weight.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabulary_rows(dtype):
    sample = sample_of(20, 8, 300, dtype, bias=True)
    sample.bias[100:] = float("-inf")  # whole tiles without probability
    sample.targets %= 100
    small = sample_of(20, 8, 300, dtype, bias=True)
    small.weight, small.bias, small.targets = small.weight[:100], small.bias[:100], sample.targets
    truth, dense = truth_and_dense(small)
    value, d_hidden, d_weight, d_bias = ours(sample)
    assert_contract((value, d_hidden, d_weight[:100], d_bias[:100]), dense, truth)
    assert (d_weight[100:] == 0).all()
    assert (d_bias[100:] == 0).all()


# 2 ** -100 is 8e-31, the coefficient of a saturated pair.
@pytest.mark.parametrize("power", [-100, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_scale_exactly_with_the_coefficients(power, dtype):
    sample = sample_of(40, 16, 150, dtype)
    plain = ours(sample)
    sample.upstream *= 2.0**power
    for found, base in zip(ours(sample)[1:], plain[1:], strict=True):
        expected = base.double() * 2.0**power
        seen = expected.abs() >= 4 * torch.finfo(dtype).smallest_normal
        assert torch.equal(found.double()[seen], expected[seen])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_magnitudes_keep_each_tokens_direction(dtype):
    sample = sample_of(64, 16, 150, dtype)
    decades = 3 if dtype == torch.float16 else 30  # fp16 itself has no more to give to d_hidden
    sample.upstream *= 10.0 ** torch.linspace(-decades, 1, 64, device=DEVICE)
    truth, dense = truth_and_dense(sample)
    assert_contract(ours(sample), dense, truth)


@pytest.mark.parametrize("temperature", [0.05, "per token"])
def test_steep_heads_do_not_overflow_fp16(temperature):
    sample = sample_of(40, 16, 150, torch.float16, sharpness=0.2)
    sample.upstream = torch.linspace(-1.9, 1.9, 40, device=DEVICE)
    if temperature == "per token":
        temperature = torch.linspace(0.02, 1.0, 40, device=DEVICE)
    options = {"temperature": temperature, "logit_scale": -2.0}
    truth, dense = truth_and_dense(sample, **options)
    assert_contract(ours(sample, **options), dense, truth)


# x = z / softcap from 0.003 to 3: both branches of the hyperbolic tangent and where they meet.
def test_the_hyperbolic_tangent_is_exact_to_fp32():
    logits = torch.linspace(0.1, 90.0, 601, device=DEVICE)[:, None]
    targets = torch.zeros(601, dtype=torch.int64, device=DEVICE)
    for backend in (under.name, "cpu") if DEVICE == "cpu" else (under.name,):
        _, stats = logprob_stats_from_logits(logits, targets, stats=("lse",), softcap=30.0, backend=backend)
        truth = 30 * torch.tanh(logits[:, 0].double() / 30)
        assert ((stats.lse - truth) / truth).abs().max() < 3.5e-7


def test_a_nan_logit_leaves_no_first_place():
    logits = torch.zeros(2, 300, device=DEVICE)
    logits[:, 7] = 5.0
    logits[0, 200] = float("nan")
    targets = torch.full((2,), 7, device=DEVICE)
    logprob, stats = logprob_stats_from_logits(logits, targets, stats=("is_top1",), backend=under.name)
    assert logprob.isnan().tolist() == [True, False]
    assert stats.is_top1.tolist() == [False, True]


def test_a_workspace_that_is_too_small_raises_at_once():
    sample = sample_of(20, 8, 150, torch.bfloat16)
    with pytest.raises(ValueError, match="max_workspace_mb: expected at least"):
        linear_logprob(sample.hidden, sample.weight, sample.targets, max_workspace_mb=1e-4, backend=under.name)


def test_confident_targets_keep_the_digits_of_one_minus_p():
    sample = sample_of(32, 4, 150, torch.float32)
    sample.hidden = torch.eye(4, device=DEVICE).repeat(8, 1)
    sample.weight = torch.zeros(150, 4, device=DEVICE)
    sample.weight[:4] = torch.eye(4, device=DEVICE) * 14.0  # p of the target is 1 - 1e-4
    sample.targets = torch.arange(4, device=DEVICE).repeat(8)
    for dtype in (torch.float32, torch.bfloat16):
        sample.hidden, sample.weight = sample.hidden.to(dtype), sample.weight.to(dtype)
        truth, _ = truth_and_dense(sample)
        value, d_hidden, _ = ours(sample)
        assert relative_error(value, truth[0]) < 3e-6
        assert relative_error(d_hidden, truth[1]) < (3e-6 if dtype == torch.float32 else 3e-3)


def test_a_target_that_many_tokens_share():
    sample = sample_of(90, 16, 150, torch.bfloat16, bias=True)
    sample.targets[:] = 7
    truth, dense = truth_and_dense(sample)
    assert_contract(ours(sample), dense, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_score(dtype):
    for sample in (sample_of(0, 8, 50, dtype), sample_of(6, 8, 50, dtype, ignored=2.0)):
        value, d_hidden, d_weight = ours(sample)
        assert value.tolist() == [0.0] * len(sample.targets)
        assert d_hidden.shape == sample.hidden.shape
        assert (d_hidden == 0).all()
        assert (d_weight == 0).all()
        scored = ours(sample, max_scored=0)
        assert (scored[2] == 0).all()


def test_coefficients_of_zero_cost_no_gradient():
    sample = sample_of(50, 8, 150, torch.bfloat16)
    sample.upstream[10:] = 0
    few = Sample(sample.hidden[:10], sample.weight, sample.targets[:10], sample.upstream[:10])
    many = ours(sample)
    assert torch.equal(many[2], ours(few)[2])
    assert (many[1][10:] == 0).all()


@pytest.mark.usefixtures("_small_slabs")
def test_more_scored_tokens_than_promised():
    sample = sample_of(70, 8, 50, torch.bfloat16)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="max_scored: expected at least the 70"):
            ours(sample, max_scored=40)
        return
    assert ours(sample, max_scored=40)[0].isnan().tolist() == [False] * 40 + [True] * 30


# Backward products go to the library; the kernels' own are counted by the tiles they make.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_flop(dtype):
    """fp32: forward, recomputation and two gradients, all the library's. bf16: the first two may be fused kernels."""
    units = 2.0 if under.fused and dtype == torch.bfloat16 else 4.0
    N, D, V = 128, 32, 2048
    sample = sample_of(N, D, V, dtype)
    with FlopCounter() as counter:
        ours(sample)
    assert counter.flop == units * 2 * N * D * V
    assert under.module.make_plan(Problem(DEVICE, dtype, dtype, N, D, V, keep_logits=True)).units == 4.0
