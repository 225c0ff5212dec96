"""TRL's trainers on our kernels: the same numbers and gradients as on TRL's own, and everything put back."""

import math
from contextlib import nullcontext

import pytest
import torch
import trl.kernels
import trl.kernels.chunked_divergence as chunked_divergence
import trl.kernels.chunked_logprob as chunked_logprob
import trl.trainer.distillation_trainer as distillation_trainer
import trl.trainer.utils as trl_utils
from datasets import Dataset
from trainer_fixtures import make_model
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl_fixtures import make_folder, make_pairs, train

from isdaa_kernels import NoBackend, Routed, make_vocab_order, ops
from isdaa_kernels.integrations import patching
from isdaa_kernels.integrations.trl import make_divergence, make_function, patch_trl
from isdaa_kernels.testing import FlopCounter

ORIGINAL = chunked_logprob.ChunkedLogProbFunction
NAMES = ("logprob", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ALL = NAMES[1:]
V, D = 301, 32


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")


def ours(**settings):
    return make_function(
        **{"gradient": "exact", "vocab_order": None, "max_workspace_mb": None, "backend": None} | settings
    )


def tensors(N, dtype=torch.float32, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(V, D, generator=generator)).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, torch.randn(V, generator=generator).to(dtype) if bias else None, targets


def run(function, hidden, weight, bias, targets, *transforms, needs=(True, True, True), outputs=ALL):
    """(the outputs by name, the gradients of a loss of log-prob and entropy)."""
    leaves = [
        None if x is None else x.detach().requires_grad_(need)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    found = dict(zip(NAMES, function.apply(*leaves, targets, *transforms, outputs), strict=True))
    coefficient = torch.linspace(-1, 2, len(targets))
    loss = (coefficient * found["logprob"]).sum()
    if found["entropy"] is not None:
        loss = loss + (coefficient.flip(0) * found["entropy"]).sum()
    loss.backward()
    return found, [None if x is None else x.grad for x in leaves]


# (temperature, chunk_size, softcap, logit_scale): as most models have it, and each transform; V is no multiple of the chunk
@pytest.mark.parametrize("transforms", [(1.0, 128, None, 1.0), (0.7, 128, None, 0.25), (1.3, 512, 5.0, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N", [1, 37])
def test_outputs_and_gradients_are_trls(N, bias, transforms):
    inputs = tensors(N, bias=bias)
    (expected, grads), (found, our_grads) = (run(f, *inputs, *transforms) for f in (ORIGINAL, ours()))
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)
        assert found[name].requires_grad == expected[name].requires_grad == (name in ("logprob", "entropy"))
    for grad, our_grad in zip(grads, our_grads, strict=True):
        assert (grad is None) == (our_grad is None)
        if grad is not None:
            torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-5)


# With 16-bit inputs TRL's logits are rounded: each is held against fp64.
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_inputs_are_nearer_to_the_truth(autocast):
    hidden, weight, _, targets = tensors(64, torch.float32 if autocast else torch.bfloat16)
    rounded = [x.to(torch.bfloat16) for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (theirs, their_grads), (found, our_grads) = (
            run(f, hidden, weight, None, targets, 1.0, 128, None, 1.0) for f in (ORIGINAL, ours())
        )
    truth, grads = run(ours(backend="reference"), *(x.double() for x in rounded), None, targets, 1.0, 128, None, 1.0)

    def error(value, exact):
        return ((value.double() - exact.double()).norm() / exact.double().norm()).item()

    for name in ("logprob", "entropy", "log_sum_sq_probs"):
        assert found[name].dtype == torch.float32
        assert error(found[name], truth[name]) <= 1e-6 < error(theirs[name], truth[name])
    for our_grad, their_grad, grad in zip(our_grads[:2], their_grads[:2], grads[:2], strict=True):
        assert our_grad.dtype == their_grad.dtype
        assert error(our_grad, grad) <= error(their_grad, grad)


def test_strided_inputs_and_partial_gradients():
    _, _, bias, targets = tensors(23, bias=True)
    generator = torch.Generator().manual_seed(2)
    wide, tall = torch.randn(23, 2 * D, generator=generator), 0.3 * torch.randn(D, V, generator=generator)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        inputs = (wide[:, ::2], tall.T, bias, targets, 1.0, 128, None, 1.0)
        (expected, grads), (found, our_grads) = (run(f, *inputs, needs=needs) for f in (ORIGINAL, ours()))
        torch.testing.assert_close(found["logprob"], expected["logprob"], rtol=2e-6, atol=2e-6)
        for grad, our_grad in zip(grads, our_grads, strict=True):
            assert (grad is None) == (our_grad is None)
            if grad is not None:
                torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "is_top1"), ("entropy", "mean_logits")])
def test_only_what_is_asked_for(outputs):
    inputs = (*tensors(5), 1.0, 128, None, 1.0)
    expected, found = (run(f, *inputs, outputs=outputs)[0] for f in (ORIGINAL, ours()))
    assert {n for n in NAMES if found[n] is None} == {n for n in NAMES if expected[n] is None}
    with pytest.raises(ValueError, match=r"outputs: expected some of log_probs, .* got 'perplexity'"):
        run(ours(), *inputs, outputs=("perplexity",))


def test_fp64_inputs_come_back_in_fp32_as_trls():
    inputs = (*tensors(5, torch.float64), 1.0, 128, None, 1.0)
    expected, found = (run(f, *inputs)[0] for f in (ORIGINAL, ours()))
    assert all(found[n].dtype == expected[n].dtype for n in NAMES)


def test_equal_logits_are_the_one_difference_of_is_top1():
    hidden, weight, _, _ = tensors(4)
    weight[7] = weight[3] = 10 * hidden[0]
    targets = torch.tensor([3, 7, 3, 7])
    hidden = hidden[:1].expand(4, D)
    theirs, found = (
        run(f, hidden, weight, None, targets, 1.0, 128, None, 1.0)[0]["is_top1"] for f in (ORIGINAL, ours())
    )
    assert theirs.tolist() == [True, False, True, False]
    assert found.tolist() == [True] * 4


def test_a_head_partitioned_by_zero_3_raises():
    hidden, weight, _, targets = tensors(4)
    weight.ds_id = 0
    with pytest.raises(NotImplementedError, match="weight: DeepSpeed ZeRO-3"):
        ours().apply(hidden, weight, None, targets, 1.0, 128)


def test_no_token_is_a_differentiable_nothing():
    hidden, weight, _, targets = tensors(0)
    found, grads = run(ours(), hidden, weight, None, targets, 1.0, 128, None, 1.0)
    assert found["logprob"].shape == (0,)
    assert not grads[1].any()


def fused_model(**changes):
    model = make_model(vocab_size=V, **changes)
    trl_utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", *ALL))
    return model


def labels_of(generator):
    """[3, 9]: a prompt of 3, padding behind a short row, and a row without any label."""
    labels = torch.randint(0, V, (3, 9), generator=generator)
    labels[:, :3] = labels[1, 6:] = labels[2] = -100
    return labels


# plain, and with what TRL reads from the configurations of Gemma 2 and Cohere
@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 4.0, "logit_scale": 0.5}])
def test_fused_head_of_a_model(changes):
    generator = torch.Generator().manual_seed(1)
    labels = labels_of(generator)
    input_ids = torch.randint(0, V, labels.shape, generator=generator)
    results = []
    for patched in (False, True):
        model = fused_model(**changes)
        with patch_trl() if patched else nullcontext():
            output = model(input_ids=input_ids, labels=labels, fused_lm_head=True)
            (output.loss + output.entropy.square().sum()).backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters()}))
    (expected, grads), (found, our_grads) = results
    for name in ("loss", "log_probs", *ALL, "label_mask"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=2e-6)
        if name != "loss":
            assert not found[name][labels[:, 1:] == -100].any()
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_has_zero_gradients():
    model = fused_model()
    with patch_trl():
        output = model(
            input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.full((2, 5), -100), fused_lm_head=True
        )
        output.loss.backward()
    assert output.loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_only_tokens_with_a_label_are_projected(monkeypatch):
    labels = labels_of(torch.Generator().manual_seed(1))
    counts = []
    with patch_trl():
        function = trl_utils._ChunkedLogProbFunction
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda hidden, *rest: counts.append(len(hidden)) or apply(hidden, *rest))
        fused_model()(input_ids=labels.clamp(min=0), labels=labels, fused_lm_head=True)
        assert not trl_utils._use_triton(torch.device("meta"))
    assert counts == [int((labels[:, 1:] != -100).sum())]


def names_held():
    return [
        trl.kernels.ChunkedLogProbFunction,
        chunked_logprob.ChunkedLogProbFunction,
        trl_utils._ChunkedLogProbFunction,
        trl_utils._use_triton,
        chunked_divergence.ChunkedDivergenceFunction,
        distillation_trainer.ChunkedDivergenceFunction,
        distillation_trainer._use_triton,
    ]


def test_undo_restores_every_name():
    before = names_held()
    patch = patch_trl()
    assert all(now is not then for now, then in zip(names_held(), before, strict=True))
    patch.undo()
    assert names_held() == before
    with patch_trl():
        pass
    assert names_held() == before
    with patch_trl(distillation=False):
        assert names_held()[4:] == before[4:]
        assert all(now is not then for now, then in zip(names_held()[:4], before, strict=False))


def test_a_second_patch_raises_and_the_first_stays():
    with patch_trl():
        held = names_held()
        with pytest.raises(ValueError, match=r"ChunkedLogProbFunction: patched already"):
            patch_trl(max_workspace_mb=10)
        assert names_held() == held


def test_a_version_that_was_not_tested(monkeypatch):
    monkeypatch.setattr(patching, "version", lambda package: "1.17.0")
    with pytest.raises(ImportError, match=r"trl: expected version 1\.16\.0, got 1\.17\.0; pass any_version=True"):
        patch_trl()
    patch_trl(any_version=True).undo()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "fast"}, "gradient: expected 'exact' or Routed"),
        ({"backend": "abacus"}, "backend: expected one of .* got 'abacus'"),
        ({"max_workspace_mb": -1.0}, "max_workspace_mb: expected"),
    ],
)
def test_settings_that_the_kernels_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        patch_trl(**settings)
    patch_trl().undo()


# Routed: tolerance 0 is exact, with or without an order of the vocabulary; entropy is a number for the metrics.
@pytest.mark.parametrize("ordered", [False, True])
def test_routed_gradients(ordered):
    hidden, weight, _, targets = tensors(37)
    order = make_vocab_order(weight, hidden, 32) if ordered else None
    routed = ours(gradient=Routed(tolerance=0.0, block=32), vocab_order=order)
    results = []
    for function in (ORIGINAL, routed):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        found = dict(zip(NAMES, function.apply(*leaves, None, targets, 1.0, 128), strict=True))
        found["logprob"].square().sum().backward()
        results.append((found, *(leaf.grad for leaf in leaves)))
    (expected, *grads), (found, *our_grads) = results
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)
    for grad, our_grad in zip(grads, our_grads, strict=True):
        torch.testing.assert_close(our_grad, grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("settings", [{"gradient": Routed()}, {"detach_entropy": True}], ids=["routed", "detached"])
def test_a_gradient_of_the_entropy_where_there_is_none_raises(settings):
    hidden, weight, _, targets = tensors(5)
    logprob, entropy, *_ = ours(**settings).apply(hidden.requires_grad_(), weight, None, targets, 1.0, 128)
    with pytest.raises(NotImplementedError, match="entropy: has no gradient here"):
        (logprob.sum() + 0.1 * entropy.sum()).backward()
    with torch.no_grad():
        _, entropy, *_ = ours(**settings).apply(hidden, weight, None, targets, 1.0, 128)
    assert not entropy.requires_grad


@pytest.mark.parametrize("outputs", [("log_probs", *ALL), ("log_probs", "entropy"), ("log_probs", "mean_logits")])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_metrics_come_from_the_one_forward(outputs, routed, frozen):
    """Calls of the head's forward, and the matrix work of forward and backward: that of the log-probs alone."""
    hidden, weight, _, targets = tensors(512)
    settings = {"gradient": Routed(tolerance=3.0, block=32, row_share=0.0)} if routed else {"detach_entropy": True}
    flop, calls = [], []
    forward = ops.linear_logprob_forward
    for function, wanted in ((ours(**settings), outputs), (ours(**settings), ("log_probs",))):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with FlopCounter() as counter, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "linear_logprob_forward", lambda *args: calls.append(args) or forward(*args))
            function.apply(*leaves, None, targets, 1.0, 128, None, 1.0, wanted)[0].square().sum().backward()
        flop.append((counter.flop, [x.grad for x in leaves]))
    assert len(calls) == 2
    (with_metrics, grads), (without, plain) = flop
    assert with_metrics == without
    if frozen and not routed:
        assert with_metrics == 2 * 2 * 512 * D * V
    for grad, expected in zip(grads, plain, strict=True):
        assert (grad is None) == (expected is None)
        assert grad is None or torch.equal(grad, expected)


def assert_same_run(expected, found, tolerance):
    assert len(expected) == len(found)
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - {"step_time"}:
            assert math.isclose(before[name], after[name], rel_tol=tolerance, abs_tol=tolerance), (name, before, after)


def test_dpo_for_20_steps(tmp_path):
    model = make_folder(tmp_path)
    settings = {
        "max_steps": 20,
        "gradient_accumulation_steps": 2,
        "eval_dataset": make_pairs(4, seed=1),
        "eval_strategy": "steps",
        "eval_steps": 10,
    }
    _, expected = train(tmp_path / "theirs", model, **settings)
    with patch_trl():
        _, found = train(tmp_path / "ours", model, **settings)
    # sums of rounding errors over 20 steps of AdamW, which divides small gradients by their size
    assert_same_run(expected, found, 1e-4)
    assert expected[0]["loss"] != expected[19]["loss"]


def test_dpo_in_bf16(tmp_path):
    model = make_folder(tmp_path)
    _, expected = train(tmp_path / "theirs", model, bf16=True)
    with patch_trl():
        _, found = train(tmp_path / "ours", model, bf16=True)
    assert_same_run(expected, found, 0.05)  # what rounding the logits does to a margin
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def prompts_only(pairs):
    return pairs.select_columns(["prompt"])


def chosen_only(pairs):
    return pairs.remove_columns("rejected").rename_column("chosen", "completion")


def labelled(pairs):
    rows = [(p["prompt"], p[name], name == "chosen") for p in pairs for name in ("chosen", "rejected")]
    return Dataset.from_list([{"prompt": prompt, "completion": text, "label": good} for prompt, text, good in rows])


def reward(completions, **kwargs):
    return [float(sum(map(ord, text)) % 7) for text in completions]


DIVERGENCE = chunked_divergence.ChunkedDivergenceFunction
EXACT = {"gradient": "exact", "vocab_order": None, "max_workspace_mb": None, "backend": None}


def two_heads(N, bias=False, E=24, dtype=torch.float32):
    """(student's hidden, weight, bias, teacher's) of different hidden sizes."""
    hidden, weight, bias_V, _ = tensors(N, dtype, bias)
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(N, E, generator=generator).to(dtype), (0.3 * torch.randn(V, E, generator=generator)).to(dtype)
    return hidden, weight, bias_V, *other, None if bias_V is None else bias_V.flip(0)


def run_divergence(function, inputs, *numbers, needs=(True, True, True)):
    """(divergence, entropy, the student's gradients)."""
    leaves = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs[:3], needs, strict=True)]
    teacher = [None if x is None else x.detach().requires_grad_() for x in inputs[3:]]
    divergence, entropy = function.apply(*leaves, *teacher, *numbers)
    assert not entropy.requires_grad
    if divergence.requires_grad:
        (torch.linspace(-1, 2, len(divergence)) * divergence).sum().backward()
    assert not any(x is not None and x.grad is not None for x in teacher)
    return divergence, entropy, [None if x is None else x.grad for x in leaves]


# (beta, temperature, scale and softcap of the student and of the teacher): both ends and between, plain and with each transform
@pytest.mark.parametrize("transforms", [(1.0,), (0.7, 0.25, None, 2.0, 4.0), (1.3, 2.0, 5.0, 0.5, None)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_divergences_and_gradients_are_trls(beta, bias, transforms):
    inputs = two_heads(37, bias)
    expected, found = (run_divergence(f, inputs, beta, *transforms) for f in (DIVERGENCE, make_divergence(**EXACT)))
    assert found[0].min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_divergences_of_strided_inputs_with_partial_gradients():
    inputs = list(two_heads(23, bias=True))
    for i in (1, 4):
        inputs[i] = inputs[i].T.contiguous().T
    for i in (0, 3):
        inputs[i] = torch.stack([inputs[i]] * 2, -1)[..., 0]
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        expected, found = (run_divergence(f, inputs, 0.5, needs=needs) for f in (DIVERGENCE, make_divergence(**EXACT)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_divergences_of_16_bit_inputs(autocast):
    inputs = two_heads(64, dtype=torch.float32 if autocast else torch.bfloat16)
    exact = [None if x is None else x.bfloat16().double() for x in inputs]
    truth = run_divergence(make_divergence(**EXACT | {"backend": "reference"}), exact, 0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, found = (run_divergence(f, inputs, 0.5) for f in (DIVERGENCE, make_divergence(**EXACT)))
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[:2], truth[:2], rtol=1e-5, atol=1e-6, check_dtype=False)
    for grad, their_grad, true in zip(found[2][:2], theirs[2][:2], truth[2][:2], strict=True):
        assert grad.dtype == their_grad.dtype
        # autocast's own cast of the inputs rounds the gradient that goes back through it
        bound = 2**-8 * true.norm() if autocast else (their_grad - true).norm()
        assert (grad - true).norm() <= bound


def test_a_divergence_of_no_token():
    divergence, _, grads = run_divergence(make_divergence(**EXACT), two_heads(0), 0.5)
    assert divergence.shape == (0,)
    assert not grads[1].any()


def test_what_a_divergence_refuses():
    inputs, routed = two_heads(5), make_divergence(**EXACT | {"gradient": Routed()})
    with pytest.raises(NotImplementedError, match="gradient: a divergence has no routed one"):
        run_divergence(routed, inputs, 0.5)
    expected, found = (run_divergence(f, inputs, 0.5, needs=(False,) * 3) for f in (DIVERGENCE, routed))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    for settings, message in (
        ({"gradient": "fast"}, "gradient"),
        ({"vocab_order": make_vocab_order(inputs[1], inputs[0], 32)}, "vocab_order"),
        ({"backend": "abacus"}, "abacus"),
        ({"max_workspace_mb": -1.0}, "max_workspace_mb"),
    ):
        with pytest.raises((ValueError, NotImplementedError, NoBackend), match=message):
            run_divergence(make_divergence(**EXACT | settings), inputs, 0.5)
    with pytest.raises(ValueError, match="jsd_weight"):
        run_divergence(make_divergence(**EXACT), inputs, 1.5)
    inputs[4].ds_id = 0
    with pytest.raises(NotImplementedError, match="weight: DeepSpeed ZeRO-3"):
        make_divergence(**EXACT).apply(*inputs, 0.5)


def make_distillation(tmp_path, name, **settings):
    """A run of DistillationTrainer, which makes its own completions, with a teacher that is wider than the student."""
    settings = {"max_completion_length": 8, "per_device_train_batch_size": 4, **settings}
    return train(
        tmp_path / name,
        make_folder(tmp_path),
        DistillationTrainer,
        DistillationConfig,
        prompts_only(make_pairs()),
        teacher_model=make_model(vocab_size=300, hidden_size=48, seed=5),
        **settings,
    )


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_distillation(tmp_path, beta):
    settings = {"beta": beta, "temperature": 0.8, "eval_dataset": prompts_only(make_pairs(4, seed=1))}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2}
    _, expected = make_distillation(tmp_path, "theirs", **settings)
    with patch_trl():
        _, found = make_distillation(tmp_path, "ours", **settings)
    assert_same_run(expected, found, 2e-5)
    assert found[0]["loss"] > 0.01
    assert found[0]["loss"] != found[1]["loss"]
    assert any(step.get("grad_norm", 0) > 0 for step in found)


def test_distillation_projects_only_completions(tmp_path, monkeypatch):
    trainer, _ = make_distillation(tmp_path, "run", max_steps=1)
    counts = []
    with patch_trl():
        function = distillation_trainer.ChunkedDivergenceFunction
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda hidden, *rest: counts.append(len(hidden)) or apply(hidden, *rest))
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
        hidden, weight, _, other, other_weight, _ = two_heads(8)
        results = [
            distillation_trainer._chunked_divergence_loss(
                hidden.view(2, 4, -1), other.view(2, 4, -1), weight, other_weight, mask, 0.5
            )
        ]
        trainer.evaluate(prompts_only(make_pairs(2)))  # a trainer made before the patch
    results.append(
        distillation_trainer._chunked_divergence_loss(
            hidden.view(2, 4, -1), other.view(2, 4, -1), weight, other_weight, mask, 0.5
        )
    )
    assert counts[0] == 5
    assert len(counts) > 1
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_distillation_cannot_be_routed(tmp_path):
    with patch_trl(gradient=Routed()), pytest.raises(NotImplementedError, match="gradient: a divergence has no routed"):
        make_distillation(tmp_path, "run", max_steps=1)
    with patch_trl(gradient=Routed(), distillation=False):
        make_distillation(tmp_path, "theirs", max_steps=1)


ONLINE = {
    "reward_funcs": reward,
    "num_generations": 2,
    "max_completion_length": 8,
    "per_device_train_batch_size": 4,
    "beta": 0.1,
}


@pytest.mark.parametrize(
    ("trainer", "config", "data", "settings"),
    [
        (KTOTrainer, KTOConfig, labelled, {}),
        (SFTTrainer, SFTConfig, chosen_only, {}),
        (GRPOTrainer, GRPOConfig, prompts_only, {**ONLINE, "entropy_coef": 0.05}),
        (RLOOTrainer, RLOOConfig, prompts_only, ONLINE),
    ],
)
def test_other_trainers(tmp_path, trainer, config, data, settings):
    model, data = make_folder(tmp_path), data(make_pairs())
    _, expected = train(tmp_path / "theirs", model, trainer, config, data, **settings)
    with patch_trl():
        _, found = train(tmp_path / "ours", model, trainer, config, data, **settings)
    assert_same_run(expected, found, 2e-5)
    assert any(step.get("grad_norm", 0) > 0 for step in found)


# Two steps on each batch of completions, so that ratios are not 1: the loss types, the ratio of completions, masks of tokens by entropy.
@pytest.mark.parametrize(
    ("trainer", "config", "settings"),
    [
        (GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "top_entropy_quantile": 0.5}),
        (GRPOTrainer, GRPOConfig, {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.1}),
        (GRPOTrainer, GRPOConfig, {"loss_type": "cispo", "temperature": 0.7, "use_bias_correction_kl": True}),
        (RLOOTrainer, RLOOConfig, {"gradient_accumulation_steps": 2, "learning_rate": 3e-4}),
    ],
)
def test_online_trainers_for_8_steps(tmp_path, trainer, config, settings):
    model, data = make_folder(tmp_path), prompts_only(make_pairs())
    settings = {**ONLINE, "max_steps": 8, "num_iterations": 2, "learning_rate": 3e-3, **settings}
    _, expected = train(tmp_path / "theirs", model, trainer, config, data, **settings)
    with patch_trl():
        _, found = train(tmp_path / "ours", model, trainer, config, data, **settings)
    assert_same_run(expected, found, 1e-4)
    assert len({step["loss"] for step in found if "loss" in step}) > 4
    assert sum(step.get("grad_norm", 0) > 0 for step in found) > 5
    assert max(step.get("kl", 0) for step in found) > 0


def test_grpo_asks_the_head_for_policy_old_policy_and_reference(tmp_path, monkeypatch):
    calls = []
    with patch_trl():
        function = trl_utils._ChunkedLogProbFunction
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *inputs: calls.append(inputs[-1]) or apply(*inputs))
        settings = {**ONLINE, "max_steps": 2, "num_iterations": 2}
        train(tmp_path / "run", make_folder(tmp_path), GRPOTrainer, GRPOConfig, prompts_only(make_pairs()), **settings)
    # old policy and reference once, then the policy in each of two steps
    policy = ("log_probs", "entropy")
    assert calls == [policy, ("log_probs",), policy, policy]


def test_dpo_with_routed_gradients(tmp_path):
    model = make_folder(tmp_path)
    _, expected = train(tmp_path / "theirs", model)
    with patch_trl(gradient=Routed(tolerance=0.0, block=32)):
        _, found = train(tmp_path / "ours", model)
    assert_same_run(expected, found, 2e-5)


def test_grpo_with_an_entropy_bonus_cannot_be_routed(tmp_path):
    model, settings = make_folder(tmp_path), {**ONLINE, "entropy_coef": 0.05}
    with patch_trl(gradient=Routed()), pytest.raises(NotImplementedError, match="entropy: has no gradient here"):
        train(tmp_path / "run", model, GRPOTrainer, GRPOConfig, prompts_only(make_pairs()), **settings)


def test_dpo_of_an_adapter_without_the_entropys_gradient(tmp_path):
    from peft import LoraConfig

    model, lora = make_folder(tmp_path), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    _, expected = train(tmp_path / "theirs", model, peft_config=lora)
    with patch_trl(detach_entropy=True):
        _, found = train(tmp_path / "ours", model, peft_config=lora)
    assert_same_run(expected, found, 2e-5)


def test_a_trainer_made_before_the_patch_runs_on_it(tmp_path, monkeypatch):
    model = make_folder(tmp_path)
    trainer, _ = train(tmp_path / "run", model, max_steps=1)
    calls = []
    with patch_trl():
        function = trl_utils._ChunkedLogProbFunction
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
        trainer.evaluate(make_pairs(2))
    assert calls
