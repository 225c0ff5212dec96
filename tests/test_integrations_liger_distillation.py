"""The drop-ins for Liger's losses of a student and a teacher against liger-kernel's own (PyTorch, not compiled), on the CPU.

N tokens, D hidden size (E that of the teacher), V vocabulary.
"""

import inspect

import liger_kernel.chunked_loss as original
import pytest
import torch
from liger_kernel.transformers import LigerFusedLinearJSD as OriginalJSD

from isdaa_kernels.integrations.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from isdaa_kernels.testing import FlopCounter

LEAVES = ("student_input", "student_weight", "student_bias")


def make_batch(N=23, D=16, E=24, V=61, more_rows=0, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    batch = {"student_input": normal(N, D), "student_weight": normal(V, D) / 2}
    batch |= {"teacher_input": normal(N, E), "teacher_weight": normal(V + more_rows, E) / 2}
    batch["true_labels"] = torch.randint(V, (N,), generator=generator)
    batch["true_labels"][::3] = -100
    batch |= {"student_bias": normal(V) if bias else None, "teacher_bias": normal(V + more_rows) if bias else None}
    return batch


def call(loss, batch, scale=1.0, trained=LEAVES):
    """(the outputs, gradients by name) with fresh leaves."""
    leaves = {n: batch[n].clone().requires_grad_() for n in trained if batch.get(n) is not None}
    outputs = loss(**batch | leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (scale * outputs[0]).backward()
    return tuple(value.detach() for value in outputs), {name: leaf.grad for name, leaf in leaves.items()}


def assert_equal(ours, theirs, tolerance=1e-5):
    (outputs, grads), (their_outputs, their_grads) = ours, theirs
    torch.testing.assert_close(outputs, their_outputs, rtol=tolerance, atol=1e-6)
    for name, grad in grads.items():
        assert their_grads[name].any()
        error = (grad - their_grads[name]).abs().max() / their_grads[name].abs().max()
        assert error < tolerance, (name, error)


def both(batch, scale=1.0, **settings):
    theirs = original.LigerFusedLinearJSDLoss(compiled=False, **settings)
    return (call(loss, batch, scale) for loss in (LigerFusedLinearJSDLoss(**settings), theirs))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(LigerFusedLinearJSDLoss, original.LigerFusedLinearJSDLoss), (LigerFusedLinearJSD, OriginalJSD)],
)
def test_signatures(ours, theirs):
    own, other = (
        [(p.name, p.default) for p in inspect.signature(loss).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        for loss in (ours, theirs)
    )
    assert own == other
    calls = [inspect.signature(loss.forward).parameters.values() for loss in (ours, theirs)]
    default = {inspect.Parameter.empty: inspect.Parameter.empty}
    assert [(p.name, default.get(p.default, p.default)) for p in calls[0]] == [(p.name, p.default) for p in calls[1]]
    assert {name: getattr(ours(), name) for name, _ in own} == dict(own)


SETTINGS = [
    {},
    {"beta": 0.0, "temperature": 2.0, "weight_hard_loss": 0.3, "weight_soft_loss": 1.1},
    {"beta": 1.0, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0},
    {"beta": 0.1, "temperature": 0.7, "chunk_size": 7},
    {"weight_soft_loss": 0.0, "ignore_index": 5},
    {"beta": 0.9, "ignore_index": 5, "return_soft_hard_loss": True},
    {"weight_hard_loss": 0.0, "weight_soft_loss": 0.4, "return_soft_hard_loss": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(settings, bias):
    batch = make_batch(bias=bias)
    batch["true_labels"][batch["true_labels"] == -100] = settings.get("ignore_index", -100)
    ours, theirs = both(batch, 1.7, **settings)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.5, "temperature": 2.0}, {"beta": 1.0}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_teacher_with_more_rows(settings, bias):
    assert_equal(*both(make_batch(more_rows=5, bias=bias), **settings))


# one token, more tokens than a tile, a vocabulary that is no multiple of a block; [B, T] tokens
@pytest.mark.parametrize(("N", "D", "E", "V"), [(2, 8, 4, 33), (150, 24, 24, 700)])
def test_ragged_sizes(N, D, E, V):
    assert_equal(*both(make_batch(N, D, E, V), return_soft_hard_loss=True))


def test_more_leading_dimensions_and_strides():
    batch = make_batch(N=24)
    plain = call(LigerFusedLinearJSDLoss(), batch)
    other = batch | {
        "student_input": batch["student_input"].T.contiguous().T.unflatten(0, (4, 6)),
        "teacher_input": batch["teacher_input"].unflatten(0, (4, 6)),
        "true_labels": batch["true_labels"].unflatten(0, (4, 6)),
        "student_weight": batch["student_weight"].T.contiguous().T,
        "teacher_weight": batch["teacher_weight"].T.contiguous().T,
    }
    found = call(LigerFusedLinearJSDLoss(), other)
    found[1]["student_input"] = found[1]["student_input"].flatten(0, 1)
    assert_equal(found, plain, 1e-6)


@pytest.mark.parametrize("trained", [("student_input",), ("student_weight",), ("student_bias",)], ids=str)
def test_only_what_trains_gets_a_gradient(trained):
    batch = make_batch()
    outputs, grads = call(original.LigerFusedLinearJSDLoss(compiled=False), batch)
    assert_equal(call(LigerFusedLinearJSDLoss(), batch, trained=trained), (outputs, {n: grads[n] for n in trained}))


def test_the_teacher_gets_no_gradient():
    batch = make_batch()
    for name in ("teacher_input", "teacher_weight", "teacher_bias"):
        batch[name].requires_grad_()
    call(LigerFusedLinearJSDLoss(), batch)
    assert all(batch[name].grad is None for name in ("teacher_input", "teacher_weight", "teacher_bias"))


def test_bf16_is_nearer_the_truth():
    batch = make_batch(N=60, V=500, dtype=torch.bfloat16)
    wide = {n: v.float() if v.is_floating_point() else v for n, v in batch.items()}
    _, (truth, grads) = both(wide)
    (found, our_grads), (theirs, their_grads) = both(batch)
    assert abs(found[0] - truth[0]) <= abs(theirs[0] - truth[0])
    for name, grad in our_grads.items():
        assert grad.dtype == torch.bfloat16
        error, their_error = ((g.float() - grads[name]).norm() for g in (grad, their_grads[name]))
        assert error <= their_error * 1.02, name


def test_what_is_not_weighted_costs_nothing():
    batch, work = make_batch(N=64, D=64, E=64, V=1000), []
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        with FlopCounter() as counted:
            call(LigerFusedLinearJSDLoss(*weights, backend="reference"), batch, trained=("student_input",))
        work.append(counted.flop)
    assert 0 < work[0] < work[1]
    assert work[2] == work[1]  # the hard term comes with the soft one


def test_no_label_to_score():
    batch = make_batch()
    batch["true_labels"].fill_(-100)
    (loss, soft, hard), grads = call(LigerFusedLinearJSDLoss(return_soft_hard_loss=True), batch)
    assert loss == soft == hard == 0
    assert not any(grad.any() for grad in grads.values())


# Liger's own is a Triton kernel; its PyTorch loss without hard labels is the same function.
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_the_divergence_alone(beta, ignore_index):
    batch = make_batch(bias=False)
    batch["true_labels"][::3] = ignore_index
    options = {"ignore_index": ignore_index, "temperature": 1.4}
    theirs = call(original.LigerFusedLinearJSDLoss(0.0, 1.0, beta, **options, compiled=False), batch, 0.6)
    names = ("student_input", "student_weight", "teacher_input", "teacher_weight")
    alone = {name: batch[name] for name in names} | {"shift_labels": batch["true_labels"]}
    assert_equal(call(LigerFusedLinearJSD(beta, **options), alone, 0.6), theirs)
    batch["true_labels"].fill_(0)
    everything = call(original.LigerFusedLinearJSDLoss(0.0, 1.0, beta, **options, compiled=False), batch)
    assert_equal(call(LigerFusedLinearJSD(beta, **options), alone | {"shift_labels": None}), everything)


@pytest.mark.parametrize(
    ("make", "more", "match"),
    [
        (lambda: LigerFusedLinearJSDLoss(beta=1.5), {}, r"beta: expected a number in \[0, 1\]"),
        (lambda: LigerFusedLinearJSDLoss(temperature=0.0), {}, "temperature: expected a number above 0"),
        (lambda: LigerFusedLinearJSD(jsd_beta=-0.1), {}, r"jsd_beta: expected a number in \[0, 1\]"),
        (lambda: LigerFusedLinearJSD(accum_dtype=torch.bfloat16), {}, "accum_dtype: expected None or torch.float32"),
        (LigerFusedLinearJSDLoss, {"true_labels": torch.zeros(5, dtype=torch.long)}, r"true_labels: expected \[23\]"),
        (
            lambda: LigerFusedLinearJSDLoss(temperature=float("inf")),
            {},
            "temperature: expected a number above 0, got inf",
        ),
        (
            LigerFusedLinearJSDLoss,
            {"teacher_weight": torch.zeros(60, 24), "teacher_bias": None},
            "teacher_weight: expected 61 rows, the student's vocabulary, or more, got 60",
        ),
        (
            LigerFusedLinearJSDLoss,
            {"teacher_weight": torch.zeros(61, 25)},
            r"teacher_weight: expected \[V, 24\] to fit tea",
        ),
        (
            LigerFusedLinearJSDLoss,
            {"student_weight": torch.zeros(61, 15)},
            r"student_weight: expected \[V, 16\] to fit stu",
        ),
        (
            LigerFusedLinearJSDLoss,
            {"teacher_input": torch.zeros(22, 24)},
            r"teacher_input: expected \[23\] tokens as stude",
        ),
        (lambda: LigerFusedLinearJSDLoss(max_workspace_mb=-1.0), {}, "max_workspace_mb"),
        (lambda: LigerFusedLinearJSDLoss(backend="abacus"), {}, "abacus"),
    ],
)
def test_what_is_refused(make, more, match):
    with pytest.raises(ValueError, match=match):
        call(make(), make_batch() | more)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"teacher_weight": torch.zeros(60, 24)}, "teacher_weight: expected 61 rows, the student's vocabulary, got 60"),
        ({"teacher_weight": torch.zeros(62, 24)}, "teacher_weight: expected 61 rows, the student's vocabulary, got 62"),
        ({"teacher_input": torch.zeros(22, 24)}, r"teacher_input: expected \[23\] tokens as student_input, got \[22\]"),
    ],
)
def test_what_the_divergence_alone_refuses(more, match):
    batch = make_batch(bias=False) | more
    names = ("student_input", "student_weight", "teacher_input", "teacher_weight", "true_labels")
    with FlopCounter() as counted, pytest.raises(ValueError, match=match):
        LigerFusedLinearJSD(backend="reference")(*(batch[name] for name in names))
    assert counted.flop == 0


def test_no_token_at_all():
    batch = make_batch(N=0, bias=False)
    leaf = batch["student_weight"].requires_grad_()
    loss = LigerFusedLinearJSD()(batch["student_input"], leaf, batch["teacher_input"], batch["teacher_weight"], None)
    assert loss == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()
