"""The drop-in for Liger's GRPO against liger-kernel's own (not compiled), on the CPU.

B completions of T tokens, D hidden size, V vocabulary.
"""

import inspect

import liger_kernel.chunked_loss as original
import pytest
import torch
import torch.distributed as dist

from isdaa_kernels import Routed
from isdaa_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from isdaa_kernels.testing import FlopCounter

SEED = 4
LEAVES = ("_input", "lin_weight", "bias")


def make_batch(B=5, T=8, D=16, V=61, bias=True, reference="logprob", seed=SEED):
    """Completions of unequal length, one with a hole (tool output), one empty; policies at most 30 % apart at a token, so that some
    ratios are clipped on either side."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    mask = (torch.arange(T) < torch.tensor([T - row % 4 for row in range(B)])[:, None]).long()
    mask[1, 1 : min(3, T - 1)] = 0
    mask[B - 2] = 0
    batch = {"_input": normal(B, T, D), "lin_weight": normal(V, D) / 2, "bias": normal(V) if bias else None}
    batch["selected_token_ids"] = torch.randint(V, (B, T), generator=generator)
    batch |= {"attention_mask": mask, "advantages": normal(B)}
    logits = batch["_input"] @ batch["lin_weight"].T + (batch["bias"] if bias else 0)
    token = logits.log_softmax(-1).gather(-1, batch["selected_token_ids"][..., None])[..., 0]
    batch["old_per_token_logps"] = token + 0.3 * normal(B, T)
    if reference == "logprob":
        batch["ref_per_token_logps"] = token + 0.5 * normal(B, T)
    elif reference == "head":
        batch |= {"ref_input": normal(B, T, D), "ref_weight": normal(V, D) / 2, "ref_bias": batch["bias"]}
    return batch


def call(loss, batch, scale=1.0, trained=LEAVES, **more):
    """(loss, metrics, gradients by name) with fresh leaves."""
    arguments = batch | more
    leaves = {n: arguments[n].clone().requires_grad_() for n in trained if arguments[n] is not None}
    value, metrics = loss(**arguments | leaves)
    (scale * value).backward()
    return value.detach(), metrics, {name: leaf.grad for name, leaf in leaves.items()}


def assert_equal(ours, theirs, tolerance=1e-5):
    """Values to the tolerance, gradients to it relative to the largest entry of each."""
    (loss, metrics, grads), (their_loss, their_metrics, their_grads) = ours, theirs
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, their_loss, rtol=tolerance, atol=1e-5)
    assert len(metrics) == len(their_metrics)
    for value, their_value in zip(metrics, their_metrics, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, their_value, rtol=tolerance, atol=1e-6)
    for name, grad in grads.items():
        assert their_grads[name].any()
        error = (grad - their_grads[name]).abs().max() / their_grads[name].abs().max()
        assert error < tolerance, (name, error)


def both(batch, scale=1.0, more=None, **settings):
    more = {} if more is None else more
    theirs = original.LigerFusedLinearGRPOLoss(compiled=False, **settings)
    return (call(loss, batch, scale, **more) for loss in (LigerFusedLinearGRPOLoss(**settings), theirs))


def test_signatures():
    own, theirs = (
        [(p.name, p.default) for p in inspect.signature(loss).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        for loss in (LigerFusedLinearGRPOLoss, original.LigerFusedLinearGRPOLoss)
    )
    assert own == theirs
    calls = [
        inspect.signature(loss.forward).parameters.values()
        for loss in (LigerFusedLinearGRPOLoss, original.LigerFusedLinearGRPOLoss)
    ]
    assert [(p.name, p.default) for p in calls[0]] == [(p.name, p.default) for p in calls[1]]
    assert {name: getattr(LigerFusedLinearGRPOLoss(), name) for name, _ in own} == dict(own)


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03}
SETTINGS = [
    {},
    {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.15, "delta": 1.1},
    {"loss_type": "bnpo", "temperature": 0.7, "chunk_size": 2},
    {"loss_type": "dr_grpo", "max_completion_length": 11},
    {"loss_type": "dapo", "use_bias_correction_kl": True, "beta": 0.5},
    {"loss_type": "cispo", "epsilon_high": 1.05, "use_bias_correction_kl": True},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    {"loss_type": "vespo"},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.0, "use_bias_correction_kl": True, "beta": 0.5},
    {"loss_type": "grpo", **SEQUENCE},
    {"loss_type": "bnpo", "use_bias_correction_kl": True, "beta": 0.5, **SEQUENCE},
    {"loss_type": "dapo", **SEQUENCE, "delta": 1.01},
    {"loss_type": "dr_grpo", "max_completion_length": 11, **SEQUENCE},
    {"loss_type": "luspo", "beta": 0.0, "use_ref_model": False, **SEQUENCE},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_loss_types(settings, bias):
    batch = make_batch(bias=bias, reference="logprob" if settings.get("use_ref_model", True) else None)
    ours, theirs = both(batch, 1.7, **settings)
    assert_equal(ours, theirs)
    assert theirs[0] != 0
    clips = settings.get("loss_type") not in ("sapo", "vespo")
    assert (theirs[1][-1] > 0) == clips  # the sizes of the ratios reach what is compared


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo", "vespo"])
def test_the_reference_as_hidden_states(loss_type):
    batch = make_batch(reference="head")
    assert_equal(*both(batch, loss_type=loss_type, beta=0.3, temperature=1.3))


# no divergence: without a reference the policy is its own, beta = 0 needs none; and the first step after sampling, where all ratios are 1
def test_without_a_reference_or_an_old_policy():
    batch = make_batch(reference=None)
    ours, theirs = both(batch, use_ref_model=False)
    assert_equal(ours, theirs)
    assert len(ours[1]) == 2
    assert ours[1][0] == 0
    ours, theirs = both(batch, use_ref_model=False, beta=0.0)
    assert_equal(ours, theirs)
    assert len(ours[1]) == 1
    assert_equal(*both(make_batch(), beta=0.0))
    for loss_type in ("dapo", "vespo"):
        assert_equal(*both(make_batch(), more={"old_per_token_logps": None}, loss_type=loss_type))


# the sampler's ratio a completion in both shapes, and a token: 1 at padding, as TRL makes it
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "sapo", "vespo", "luspo"])
@pytest.mark.parametrize("shape", ["B", "B1", "BT"])
def test_the_ratio_of_the_sampler(loss_type, shape):
    more = {"importance_sampling_level": "sequence", "beta": 0.0, "use_ref_model": False}
    settings = {"loss_type": loss_type, **(more if loss_type == "luspo" else {})}
    batch = make_batch(reference=None if loss_type == "luspo" else "logprob")
    ratio = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).exp()
    ratio[0, 2] = 0.0  # masked out
    ratio = torch.where(batch["attention_mask"] == 1, ratio, 1)
    ratio = {"B": ratio[:, 0], "B1": ratio[:, :1], "BT": ratio}[shape]
    if (loss_type, shape) == ("luspo", "BT"):
        with pytest.raises(ValueError, match=r"vllm_is_ratio: expected \[B\] or \[B, 1\]"):
            call(LigerFusedLinearGRPOLoss(**settings), batch, vllm_is_ratio=ratio)
        return
    assert_equal(*both(batch, more={"vllm_is_ratio": ratio}, **settings))


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
@pytest.mark.parametrize("count", [57, 57.0, torch.tensor(57), 0])
def test_the_tokens_of_the_step(loss_type, count):
    assert_equal(*both(make_batch(), more={"num_items_in_batch": count}, loss_type=loss_type))


def test_processes(monkeypatch):
    """Two processes that hold the same batch, as far as both losses can see."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda count, op=None: count.mul_(3))
    batch = make_batch()
    for count in (None, 57, torch.tensor(57)):
        ours, theirs = both(batch, more={"num_items_in_batch": count})
        assert_equal(ours, theirs)


# one token a completion; more tokens than a tile; a vocabulary that is no multiple of a block
@pytest.mark.parametrize(("B", "T", "D", "V"), [(5, 1, 8, 33), (4, 41, 24, 700), (3, 7, 40, 129)])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_ragged_sizes(B, T, D, V, loss_type):
    batch = make_batch(B, T, D, V)
    assert_equal(*both(batch, loss_type=loss_type))


def test_inputs_that_are_not_contiguous():
    batch = make_batch()
    plain = call(LigerFusedLinearGRPOLoss(), batch)
    strided = dict(batch)
    for name in ("_input", "ref_per_token_logps", "old_per_token_logps"):
        strided[name] = batch[name].transpose(0, 1).contiguous().transpose(0, 1)
    strided["lin_weight"] = batch["lin_weight"].T.contiguous().T
    strided["advantages"] = torch.stack([batch["advantages"]] * 2, -1)[:, 0]
    assert_equal(call(LigerFusedLinearGRPOLoss(), strided), plain, 1e-6)


@pytest.mark.parametrize("trained", [("_input",), ("lin_weight",), ("bias",), ("_input", "bias")], ids=str)
def test_only_what_trains_gets_a_gradient(trained):
    batch = make_batch()
    whole = call(original.LigerFusedLinearGRPOLoss(compiled=False), batch)
    some = call(LigerFusedLinearGRPOLoss(), batch, trained=trained)
    assert_equal(some, (*whole[:2], {name: whole[2][name] for name in trained}))


def test_bf16_is_nearer_the_truth():
    batch = make_batch(T=30, D=32, V=500)
    rounded = {n: v.bfloat16() if n in LEAVES else v for n, v in batch.items()}
    wide = {n: v.float() if n in LEAVES else v for n, v in rounded.items()}
    _, truth = both(wide)
    found, theirs = both(rounded)
    assert abs(found[0] - truth[0]) <= abs(theirs[0] - truth[0])
    for name, grad in found[2].items():
        assert grad.dtype == torch.bfloat16
        error, their_error = ((g.float() - truth[2][name]).norm() for g in (grad, theirs[2][name]))
        assert error <= their_error * 1.02, name


@pytest.mark.parametrize("settings", [{}, {"loss_type": "vespo"}, {"loss_type": "grpo", **SEQUENCE}], ids=str)
def test_what_lies_at_padding_is_never_read(settings):
    batch = make_batch()
    plain = call(LigerFusedLinearGRPOLoss(**settings), batch, vllm_is_ratio=torch.ones(5, 8))
    padding = batch["attention_mask"] == 0
    other = batch | {
        name: batch[name].masked_fill(padding, torch.nan) for name in ("ref_per_token_logps", "old_per_token_logps")
    }
    other["_input"] = batch["_input"].masked_fill(padding[..., None], 3e4)
    other["selected_token_ids"] = batch["selected_token_ids"].masked_fill(padding, -1)
    ratio = torch.ones(5, 8).masked_fill(padding, 7.0)
    found = call(LigerFusedLinearGRPOLoss(**settings), other, vllm_is_ratio=ratio)
    torch.testing.assert_close(found, plain)
    assert not found[2]["_input"][padding].any()


def test_padding_costs_no_matrix_work():
    batch = make_batch(B=4, T=512, D=64, V=1000, reference="head")
    batch["attention_mask"] = (torch.arange(512) < 64).expand(4, 512)
    with FlopCounter() as counted:
        call(LigerFusedLinearGRPOLoss(backend="reference"), batch, trained=("_input",))
    assert 0 < counted.flop < 5 * (2 * 4 * 64 * 64 * 1000)  # a forward of either model, logits again, d_hidden


def test_kernel_settings_are_passed_on():
    batch = make_batch(bias=False)
    exact = call(LigerFusedLinearGRPOLoss(), batch)
    for settings in ({"backend": "reference"}, {"max_workspace_mb": 1}, {"gradient": Routed(tolerance=0.0)}):
        assert_equal(call(LigerFusedLinearGRPOLoss(**settings), batch), exact)
    with pytest.raises(ValueError, match="gradient"):
        call(LigerFusedLinearGRPOLoss(gradient="fast"), batch)


def test_masks_of_other_dtypes():
    batch = make_batch()
    plain = call(LigerFusedLinearGRPOLoss(), batch)
    for dtype in (torch.bool, torch.float32):
        torch.testing.assert_close(
            call(LigerFusedLinearGRPOLoss(), batch, attention_mask=batch["attention_mask"].to(dtype)), plain
        )


REFUSED = [
    ({"loss_type": "ppo"}, {}, "loss_type: expected one of grpo"),
    ({"importance_sampling_level": "group"}, {}, "importance_sampling_level: expected one of token"),
    ({"loss_type": "cispo", **SEQUENCE}, {}, "importance_sampling_level: expected 'token' with loss_type='cispo'"),
    ({"loss_type": "luspo"}, {}, "importance_sampling_level: expected 'sequence' with loss_type='luspo'"),
    ({"loss_type": "luspo", **SEQUENCE}, {}, "beta: expected 0 with loss_type='luspo'"),
    ({"loss_type": "sapo", "delta": 2.0}, {}, "delta: expected None, as loss_type='sapo' would ignore it"),
    ({"delta": -1.0}, {}, "delta: expected a number above 0"),
    ({"beta": -0.1}, {}, "beta: expected a number of at least 0"),
    ({"epsilon_low": -0.1}, {}, "epsilon_low: expected a number of at least 0"),
    ({"sapo_temperature_neg": 0.0}, {}, "sapo_temperature_neg: expected a number above 0"),
    ({"temperature": 0.0}, {}, "temperature: expected a number above 0"),
    ({"use_bias_correction_kl": True, "beta": 0.0}, {}, "use_bias_correction_kl: expected False"),
    ({"loss_type": "dr_grpo"}, {}, "max_completion_length: expected a whole number above 0 .*, got None"),
    ({"use_ref_model": False}, {}, "ref_per_token_logps, ref_input: expected None with use_ref_model=False"),
    ({}, {"ref_per_token_logps": None}, "ref_per_token_logps, ref_input: expected one of the two"),
    ({}, {"ref_input": torch.zeros(5, 8, 16)}, "ref_per_token_logps, ref_input: expected one of the two"),
    ({}, {"ref_per_token_logps": None, "ref_input": torch.zeros(5, 8, 16)}, "ref_weight: expected the head"),
    (
        {},
        {"ref_per_token_logps": None, "ref_input": torch.zeros(5, 8, 16), "ref_weight": torch.zeros(60, 16)},
        "ref_weight: expected 61 rows, the vocabulary of lin_weight, got 60",
    ),
    ({}, {"ref_per_token_logps": torch.zeros(5)}, r"ref_per_token_logps: expected \[5, 8\], got \[5\]"),
    ({}, {"old_per_token_logps": torch.zeros(40)}, r"old_per_token_logps: expected \[5, 8\], got \[40\]"),
    ({}, {"vllm_is_ratio": torch.zeros(8)}, r"vllm_is_ratio: expected \[5\] or \[5, 1\] or \[5, 8\], got \[8\]"),
    ({}, {"advantages": torch.zeros(5, 8)}, r"advantages: expected \[5\], got \[5, 8\]"),
    ({}, {"attention_mask": torch.full((5, 8), 0.5)}, "attention_mask: expected 0 and 1"),
    ({}, {"attention_mask": torch.ones(5)}, r"attention_mask: expected \[5, 8\]"),
    ({}, {"_input": torch.zeros(40, 16)}, "_input, selected_token_ids: expected"),
]


@pytest.mark.parametrize(("settings", "more", "match"), REFUSED)
def test_what_is_refused(settings, more, match):
    with pytest.raises(ValueError, match=match):
        call(LigerFusedLinearGRPOLoss(**settings), make_batch(), **more)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"loss_type": "dr_grpo", "max_completion_length": 0},
            "max_completion_length: expected a whole number above 0",
        ),
        ({"loss_type": "cispo", "epsilon_high": 0.0}, "epsilon_high: expected a number above 0 for loss_type='cispo'"),
        ({"loss_type": "vespo", "vespo_k_neg": -1.0}, "vespo_k_neg: expected a number of at least 0, got -1.0"),
        ({"beta": float("inf")}, "beta: expected a number of at least 0, got inf"),
        ({"temperature": float("nan")}, "temperature: expected a number above 0, got nan"),
    ],
)
def test_settings_are_refused_when_they_are_given(settings, match):
    with pytest.raises(ValueError, match=match):
        LigerFusedLinearGRPOLoss(**settings)


def test_a_clip_below_no_ratio():
    """1 - epsilon_low below 0 holds none, as in Liger."""
    assert_equal(*both(make_batch(), loss_type="grpo", epsilon_low=1.5))


def test_ratios_that_overflow_leave_all_numbers_finite():
    """Old policy and reference 800 nats away, either side: e^800 is beyond fp64."""
    for old, reference in ((-800.0, 800.0), (800.0, -800.0)):
        batch = make_batch()
        batch["old_per_token_logps"] += old
        batch["ref_per_token_logps"] += reference
        for settings in ({}, SEQUENCE, {"loss_type": "vespo"}):
            loss, metrics, grads = call(LigerFusedLinearGRPOLoss(use_bias_correction_kl=True, **settings), batch)
            assert all(value.isfinite().all() for value in (loss, *metrics, *grads.values()))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
def test_a_mask_with_no_token(loss_type):
    batch = make_batch()
    for name in ("ref_per_token_logps", "old_per_token_logps"):
        batch[name] = torch.full_like(batch[name], torch.nan)
    loss = LigerFusedLinearGRPOLoss(loss_type=loss_type, max_completion_length=8)
    value, metrics, grads = call(loss, batch, attention_mask=torch.zeros(5, 8))
    assert value == 0
    assert all(metric == 0 for metric in metrics)
    assert not any(grad.any() for grad in grads.values())
