"""The loss stage in Triton: on a GPU where there is one, else in Triton's interpreter; and compiled for GPUs that are not here. Letters: N
tokens, S sequences, P pairs."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
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
    terms_of,
)

from isdaa_kernels.backends.triton.kernels import pair_loss as kernels
from isdaa_kernels.objectives import ImportanceWeight
from isdaa_kernels.pair_loss import METRICS, Packing, PairLossCall
from isdaa_kernels.testing import poisoned_empty

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_pair_loss_device.py runs it there"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),  # on infinities, which the tests put there
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    monkeypatch.setattr(kernels, "_T", 16)  # several steps of a sequence
    with poisoned_empty():
        yield


@pytest.mark.parametrize("settings", FEW_SETTINGS, ids=str)
@pytest.mark.parametrize("level", ["tokens", "sums"])
def test_equals_pytorch(level, settings):
    batch = make_batch(behaviour="is_" in settings.objective)
    assert_equal_to_dense(batch if level == "tokens" else in_sums(batch), settings, "triton")


@pytest.mark.parametrize("objective", ["is_dpo", "is_slic", "ipo"])
def test_extreme_log_ratios_equal_pytorch(objective):
    finite = tuple(row for row in EXTREMES if all(map(math.isfinite, row)))
    assert_equal_to_dense(extreme_sums(finite), Settings(objective), "triton")
    assert_equal_to_dense(extreme_sums(EXTREMES), Settings(objective), "triton")


@pytest.mark.parametrize(
    ("K", "variant"), [(20, "plain"), *((3, v) for v in ("plain", "int32", "by_sequence", "fp32", "all_scored"))]
)
def test_pieces_and_inputs(monkeypatch, K, variant):
    monkeypatch.setattr(Packing, "pieces", lambda packing: 1 if packing.cu_seqlens is None else K)
    batch = make_batch(dtype=torch.float32 if variant == "fp32" else torch.float64)
    changed = {
        "int32": replace(batch, cu_seqlens=batch.cu_seqlens.int(), scored=batch.scored.int()),
        "by_sequence": replace(batch, reference=in_sums(batch).reference[None]),
        "all_scored": replace(batch, scored=None, reference=batch.reference.nan_to_num(-1.0)),
    }
    assert_equal_to_dense(changed.get(variant, batch), Settings(), "triton")


# More pairs than those of a step.
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [Settings(), Settings("is_dpo", ImportanceWeight(normalize=True, detach=False))], ids=str
)
def test_more_pairs_than_a_step(settings):
    random = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 2 * 150, generator=random, dtype=torch.float64)
    batch = replace(
        extreme_sums(((0.0, 0.0),)),
        policy=policy,
        reference=reference,
        scored=torch.randint(4, (300,), generator=random),
    )
    assert_equal_to_dense(batch, settings, "triton")
    assert_equal_to_dense(
        batch, replace(settings, more={"pairs": torch.randint(300, (140, 2), generator=random)}), "triton"
    )


def test_upstream_gradient():
    assert_equal_to_dense(make_batch(), Settings(), "triton", upstream=-3.5)
    grad = fused(make_batch(), Settings(), "triton", upstream=math.inf).grad
    assert torch.equal(grad == 0, dense(make_batch(), Settings()).grad == 0)


@pytest.mark.parametrize("pairs", [None, torch.zeros(0, 2, dtype=torch.int64)])
def test_no_pairs(pairs):
    batch = make_batch(lengths=()) if pairs is None else make_batch()
    found = fused(batch, Settings(more={"pairs": pairs}), "triton")
    assert found.loss.item() == 0
    assert [value.item() for value in found.metrics.values()] == [0.0] * METRICS
    assert found.grad.tolist() == [0.0] * len(batch.policy)


def test_sequences_of_no_token():
    assert_equal_to_dense(make_batch(lengths=(0,) * 4), Settings(), "triton")


def test_tokens_outside_of_all_sequences_get_no_gradient():
    batch = make_batch()
    grad = fused(replace(batch, cu_seqlens=batch.cu_seqlens.clamp(3, 60)), Settings(), "triton").grad
    assert grad[:3].tolist() == [0.0] * 3
    assert grad[60:].tolist() == [0.0] * 14


# On a device nobody can look at the values before: they must not lead out of the tensors, and wrong pairs must show.
def test_values_that_point_outside_are_met_with_nan_or_cut():
    batch, settings = make_batch(), Settings("dpo")
    pairs = torch.tensor([[0, 1], [4, 10], [-1, 2]])
    numbers = terms_of(batch, settings).numbers(-100).pack()
    call = PairLossCall.of(batch.policy, batch.reference, None, batch.cu_seqlens, batch.scored, pairs, None, numbers)
    loss, _, slope = kernels.forward(call)
    assert loss.isnan()
    assert slope.isnan().tolist() == [[False, True, True]] * 2
    guarded = torch.full((174,), math.nan, dtype=torch.float64)
    guarded[50:124] = batch.policy
    inner = replace(batch, policy=guarded[50:124], cu_seqlens=batch.cu_seqlens.clone())
    inner.cu_seqlens[0], inner.cu_seqlens[-1] = -40, 110
    found, expected = (fused(each, settings, "triton") for each in (inner, batch))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.grad, expected.grad)


COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from isdaa_kernels.backends.triton.kernels import pair_loss as kernels

POINTERS = {"policy": "*fp32", "reference": "*fp32", "cu_seqlens": "*i64", "targets": "*i64", "pairs": "*i64", "counter": "*i32",
            "loss": "*fp32", "metrics": "*fp32", "grad": "*fp32", "out": "*fp32"}
DOUBLES = ("beta", "label_smoothing", "denominator", "epsilon", "floor", "power", "length_exponent")

def compile(kernel, arch, constants):
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    integers = ("N", "S", "P", "K", "ignore_index")
    types = {**{name: "i32" for name in integers}, **dict.fromkeys(DOUBLES, "fp64"), **POINTERS}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp64") for name in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constants), target=target, options=kernels.OPTIONS)
    text = made.asm["amdgcn" if amd else "ptx"]
    print(arch, kernel.fn.__name__, made.metadata.shared, "atom" in text.lower(), "f64" in text)

# A Python float is fp32 to Triton where nobody says otherwise.
assert [p.name for p in kernels.pair_loss_forward_kernel.params if p.annotation_type == "fp64"] == list(DOUBLES)
forward = dict(PACKED=True, REFERENCE_BY_TOKEN=True, BEHAVIOUR_BY_TOKEN=False, BASE=0, WEIGHTED=True, MODE=0, FLOOR=False, BY_LENGTH=False,
               NORMALIZE=False, DETACH=True, T=kernels._T, M=kernels._M, behaviour=None, lengths=None, terms=None, pairs=None)
every = {**forward, "BASE": 2, "FLOOR": True, "BY_LENGTH": True, "NORMALIZE": True, "DETACH": False, "MODE": 1}
del every["terms"], every["pairs"]
backward = dict(PACKED=True, T=kernels._T, M=kernels._M)
for arch in ("80", "90", "100", "gfx942"):
    compile(kernels.pair_loss_forward_kernel, arch, forward)
    compile(kernels.pair_loss_forward_kernel, arch, every)
    compile(kernels.pair_loss_backward_kernel, arch, backward)
"""


@pytest.mark.slow
def test_compilation_without_a_gpu():
    """In a process of its own: what was defined under the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    for arch, name, shared, atomic, double in lines:
        assert int(shared) <= 8192, (arch, name)
        assert (atomic == "True") == ("forward" in name)
        assert double == "True"
