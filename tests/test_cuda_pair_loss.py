"""csrc/cuda/pair_loss.cu, compiled for the CPU against tests/cuda_emulator. Letters: N tokens, S sequences, P pairs, K pieces."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import emulated_module
from pair_loss_cases import (
    EXTREMES,
    FEW_SETTINGS,
    Settings,
    assert_equal_to_dense,
    dense,
    extreme_sums,
    fused,
    in_sums,
    make_batch,
    moved,
    terms_of,
    use_backend,
)

from isdaa_kernels import pair_loss
from isdaa_kernels.objectives import ImportanceWeight
from isdaa_kernels.testing import poisoned_empty


@pytest.fixture(scope="session")
def native() -> SimpleNamespace:
    module = emulated_module()
    names = ("pair_loss_forward", "pair_loss_backward")
    return SimpleNamespace(**{name: partial(getattr(module, name), 0) for name in names})


def backend_of(native, K: int | None = None) -> SimpleNamespace:
    """The host part of a backend over the kernels. K: pieces other than those of the shapes."""
    pieces = lambda packing: packing.pieces() if K is None or packing.cu_seqlens is None else K  # noqa: E731
    return SimpleNamespace(
        forward=lambda call: call.forward(native.pair_loss_forward, pieces(call.packing)),
        backward=lambda packing, *tensors: pair_loss.backward(
            native.pair_loss_backward, packing, *tensors, pieces(packing)
        ),
    )


@pytest.fixture(autouse=True)
def _cuda(native, monkeypatch):
    use_backend(monkeypatch, "cuda", backend_of(native))
    with poisoned_empty():
        yield


@pytest.mark.parametrize("settings", FEW_SETTINGS, ids=str)
@pytest.mark.parametrize("level", ["tokens", "sums"])
def test_equals_pytorch(level, settings):
    batch = make_batch(behaviour="is_" in settings.objective)
    assert_equal_to_dense(batch if level == "tokens" else in_sums(batch), settings, "cuda")


@pytest.mark.parametrize("objective", ["is_dpo", "is_slic", "ipo"])
def test_extreme_log_ratios_equal_pytorch(objective):
    finite = tuple(row for row in EXTREMES if all(map(math.isfinite, row)))
    assert_equal_to_dense(extreme_sums(finite), Settings(objective), "cuda")
    assert_equal_to_dense(extreme_sums(EXTREMES), Settings(objective), "cuda")  # NaN, and only in what one NaN reaches


# Three pieces of each sequence, of which most are shorter than a group of four; more than there are tokens; and one.
@pytest.mark.parametrize(("K", "variant"), [
    *((3, variant) for variant in ("plain", "moved", "int32", "by_sequence", "fp32")), (1, "moved"), (20, "plain"),
])  # fmt: skip
def test_pieces_and_addresses(native, monkeypatch, K, variant):
    use_backend(monkeypatch, "cuda", backend_of(native, K))
    batch = make_batch(dtype=torch.float32 if variant == "fp32" else torch.float64)
    if variant == "moved":
        batch = moved(batch, 1)
        assert batch.policy.data_ptr() % 16 == 8
    if variant == "int32":
        batch = replace(batch, cu_seqlens=batch.cu_seqlens.int(), scored=batch.scored.int())
    if variant == "by_sequence":
        batch = replace(batch, reference=in_sums(batch).reference[None])
    assert_equal_to_dense(batch, Settings(), "cuda")


# More tokens than the threads of a block take at once, in several pieces; more pairs than threads.
def test_long_sequences():
    batch = make_batch(lengths=(9001, 4500, 7777, 5003), dtype=torch.float32, spread=1e-3)
    assert pair_loss.Packing.of(len(batch.policy), batch.cu_seqlens, None, None, -100).pieces() == 2
    assert_equal_to_dense(batch, Settings(), "cuda")
    assert torch.equal(fused(batch, Settings(), "cuda").grad, fused(batch, Settings(), "cuda").grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [Settings(), Settings("is_dpo", ImportanceWeight(normalize=True, detach=False))], ids=str
)
def test_more_pairs_than_threads(settings):
    random = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 2600, generator=random, dtype=torch.float64)
    batch = replace(
        extreme_sums(((0.0, 0.0),)),
        policy=policy,
        reference=reference,
        scored=torch.randint(4, (2600,), generator=random),
    )
    assert_equal_to_dense(batch, settings, "cuda")
    assert_equal_to_dense(
        batch, replace(settings, more={"pairs": torch.randint(2600, (900, 2), generator=random)}), "cuda"
    )


def test_upstream_gradient():
    assert_equal_to_dense(make_batch(), Settings(), "cuda", upstream=-3.5)
    grad = fused(make_batch(), Settings(), "cuda", upstream=math.inf).grad
    assert torch.equal(grad == 0, dense(make_batch(), Settings()).grad == 0)


@pytest.mark.parametrize("pairs", [None, torch.zeros(0, 2, dtype=torch.int64)])
def test_no_pairs(pairs):
    batch = make_batch(lengths=()) if pairs is None else make_batch()
    found = fused(batch, Settings(more={"pairs": pairs}), "cuda")
    assert found.loss.item() == 0
    assert [value.item() for value in found.metrics.values()] == [0.0] * pair_loss.METRICS
    assert found.grad.tolist() == [0.0] * len(batch.policy)


def test_sequences_of_no_token():
    assert_equal_to_dense(make_batch(lengths=(0,) * 4), Settings(), "cuda")


# On a device nobody can look at the values before: they must not lead out of the tensors, and wrong pairs must show.
def test_values_that_point_outside_are_met_with_nan_or_cut(native):
    batch, settings = make_batch(), Settings("dpo")
    pairs = torch.tensor([[0, 1], [4, 10], [-1, 2]])
    numbers = terms_of(batch, settings).numbers(-100).pack()
    arguments = (batch.policy, batch.reference, None, batch.cu_seqlens, batch.scored, pairs, None, numbers)
    backend = backend_of(native)
    loss, _, slope = backend.forward(pair_loss.PairLossCall.of(*arguments))
    assert loss.isnan()
    assert slope.isnan().tolist() == [[False, True, True]] * 2
    packing = pair_loss.Packing.of(74, batch.cu_seqlens, batch.scored, pairs, -100)
    grad = backend.backward(packing, torch.ones(()), slope, batch.policy)
    touched = torch.zeros(74, dtype=torch.bool)
    for row in (4, 2):
        touched[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]] = True
    assert torch.equal(grad.isnan(), touched & (batch.scored != -100))

    guarded = torch.full((174,), math.nan, dtype=torch.float64)
    guarded[50:124] = batch.policy
    inner = replace(batch, policy=guarded[50:124], cu_seqlens=batch.cu_seqlens.clone())
    inner.cu_seqlens[0], inner.cu_seqlens[-1] = -40, 110
    found, expected = (fused(each, settings, "cuda") for each in (inner, batch))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.grad, expected.grad)


def test_tokens_outside_of_all_sequences_get_no_gradient():
    batch = make_batch()
    batch = replace(batch, cu_seqlens=batch.cu_seqlens.clamp(3, 60))
    grad = fused(batch, Settings(), "cuda").grad
    assert grad[:3].tolist() == [0.0] * 3
    assert grad[60:].tolist() == [0.0] * 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_bytes": 2}, "pair_loss_forward: policy_bytes: expected 4 or 8, got 2"),
        ({"targets_bytes": 1}, "pair_loss_forward: targets_bytes: expected 4 or 8, got 1"),
        ({"policy": 0}, "pair_loss_forward: policy: expected a tensor"),
        ({"loss": 0}, "pair_loss_forward: loss: expected a tensor, got none"),
        ({"counter": 0}, "pair_loss_forward: counter: expected a tensor, got none"),
        ({"records": 0}, "pair_loss_forward: slope, records: expected tensors"),
        ({"K": 0}, "pair_loss_forward: K: expected at least 1, got 0"),
        ({"P": 4}, "pair_loss_forward: P: expected half as many pairs as sequences, got 4"),
        (
            {"cu_seqlens": 0},
            "pair_loss_forward: S: expected as many sequences as numbers where there is no cu_seqlens, got 10",
        ),
        ({"base": 4}, "pair_loss_forward: base: expected 0 to 3, got 4"),
        ({"mode": -1}, "pair_loss_forward: mode: expected 0 to 2, got -1"),
    ],
)
def test_arguments_are_checked(native, changes, message):
    batch = make_batch()
    numbers = terms_of(batch, Settings()).numbers(-100).pack()
    call = pair_loss.PairLossCall.of(
        batch.policy, batch.reference, None, batch.cu_seqlens, batch.scored, None, None, numbers
    )
    with pytest.raises(ValueError, match=message):
        call.forward(lambda **arguments: native.pair_loss_forward(**{**arguments, **changes}))


def test_arguments_of_the_backward_are_checked(native):
    arguments = {
        "grad": 8,
        "slope": 8,
        "out": 8,
        "out_bytes": 4,
        **pair_loss.Packing.of(2, None, None, None, -100).arguments(1),
    }
    for name in ("grad", "out"):
        with pytest.raises(ValueError, match=f"pair_loss_backward: {name}: expected a tensor, got none"):
            native.pair_loss_backward(**{**arguments, name: 0})
