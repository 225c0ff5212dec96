"""The loss stage as one operator, on the CPU: equal to PyTorch's own arithmetic on every setting, and what PyTorch expects of an operator.
Letters: N tokens, S sequences, P pairs."""

import math
from dataclasses import replace

import pytest
import torch
from pair_loss_cases import (
    FUSED,
    LENGTHS,
    SETTINGS,
    Batch,
    Settings,
    assert_equal_to_dense,
    assert_extremes_equal_dense,
    dense,
    fused,
    in_sums,
    make_batch,
    terms_of,
)

from isdaa_kernels import linear_preference_loss, ops, preference_loss
from isdaa_kernels.backends.cpu import pair_loss as cpu
from isdaa_kernels.backends.cpu.extension import native
from isdaa_kernels.objectives import OBJECTIVES, ImportanceWeight, Objective, SequenceInputs
from isdaa_kernels.objectives.importance import MODES as WEIGHT_MODES
from isdaa_kernels.objectives.metrics import PAIR_METRICS
from isdaa_kernels.ops import pair_loss as pair_loss_ops
from isdaa_kernels.pair_loss import METRICS, MODES, Packing, PairLossCall, PairLossNumbers
from isdaa_kernels.preference_loss import dense_preference_loss
from isdaa_kernels.testing import poisoned_empty


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("level", ["tokens", "sums"])
def test_equals_pytorch(level, settings):
    batch = make_batch(behaviour="is_" in settings.objective)
    assert_equal_to_dense(batch if level == "tokens" else in_sums(batch), settings, "cpu")


@pytest.mark.parametrize("objective", [name for name in FUSED if "mean" not in name])
def test_without_lengths_nothing_is_empty(objective):
    assert_equal_to_dense(replace(in_sums(make_batch()), scored=None), Settings(objective), "cpu")


@pytest.mark.parametrize("settings", [s for s in SETTINGS if not s.more], ids=str)
def test_extreme_log_ratios_equal_pytorch(settings):
    assert_extremes_equal_dense(settings, "cpu")


# Whatever a caller has: reference by token or by sequence, in any dtype, integers of 32 bits, every token scored.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", ["plain", "by_sequence", "mixed", "int32", "bf16", "all_scored", "other_index"])
def test_inputs(variant, dtype):
    batch = make_batch(dtype=dtype, behaviour=True)
    sums = in_sums(batch)
    changed = {
        "plain": batch,
        "by_sequence": replace(batch, reference=sums.reference[None], behaviour=sums.behaviour[None]),
        "mixed": replace(batch, behaviour=sums.behaviour[None].float()),
        "int32": replace(batch, cu_seqlens=batch.cu_seqlens.int(), scored=batch.scored.int()),
        "bf16": replace(batch, reference=batch.reference.bfloat16()),
        "all_scored": replace(batch, scored=None, reference=batch.reference.nan_to_num(-1.0), behaviour=None),
        "other_index": replace(batch, scored=batch.scored.where(batch.scored >= 0, 7), ignore_index=7),
    }[variant]
    assert_equal_to_dense(changed, Settings(), "cpu")
    assert_equal_to_dense(changed, Settings("ipo_mean" if changed.behaviour is None else "is_ipo_mean"), "cpu")


def test_a_policy_of_16_bits():
    assert_equal_to_dense(
        replace(in_sums(make_batch()), policy=in_sums(make_batch()).policy.bfloat16()), Settings(), "cpu"
    )


@pytest.mark.parametrize("upstream", [-3.5, 0.0, math.inf, math.nan])
def test_upstream_gradient(upstream):
    batch = make_batch()
    if math.isfinite(upstream):
        assert_equal_to_dense(batch, Settings(), "cpu", upstream=upstream)
    else:  # tokens of empty pairs, and those that are not scored, get none of it
        grad = fused(batch, Settings(), "cpu", upstream=upstream).grad
        expected = dense(batch, Settings()).grad
        assert torch.equal(grad.isfinite(), expected == 0)
        assert grad[expected == 0].tolist() == [0.0] * int((expected == 0).sum())


def test_unscored_tokens_get_no_gradient_and_are_not_read():
    batch = make_batch()
    broken = replace(batch, policy=batch.policy.where(batch.scored >= 0, math.nan))
    expected, found = fused(batch, Settings(), "cpu"), fused(broken, Settings(), "cpu")
    assert torch.equal(found.grad, expected.grad)
    assert torch.equal(found.loss, expected.loss)
    assert (found.grad[batch.scored < 0] == 0).all()
    assert (found.grad != 0).any()


def test_tokens_outside_of_all_sequences_get_no_gradient():
    batch = make_batch()
    shifted = batch.cu_seqlens.clamp(3, 60)
    found = fused(replace(batch, cu_seqlens=shifted), Settings(), "cpu").grad
    assert found[:3].tolist() == [0.0] * 3
    assert found[60:].tolist() == [0.0] * (len(found) - 60)


@pytest.mark.parametrize("pairs", [None, torch.zeros(0, 2, dtype=torch.int64)])
@pytest.mark.parametrize("denominator", [None, torch.tensor(3.0)])
def test_no_pairs(pairs, denominator):
    batch = Batch(torch.zeros(0), torch.zeros(0), torch.tensor([0]), torch.zeros(0, dtype=torch.int64))
    if pairs is not None:
        batch = replace(make_batch(), reference=make_batch().policy)
    found = fused(batch, Settings(more={"pairs": pairs, "denominator": denominator}), "cpu")
    assert found.loss.item() == 0
    assert [value.item() for value in found.metrics.values()] == [0.0] * METRICS
    assert found.grad.tolist() == [0.0] * len(batch.policy)


def test_results_do_not_depend_on_the_number_of_threads():
    batch = make_batch(lengths=(300000, 300, 200000, 100000), dtype=torch.float32, spread=1e-3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(fused(batch, Settings(), "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].grad, results[1].grad)
    assert torch.equal(results[0].loss, results[1].loss)
    assert results[0].grad.count_nonzero() > 1 << 18


def test_long_sums_are_exact():
    lengths = (32768, 32767)
    batch = make_batch(lengths=lengths, dtype=torch.float32, spread=1e-3)
    found = fused(batch, Settings("dpo"), "cpu")
    ratio = (batch.policy.double() - batch.reference.double()).where(batch.scored >= 0, 0)
    chosen, rejected = (math.fsum(half.tolist()) for half in ratio.split(lengths))
    assert found.metrics["margin/mean"].item() == pytest.approx(chosen - rejected, rel=1e-7)


# ---- The operators


def arguments_of(batch: Batch, settings: Settings):
    terms = terms_of(batch, settings)
    return (batch.policy, batch.reference, batch.behaviour, batch.cu_seqlens, batch.scored, terms.rows,
            terms.by_pair(batch.policy.device), terms.numbers(batch.ignore_index).pack(), "cpu")  # fmt: skip


@pytest.mark.parametrize("settings", [Settings(), Settings("ipo", more={"pairs": torch.tensor([[0, 1]])})], ids=str)
@pytest.mark.parametrize("level", ["tokens", "sums"])
def test_opcheck(level, settings):
    batch = make_batch() if level == "tokens" else in_sums(make_batch())
    batch = replace(batch, policy=batch.policy.requires_grad_())
    arguments = arguments_of(batch, settings)
    torch.library.opcheck(ops.pair_loss_forward, arguments)
    _, _, slope = ops.pair_loss_forward(*arguments)
    packing = (batch.cu_seqlens, None if level == "sums" else batch.scored, -100, arguments[5], "cpu")
    torch.library.opcheck(ops.pair_loss_backward, (torch.ones(()), slope, batch.policy.detach(), *packing))


def test_only_the_loss_has_a_gradient():
    batch = make_batch()
    loss, metrics, slope = ops.pair_loss_forward(batch.policy.requires_grad_(), *arguments_of(batch, Settings())[1:])
    assert loss.requires_grad
    assert not metrics.requires_grad
    assert not slope.requires_grad


def test_a_loss_may_be_used_twice():
    policy = make_batch().policy.requires_grad_()
    batch = replace(make_batch(), policy=policy)
    loss = ops.pair_loss_forward(*arguments_of(batch, Settings()))[0]
    (2 * loss + loss).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(policy.grad, 4 * dense(make_batch(), Settings()).grad, rtol=1e-6, atol=0)


def test_a_second_derivative_is_refused_by_name():
    policy = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    loss, _ = preference_loss(policy, torch.zeros(2, dtype=torch.float64))
    (grad,) = torch.autograd.grad(loss, policy, create_graph=True)
    with pytest.raises(RuntimeError, match="isdaa_kernels: preference_loss has no second derivative"):
        grad.sum().backward()


def test_gradcheck():
    # The loss is fp32, so the differences are large, and the log-ratios small.
    policy = in_sums(make_batch(spread=0.05)).policy.requires_grad_()
    rest = arguments_of(in_sums(make_batch(spread=0.05)), Settings("ipo", more={"beta": 1.0}))[1:]
    assert torch.autograd.gradcheck(
        lambda x: ops.pair_loss_forward(x, *rest)[0], policy, eps=1e-2, atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("beta", [0.3, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])])
def test_fullgraph_compile_of_a_packed_batch(beta):
    torch.compiler.reset()
    batch = make_batch(dtype=torch.float32)

    def forward(policy):
        terms = terms_of(batch, Settings(more={"beta": beta}))
        return ops.pair_loss_forward(policy, batch.reference, None, batch.cu_seqlens, batch.scored, None, terms.by_pair(policy.device),
                                     terms.numbers(-100).pack(), "cpu")[0]  # fmt: skip

    policy = batch.policy.clone().requires_grad_()
    value = torch.compile(forward, fullgraph=True, backend="aot_eager")(policy)
    value.backward()
    expected = dense(batch, Settings(more={"beta": beta}))
    torch.testing.assert_close(value.detach(), expected.loss)
    torch.testing.assert_close(policy.grad, expected.grad)


def test_compile_with_a_changing_number_of_pairs():
    torch.compiler.reset()
    compiled = torch.compile(preference_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for S, beta in ((8, 0.1), (12, 0.1), (14, 0.3)):
        policy, reference = torch.randn(2, S, dtype=torch.float64)
        leaves = [policy.clone().requires_grad_() for _ in range(2)]
        arguments = {"beta": beta, "sample_weight": torch.rand(S // 2)}
        values = [
            f(leaf, reference, **arguments).loss for f, leaf in zip((compiled, preference_loss), leaves, strict=True)
        ]
        torch.testing.assert_close(*(value.detach() for value in values))
        torch.testing.assert_close(
            *(torch.autograd.grad(value, leaf)[0] for value, leaf in zip(values, leaves, strict=True))
        )


def test_values_that_point_outside_raise_in_the_operator():
    batch = make_batch()
    call = lambda **changes: fused(replace(batch, **changes), Settings(), "cpu")  # noqa: E731
    with pytest.raises(ValueError, match=r"cu_seqlens: expected ascending numbers from 0 to 74, got 75 at place 10"):
        call(cu_seqlens=batch.cu_seqlens + (batch.cu_seqlens == 74))
    with pytest.raises(ValueError, match=r"got -1 at place 0"):
        call(cu_seqlens=batch.cu_seqlens - (batch.cu_seqlens == 0).int())
    with pytest.raises(ValueError, match=r"got 5 at place 1"):
        call(cu_seqlens=torch.tensor([7, 5, 74]))
    numbers = terms_of(batch, Settings()).numbers(-100).pack()
    for row in (10, -1):
        arguments = (
            batch.reference,
            None,
            batch.cu_seqlens,
            batch.scored,
            torch.tensor([[0, row]]),
            None,
            numbers,
            "cpu",
        )
        with pytest.raises(ValueError, match=rf"pairs: expected rows in 0..9, got {row}"):
            ops.pair_loss_forward(batch.policy, *arguments)


# ---- Which way a call takes


def test_what_is_fused():
    batch, device = in_sums(make_batch()), torch.device("cpu")
    for name in FUSED:
        assert terms_of(batch, Settings(name)).fused(device) == pair_loss_ops._FIRST
        assert terms_of(batch, Settings(name)).fused(device, "cpu") == "cpu"
        assert terms_of(batch, Settings(name)).fused(device, "reference") is None
    assert terms_of(batch, Settings(more={"beta": torch.ones(5)})).fused(device) == pair_loss_ops._FIRST
    assert terms_of(batch, Settings(more={"beta": torch.ones(5, requires_grad=True)})).fused(device) is None
    assert terms_of(batch, Settings(more={"denominator": torch.ones((), device="meta")})).fused(device) is None
    assert terms_of(batch, Settings()).fused(torch.device("meta")) is None

    class Louder(ImportanceWeight):
        def weigh(self, pair, nonempty_P):
            weight = super().weigh(pair, nonempty_P)
            return weight._replace(weight=2 * weight.weight)

    assert terms_of(batch, Settings(importance=Louder())).fused(device) is None
    loud = preference_loss(batch.policy, batch.reference, lengths=batch.scored, importance=Louder()).loss
    assert loud.item() == pytest.approx(
        2 * preference_loss(batch.policy, batch.reference, lengths=batch.scored).loss.item()
    )


@pytest.mark.parametrize("name", FUSED)
def test_an_objective_of_the_callers_own_gives_the_same(name):
    """Its function is another one, so PyTorch computes it."""
    known = OBJECTIVES[name]
    own = Objective(
        "own", lambda pair, **options: known.function(pair, **options), known.needs, known.defaults, known.importance
    )
    batch = in_sums(make_batch())
    results = []
    for objective in (own, name):
        policy = batch.policy.clone().requires_grad_()
        loss, metrics = preference_loss(policy, batch.reference, objective=objective, lengths=batch.scored)
        loss.backward()
        results.append((loss.detach(), metrics, policy.grad))
        assert ("pair_loss" in str(loss.grad_fn)) == (objective == name)
    torch.testing.assert_close(*results, rtol=3e-7, atol=1e-12)


def test_beta_may_have_a_gradient():
    beta = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
    loss, _ = preference_loss(torch.tensor([1.5, 0.0]), torch.zeros(2), objective="dpo", beta=beta)
    loss.backward()
    assert beta.grad.item() == pytest.approx(-1.5 / (1 + math.exp(0.45)))


def test_the_linear_loss_takes_the_same_way_on_both_backends():
    torch.manual_seed(0)
    batch = make_batch(dtype=torch.float32)
    hidden, weight = torch.randn(len(batch.policy), 8), torch.randn(60, 8)
    results = []
    for backend in ("cpu", "reference"):
        leaf = hidden.clone().requires_grad_()
        arguments = (leaf, weight, batch.scored, batch.cu_seqlens)
        loss, metrics = linear_preference_loss(
            *arguments, reference_logprob=batch.reference, objective="is_ipo", backend=backend
        )
        assert ("pair_loss" in str(loss.grad_fn)) == (backend == "cpu")
        loss.backward()
        results.append((loss.detach(), metrics, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_where_the_compiled_part_is_missing_pytorch_computes_it(monkeypatch):
    monkeypatch.setattr(pair_loss_ops, "_PAIR_LOSS_FOR", {})
    loss, _ = preference_loss(torch.zeros(2, requires_grad=True), torch.zeros(2), objective="dpo")
    assert loss.item() == pytest.approx(math.log(2))
    assert "pair_loss" not in str(loss.grad_fn)
    monkeypatch.setattr(cpu, "native", None)
    with pytest.raises(RuntimeError, match="the compiled part is missing"):
        cpu.forward(
            PairLossCall.of(torch.zeros(2), torch.zeros(2), None, None, None, None, None, PairLossNumbers(0).pack())
        )


# ---- What Python and C++ must call by the same number


def test_names_and_their_order():
    batch = in_sums(make_batch())
    inputs = SequenceInputs(batch.policy, batch.reference, batch.scored)
    _, metrics = dense_preference_loss(terms_of(batch, Settings()), inputs)
    assert tuple(metrics) == PAIR_METRICS
    assert len(PAIR_METRICS) == METRICS
    assert MODES == WEIGHT_MODES
    assert set(FUSED) <= set(OBJECTIVES)


def test_numbers_survive_the_way_through_the_operator():
    numbers = PairLossNumbers(2, 1, True, False, True, -7, 0.1, 0.2, 3.0, 0.5, 0.25, 2.0, 0.75)
    assert PairLossNumbers.unpack(numbers.pack()) == numbers


def test_pieces_depend_on_shapes_alone():
    pieces = lambda N, S: Packing.of(N, torch.zeros(S + 1, dtype=torch.int64), None, None, 0).pieces()  # noqa: E731
    assert [pieces(N, S) for N, S in ((0, 0), (100, 2), (8192, 2), (8193, 2), (1 << 20, 2), (1 << 30, 2))] == [
        1,
        1,
        1,
        2,
        64,
        64,
    ]
    assert Packing.of(1 << 20, None, None, None, 0).pieces() == 1


def test_arguments_of_the_compiled_part_are_checked_by_name():
    with pytest.raises(ValueError, match="grad: expected a value, got none"):
        native.pair_loss_backward(threads=1)
    packing = Packing.of(2, None, None, None, -100).arguments(1)
    more = {"grad": 0, "slope": 0, "out": 0, "out_bytes": 4}
    with pytest.raises(ValueError, match="tau: no such argument"):
        native.pair_loss_backward(threads=1, tau=1, **packing, **more)
    with pytest.raises(ValueError, match="slope: expected another type, got 'x'"):
        native.pair_loss_backward(threads=1, **packing, **{**more, "slope": "x"})


def test_the_lengths_of_the_batch_are_what_the_tests_say():
    lengths = in_sums(make_batch()).scored
    assert [i for i, n in enumerate(lengths.tolist()) if n == 0] == [3, 6]
    assert sum(LENGTHS) == 74


def test_sequences_of_no_token():
    """A micro-batch in which nothing was completed: no error, or the other ranks would wait for ever."""
    for objective in FUSED:
        assert_equal_to_dense(make_batch(lengths=(0,) * 4), Settings(objective), "cpu")
