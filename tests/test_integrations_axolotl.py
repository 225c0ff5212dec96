"""The Axolotl plugin on a stand-in of Axolotl's BasePlugin and of the TRL that it brings; tests/check_axolotl.py runs the real ones."""

import importlib
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from trainer_fixtures import make_model

from isdaa_kernels import Routed
from isdaa_kernels.testing import dense_logprob, make_sample

VERSIONS = {"axolotl": "0.21.0", "trl": "1.14.1", "transformers": "5.20.1"}


class RL(str, Enum):
    """Like Axolotl's: its str() is no value."""

    DPO = "dpo"
    KTO = "kto"
    GRPO = "grpo"


class Config(SimpleNamespace):
    """Like Axolotl's: what is not set is None."""

    def __getattr__(self, name: str) -> None:
        return None


@pytest.fixture
def axolotl(monkeypatch) -> ModuleType:
    """Our module, imported beside stand-ins of Axolotl's and TRL 1.14's; both are gone afterwards."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"__init__": lambda self: None})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    for name in ("trl.trainer.dpo_trainer", "trl.trainer.kto_trainer"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "_ChunkedLogProbFunction", "theirs", raising=False)
    monkeypatch.setattr("isdaa_kernels.integrations.patching.version", VERSIONS.__getitem__)
    ours = "isdaa_kernels.integrations.axolotl"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    yield importlib.import_module(ours)
    sys.modules.pop(ours)


def heads() -> list[object]:
    return [sys.modules[f"trl.trainer.{name}"]._ChunkedLogProbFunction for name in ("dpo_trainer", "kto_trainer")]


@pytest.mark.parametrize("rl", [RL.DPO, "ipo", RL.KTO])
def test_preference_training_gets_our_head_until_the_model_is_unloaded(axolotl, rl):
    plugin, cfg = axolotl.ISDAAPlugin(), Config(rl=rl)
    plugin.pre_model_load(cfg)
    plugin.post_model_load(cfg, object())
    plugin.pre_model_load(cfg)  # of the reference
    assert len(plugin.patches) == 1
    assert "theirs" not in heads()
    arguments = plugin.get_training_args(cfg)
    assert arguments["use_liger_kernel"] is True
    assert set(arguments["liger_kernel_config"].values()) == {False}
    plugin.post_train_unload(cfg)
    assert heads() == ["theirs", "theirs"]


def test_what_a_run_that_failed_has_left_is_undone_by_the_next(axolotl):
    model = make_model()
    axolotl.ISDAAPlugin().pre_model_load(Config(rl=RL.DPO))  # and no more of it
    plugin = axolotl.ISDAAPlugin()
    with pytest.raises(NotImplementedError, match="got 'grpo'"):
        plugin.pre_model_load(Config(rl=RL.GRPO))
    assert heads() == ["theirs", "theirs"]
    plugin.pre_model_load(Config(rl=RL.DPO))
    with pytest.raises(ValueError, match="dpo_use_liger_kernel"):
        plugin.pre_model_load(Config(rl=RL.DPO, dpo_use_liger_kernel=False))
    plugin.pre_model_load(Config())
    plugin.post_model_load(Config(), model)
    plugin.pre_model_load(Config(rl=RL.KTO))
    assert "forward" not in vars(model)
    assert "theirs" not in heads()
    plugin.pre_model_load(Config(isdaa_kernels=False))
    assert heads() == ["theirs", "theirs"]


def test_liger_s_own_kernels_stay_where_they_were_asked_for(axolotl):
    assert axolotl.ISDAAPlugin().get_training_args(Config(rl=RL.DPO, dpo_use_liger_kernel=True)) is None


def test_tuning_patches_the_model(axolotl):
    plugin, cfg, model = axolotl.ISDAAPlugin(), Config(), make_model()
    ids = torch.arange(20).view(2, 10)
    expected = model(input_ids=ids, labels=ids).loss
    plugin.pre_model_load(cfg)
    plugin.post_model_load(cfg, model)
    assert plugin.get_training_args(cfg) is None
    output = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    assert not hasattr(output.logits, "shape")
    plugin.post_train_unload(cfg)
    assert "forward" not in vars(model)


def test_switched_off_it_does_nothing(axolotl):
    plugin, cfg, model = axolotl.ISDAAPlugin(), Config(rl=RL.GRPO, isdaa_kernels=False), make_model()
    plugin.pre_model_load(cfg)
    plugin.post_model_load(cfg, model)
    assert plugin.get_training_args(cfg) is None
    assert plugin.patches == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rl": RL.GRPO}, NotImplementedError, "rl: expected dpo, ipo, kto or none with isdaa_kernels, got 'grpo'"),
        ({"rl": "orpo"}, NotImplementedError, "got 'orpo'"),
        ({"reward_model": True}, NotImplementedError, "reward_model: "),
        ({"process_reward_model": True}, NotImplementedError, "process_reward_model: "),
        ({"rl": RL.DPO, "dpo_use_liger_kernel": False}, ValueError, "dpo_use_liger_kernel: expected true or nothing"),
        ({"isdaa_tolerance": 1e-3}, ValueError, "isdaa_tolerance: expected isdaa_gradient: routed"),
        ({"isdaa_backend": "nope"}, ValueError, "isdaa_backend: expected one of"),
        ({"rl": RL.DPO, "isdaa_max_workspace_mb": -1.0}, ValueError, "isdaa_max_workspace_mb: expected"),
        ({"isdaa_gradient": "routed", "isdaa_tolerance": -1.0}, ValueError, "isdaa_tolerance: expected"),
    ],
)
def test_what_is_not_supported_raises(axolotl, settings, error, message):
    with pytest.raises(error, match=message):
        axolotl.ISDAAPlugin().pre_model_load(Config(**settings))


@pytest.mark.parametrize("package", ["axolotl", "trl"])
def test_another_version_raises(axolotl, monkeypatch, package):
    monkeypatch.setattr("isdaa_kernels.integrations.patching.version", {**VERSIONS, package: "9.9"}.__getitem__)
    with pytest.raises(ImportError, match=rf"{package}: expected version .*, got 9\.9; pass isdaa_any_version: true"):
        axolotl.ISDAAPlugin().pre_model_load(Config(rl=RL.DPO))
    plugin = axolotl.ISDAAPlugin()
    plugin.pre_model_load(Config(rl=RL.DPO, isdaa_any_version=True))
    plugin.post_train_unload(Config())


def test_the_keys_are_a_model_that_axolotl_finds_by_name(axolotl):
    module, name = axolotl.ISDAAPlugin().get_input_args().rsplit(".", 1)
    keys = getattr(sys.modules[module], name)
    assert keys().isdaa_kernels is True
    with pytest.raises(ValueError, match="isdaa_gradient"):
        keys(isdaa_gradient="nearly")
    found = axolotl.kernel_settings(Config(isdaa_gradient="routed", isdaa_tolerance=1e-3, isdaa_backend="reference"))
    assert found == {"gradient": Routed(tolerance=1e-3), "max_workspace_mb": None, "backend": "reference"}
    assert axolotl.kernel_settings(Config(**keys().model_dump()))["gradient"] == "exact"


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_gives_log_probs_and_entropies_with_gradients(axolotl, bias):
    """Called as TRL 1.14 calls its own, by position."""
    sample = make_sample(7, 16, 50)
    hidden, weight = sample.hidden.requires_grad_(), sample.weight.requires_grad_()
    bias = torch.linspace(-1, 1, 50) if bias else None
    apply = axolotl.fused_head({"gradient": "exact"}).apply
    logprob, entropy = apply(hidden, weight, bias, sample.targets, 0.7, 8192, None, 2.0)
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * 2 / 0.7
    expected = logits.log_softmax(1)
    torch.testing.assert_close(logprob, expected.gather(1, sample.targets[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(1), rtol=1e-4, atol=1e-4)
    ours = torch.autograd.grad(logprob.sum(), (hidden, weight), retain_graph=True)
    theirs = torch.autograd.grad(expected.gather(1, sample.targets[:, None]).sum(), (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    plain, _ = apply(hidden, weight, None, sample.targets, 1.0, 8192)
    torch.testing.assert_close(plain, dense_logprob(hidden, weight, sample.targets), rtol=1e-4, atol=1e-5)
