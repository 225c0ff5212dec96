"""The drop-ins against liger-kernel's own losses (its PyTorch path, not compiled), and against PyTorch where its own needs a GPU.

B rows of T tokens, D hidden size, V vocabulary.
"""

import inspect
from importlib.metadata import version

import liger_kernel.chunked_loss as original
import pytest
import torch
import torch.nn.functional as F
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as OriginalCrossEntropy
from torch import nn

from isdaa_kernels import LMHead, Routed
from isdaa_kernels.integrations import liger
from isdaa_kernels.testing import FlopCounter

TESTED = "0.8.2"
NAMES = ("DPO", "SimPO", "CPO", "ORPO", "KTO")


def make_batch(B=6, T=9, D=16, V=61, bias=True, dtype=torch.float32, seed=0, device="cpu"):
    """Rows of unequal length behind prompts of unequal length, and a reference."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    target = torch.randint(V, (B, T), generator=generator)
    for row in range(B):
        target[row, : row % 3] = -100
        target[row, T - row % 4 :] = -100
    batch = {"_input": normal(B, T, D), "lin_weight": normal(V, D) / 2, "target": target}
    batch |= {"bias": normal(V) if bias else None}
    batch |= {"ref_input": normal(B, T, D), "ref_weight": normal(V, D) / 2, "ref_bias": normal(V) if bias else None}
    return batch


def call(loss, batch, scale=1.0, trained=("_input", "lin_weight", "bias"), **more):
    """(loss, outputs, gradients by name) with fresh leaves."""
    names = inspect.signature(loss.forward).parameters
    arguments = {name: value for name, value in batch.items() if name in names} | more
    leaves = {n: arguments[n].clone().requires_grad_() for n in trained if arguments[n] is not None}
    value, outputs = loss(**arguments | leaves)
    (scale * value).backward()
    return value.detach(), outputs, {name: leaf.grad for name, leaf in leaves.items()}


def assert_equal(ours, theirs, tolerance=1e-5):
    """Values to the tolerance, gradients to it relative to the largest entry of each."""
    (loss, outputs, grads), (their_loss, their_outputs, their_grads) = ours, theirs
    torch.testing.assert_close(loss, their_loss, rtol=tolerance, atol=1e-6)
    assert len(outputs) == len(their_outputs)
    for value, their_value in zip(outputs, their_outputs, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, their_value, rtol=tolerance, atol=1e-5)
    for name, grad in grads.items():
        error = (grad - their_grads[name]).abs().max() / their_grads[name].abs().max()
        assert error < tolerance, (name, error)


def both(name, **settings):
    ours, theirs = getattr(liger, f"LigerFusedLinear{name}Loss"), getattr(original, f"LigerFusedLinear{name}Loss")
    return ours(**settings), theirs(**settings, compiled=False)


def test_the_version_that_is_compared_with():
    assert version("liger-kernel") == TESTED


@pytest.mark.parametrize("name", [*NAMES, "CrossEntropy"])
def test_signatures(name):
    theirs = OriginalCrossEntropy if name == "CrossEntropy" else getattr(original, f"LigerFusedLinear{name}Loss")
    ours = getattr(liger, f"LigerFusedLinear{name}Loss")
    own, other = (
        [(p.name, p.default) for p in inspect.signature(loss).parameters.values() if p.kind is not p.KEYWORD_ONLY]
        for loss in (ours, theirs)
    )
    assert own == other
    calls = [inspect.signature(loss.forward).parameters.values() for loss in (ours, theirs)]
    assert [(p.name, p.default) for p in calls[0]] == [(p.name, p.default) for p in calls[1]]
    settings = {name: value for name, value in own if name not in ("loss_type", "ce_weight")}
    assert {n: getattr(ours(), n) for n in settings} == settings


DPO = [
    {},
    {"loss_type": "hinge", "beta": 0.7},
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    {"loss_type": "nca_pair", "beta": 0.3},
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "robust"},
    {"loss_type": "bco_pair"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "discopop", "beta": 0.05, "discopop_tau": 0.2},
    {"average_log_prob": True, "beta": 2.0},
    {"use_ref_model": False},
    {"compute_nll_loss": True, "alpha": 0.3, "chunk_size": 2},
    {"compute_nll_loss": True, "average_log_prob": True, "loss_type": "sppo_hard", "ignore_index": 7},
]


@pytest.mark.parametrize("settings", DPO, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dpo(settings, bias):
    batch = make_batch(bias=bias)
    if "ignore_index" in settings:
        batch["target"] = torch.where(batch["target"] == -100, settings["ignore_index"], batch["target"])
    ours, theirs = both("DPO", **settings)
    assert_equal(call(ours, batch, 1.7), call(theirs, batch, 1.7))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SimPO", {}),
        ("SimPO", {"beta": 2.0, "gamma": 1.1, "label_smoothing": 0.1, "alpha": 0.5, "chunk_size": 3}),
        ("SimPO", {"compute_nll_loss": False}),
        ("CPO", {}),
        ("CPO", {"average_log_prob": True, "beta": 2.0, "label_smoothing": 0.2}),
        ("CPO", {"compute_nll_loss": False, "alpha": 3.0}),
        ("ORPO", {}),
        ("ORPO", {"beta": 0.5, "compute_nll_loss": False}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_reference(name, settings, bias):
    batch = make_batch(bias=bias)
    ours, theirs = both(name, **settings)
    assert_equal(call(ours, batch, 0.3), call(theirs, batch, 0.3))


def test_orpo_with_other_targets_for_the_nll():
    batch = make_batch()
    generator = torch.Generator().manual_seed(5)
    nll_target = torch.where(batch["target"] == -100, torch.randint(61, (6, 9), generator=generator), batch["target"])
    nll_target[1, :4] = -100
    ours, theirs = both("ORPO")
    assert_equal(call(ours, batch, nll_target=nll_target), call(theirs, batch, nll_target=nll_target))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_ref_model": True}, {"use_ref_model": True, "average_log_prob": True, "beta": 2.0, "ignore_index": 7}],
    ids=str,
)
@pytest.mark.parametrize("kl", [None, torch.tensor(0.4), torch.tensor([0.4])], ids=("none", "scalar", "row"))
@pytest.mark.parametrize("bias", [True, False])
def test_kto(settings, kl, bias):
    batch = make_batch(B=5, bias=bias)
    if "ignore_index" in settings:
        batch["target"] = torch.where(batch["target"] == -100, settings["ignore_index"], batch["target"])
    labels = torch.tensor([True, False, False, True, True])
    ours, theirs = both("KTO", **settings)
    more = {"preference_labels": labels, "kl": kl}
    assert_equal(call(ours, batch, 0.6, **more), call(theirs, batch, 0.6, **more))


# a vocabulary that is no multiple of a block, one pair, one token, wide rows
@pytest.mark.parametrize(("B", "T", "D", "V"), [(2, 1, 8, 33), (4, 30, 24, 700), (10, 7, 40, 129)])
@pytest.mark.parametrize("name", ["DPO", "ORPO"])
def test_ragged_sizes(name, B, T, D, V):
    batch = make_batch(B, T, D, V)
    batch["target"][:, -1] = 3
    ours, theirs = both(name)
    assert_equal(call(ours, batch), call(theirs, batch))


def test_inputs_that_are_not_contiguous():
    batch = make_batch()
    plain = call(liger.LigerFusedLinearDPOLoss(), batch)
    strided = dict(batch)
    for name in ("_input", "ref_input"):
        strided[name] = batch[name].transpose(0, 1).contiguous().transpose(0, 1)
    strided["lin_weight"] = batch["lin_weight"].T.contiguous().T
    strided["target"] = torch.stack([batch["target"]] * 2, -1)[..., 0]
    assert_equal(call(liger.LigerFusedLinearDPOLoss(), strided), plain, 1e-6)


@pytest.mark.parametrize("trained", [("_input",), ("lin_weight",), ("bias",), ("_input", "bias")], ids=str)
def test_only_what_trains_gets_a_gradient(trained):
    batch = make_batch()
    ours, theirs = both("DPO")
    whole = call(theirs, batch)
    some = call(ours, batch, trained=trained)
    assert_equal(some, (*whole[:2], {name: whole[2][name] for name in trained}))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_nearer_the_truth(name):
    batch = make_batch(T=30, D=32, V=500, dtype=torch.bfloat16)
    more = {"preference_labels": torch.arange(6) % 2 == 0} if name == "KTO" else {}
    wide = {n: v if v is None or not v.is_floating_point() else v.double().float() for n, v in batch.items()}
    ours, theirs = both(name)
    truth = call(theirs, wide, **more)
    found, their_found = call(ours, batch, **more), call(theirs, batch, **more)
    assert found[0].dtype == torch.float32
    assert abs(found[0] - truth[0]) <= abs(their_found[0] - truth[0]) + 1e-5
    for key, grad in found[2].items():
        assert grad.dtype == torch.bfloat16
        error, their_error = ((g.float() - truth[2][key]).norm() for g in (grad, their_found[2][key]))
        assert error <= their_error * 1.02, key
    for value, true in zip(found[1], truth[1], strict=True):
        torch.testing.assert_close(value, true, rtol=2e-3, atol=2e-3)


def test_autocast():
    batch = make_batch()
    ours = liger.LigerFusedLinearDPOLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, grads = call(ours, batch)
    assert loss.dtype == torch.float32
    assert grads["lin_weight"].dtype == torch.float32
    torch.testing.assert_close(loss, call(ours, batch)[0], rtol=2e-2, atol=2e-2)


def test_a_row_without_scored_tokens():
    batch = make_batch()
    batch["target"][4] = -100
    ours, theirs = both("DPO")
    assert_equal(call(ours, batch), call(theirs, batch))  # of sums it has the log-prob 0
    ours, theirs = both("DPO", average_log_prob=True)
    assert call(theirs, batch)[0].isnan()
    loss, _, grads = call(ours, batch)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["_input"][[1, 4]].any()  # its pair counts for nothing
    assert grads["_input"][[0, 3]].any()


def test_what_lies_at_ignored_tokens_does_not_reach_the_gradient():
    batch = make_batch()
    plain = call(liger.LigerFusedLinearCPOLoss(), batch)
    other = batch | {"_input": torch.where(batch["target"][..., None] == -100, 3e4, batch["_input"])}
    loss, _, grads = call(liger.LigerFusedLinearCPOLoss(), other)
    torch.testing.assert_close(loss, plain[0])
    torch.testing.assert_close(grads, plain[2])


def test_ignored_tokens_cost_no_matrix_work():
    batch = make_batch(B=4, T=512, D=64, V=1000)
    batch["target"][:, 64:] = -100
    batch["target"][:, :64] = 1
    loss = liger.LigerFusedLinearSimPOLoss(backend="reference")
    with FlopCounter() as counted:
        call(loss, batch, trained=("_input",))
    assert 0 < counted.flop < 4 * (2 * 4 * 64 * 64 * 1000)


def test_kernel_settings_are_passed_on():
    batch = make_batch(bias=False)
    exact = call(liger.LigerFusedLinearDPOLoss(), batch)
    for settings in ({"backend": "reference"}, {"max_workspace_mb": 1}, {"gradient": Routed(tolerance=0.0)}):
        assert_equal(call(liger.LigerFusedLinearDPOLoss(**settings), batch), exact)
    with pytest.raises(ValueError, match="gradient"):
        call(liger.LigerFusedLinearDPOLoss(gradient="fast"), batch)


REFUSED = [
    ("DPO", {"loss_type": "ipo"}, {}, "loss_type"),
    ("DPO", {"loss_type": "sigmoid", "label_smoothing": 0.1}, {}, "label_smoothing"),
    ("DPO", {}, {"ref_input": None}, "ref_input"),
    ("DPO", {}, {"target": torch.zeros(5, 9, dtype=torch.int64), "_input": torch.zeros(5, 9, 16)}, "rows"),
    ("DPO", {}, {"_input": torch.zeros(54, 16), "target": torch.zeros(54, dtype=torch.int64)}, "_input, target"),
    ("SimPO", {"label_smoothing": 0.7}, {}, "label_smoothing"),
    ("CPO", {"label_smoothing": -0.1}, {}, "label_smoothing"),
    ("DPO", {"beta": 0.0}, {}, "beta"),
    ("SimPO", {"beta": -1.0}, {}, "beta"),
    ("ORPO", {"beta": -1.0}, {}, "odds_weight"),
    ("KTO", {}, {}, "preference_labels"),
    ("KTO", {}, {"preference_labels": torch.ones(6)}, "preference_labels"),
    ("KTO", {}, {"preference_labels": torch.ones(6) > 0, "kl": torch.zeros(6)}, "kl"),
    ("KTO", {"use_ref_model": True}, {"preference_labels": torch.ones(6) > 0, "ref_weight": None}, "ref_weight"),
    (
        "DPO",
        {},
        {"ref_weight": torch.zeros(60, 16)},
        "ref_weight: expected 61 rows, the vocabulary of lin_weight, got 60",
    ),
    (
        "KTO",
        {"use_ref_model": True},
        {"preference_labels": torch.ones(6) > 0, "ref_weight": torch.zeros(62, 16)},
        "ref_weight: expected 61 rows, the vocabulary of lin_weight, got 62",
    ),
]


@pytest.mark.parametrize(("name", "settings", "more", "match"), REFUSED)
def test_what_is_refused(name, settings, more, match):
    with pytest.raises(ValueError, match=match):
        call(getattr(liger, f"LigerFusedLinear{name}Loss")(**settings), make_batch(), **more)


@pytest.mark.parametrize("weight", [None, torch.zeros(60, 16)], ids=["none", "another vocabulary"])
def test_a_reference_is_refused_before_any_work(weight):
    for name, more in (("DPO", {}), ("KTO", {"preference_labels": torch.ones(6) > 0})):
        loss = getattr(liger, f"LigerFusedLinear{name}Loss")(use_ref_model=True, backend="reference")
        with FlopCounter() as counted, pytest.raises(ValueError, match="ref_weight"):
            call(loss, make_batch(), ref_weight=weight, **more)
        assert counted.flop == 0


@pytest.mark.parametrize(("loss_type", "smoothings"), [("exo_pair", (0.0, 0.6, -0.1)), ("robust", (0.5, -0.1))])
def test_smoothing_out_of_range_is_refused_by_the_constructor(loss_type, smoothings):
    for smoothing in smoothings:
        with pytest.raises(ValueError, match=rf"label_smoothing: .* loss_type '{loss_type}', got {smoothing}"):
            liger.LigerFusedLinearDPOLoss(loss_type=loss_type, label_smoothing=smoothing)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    batch = {
        key: value[:0] if key in ("_input", "ref_input", "target") else value for key, value in make_batch().items()
    }
    more = {"preference_labels": torch.zeros(0, dtype=torch.bool)} if name == "KTO" else {}
    loss, outputs, grads = call(getattr(liger, f"LigerFusedLinear{name}Loss")(), batch, **more)
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())
    assert outputs[0].numel() == (1 if name == "KTO" else 0)
    assert liger.logit_sums(batch["_input"], LMHead(batch["lin_weight"], batch["bias"])).shape == (0,)


def dense_cross_entropy(_input, lin_weight, target, bias, ce_weight=None, lse_square_scale=0.0, label_smoothing=0.0,
                        reduction="mean", softcap=None, use_token_scaling=False, ignore_index=-100):  # fmt: skip
    """(loss, z-loss, accuracy) as the documentation of `LigerFusedLinearCrossEntropyLoss` defines them."""
    z = F.linear(_input, lin_weight, bias).float()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    scored = target != ignore_index
    options = {"weight": ce_weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = F.cross_entropy(z, target, reduction="none", **options)
    squares = torch.where(scored, lse_square_scale * z.logsumexp(-1).square(), 0)
    correct = torch.where(scored, z.argmax(-1) == target, False).float()
    if reduction == "mean":
        of_class = torch.ones(z.shape[-1]) if ce_weight is None else ce_weight
        loss = loss / of_class[target[scored]].sum()
        squares = squares / scored.sum()
    loss = loss + squares
    if use_token_scaling:
        p = z.softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0].detach()
        loss, squares = loss * p, squares * p
    if reduction == "none":
        return loss, squares, correct
    return loss.sum(), squares.sum(), correct.sum() / scored.sum()


CROSS_ENTROPY = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "softcap": 5.0},
    {"lse_square_scale": 1e-2},
    {"lse_square_scale": 1e-2, "label_smoothing": 0.2, "reduction": "sum"},
    {"use_token_scaling": True, "label_smoothing": 0.1},
    {"use_token_scaling": True, "reduction": "none", "lse_square_scale": 1e-2},
    {"ce_weight": torch.linspace(0.1, 2.0, 61)},
    {"ce_weight": torch.linspace(0.1, 2.0, 61), "lse_square_scale": 1e-2, "reduction": "none"},
    {"ce_weight": torch.linspace(0.1, 2.0, 61), "lse_square_scale": 1e-2},
    {"ignore_index": 7, "softcap": 20.0},
]


def flat(batch):
    return {"_input": batch["_input"].flatten(0, 1), "target": batch["target"].flatten(),
            "lin_weight": batch["lin_weight"], "bias": batch["bias"]}  # fmt: skip


@pytest.mark.parametrize("settings", CROSS_ENTROPY, ids=lambda s: ", ".join(f"{k}" for k in s) or "default")
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy(settings, bias):
    arguments = flat(make_batch(bias=bias))
    arguments["target"][arguments["target"] == -100] = settings.get("ignore_index", -100)
    loss = liger.LigerFusedLinearCrossEntropyLoss(**settings, return_z_loss=True, return_token_accuracy=True)
    results = []
    for function in (loss, lambda **a: dense_cross_entropy(**a, **settings)):
        leaves = {
            n: arguments[n].clone().requires_grad_()
            for n in ("_input", "lin_weight", "bias")
            if arguments[n] is not None
        }
        found = function(**arguments | leaves)
        value, squares, correct = (
            found if isinstance(found, tuple) else (found.loss, found.z_loss, found.token_accuracy)
        )
        (value * torch.linspace(0.5, 2.0, value.numel()).reshape(value.shape)).sum().backward()
        results.append((value.detach(), squares.detach(), correct, {n: leaf.grad for n, leaf in leaves.items()}))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)
    if not (settings.keys() & {"lse_square_scale"}):
        plain = liger.LigerFusedLinearCrossEntropyLoss(**settings)(**arguments)
        torch.testing.assert_close(plain, results[0][0])


def test_cross_entropy_without_targets():
    arguments = flat(make_batch())
    arguments["target"].fill_(-100)
    assert liger.LigerFusedLinearCrossEntropyLoss()(**arguments) == 0
    assert liger.LigerFusedLinearCrossEntropyLoss(ce_weight=torch.ones(61))(**arguments) == 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"return_predicted_tokens": True}, "return_predicted_tokens"),
        ({"accum_dtype": torch.bfloat16}, "accum_dtype"),
        ({"reduction": "batchmean"}, "reduction"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "ce_weight": torch.ones(61)}, "label_smoothing"),
        ({"ce_weight": torch.ones(60)}, "class weights"),
        ({"ce_weight": torch.ones(61, requires_grad=True)}, "class weights"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_cross_entropy_refuses(settings, match):
    with pytest.raises(ValueError, match=match):
        liger.LigerFusedLinearCrossEntropyLoss(**settings)(**flat(make_batch()))


def test_losses_are_modules():
    assert isinstance(liger.LigerFusedLinearDPOLoss(), nn.Module)
    assert not list(liger.LigerFusedLinearCrossEntropyLoss(ce_weight=torch.ones(61)).parameters())
