"""Our objectives beside the originals: TRL's trainers and Liger's losses, run on the CPU on logits that the tests make.

The trainers are made without their constructors, with a model that returns given logits; what is compared is the loss and its gradient by
every logit. Ours goes through `objective_of` and `linear_preference_loss` with the identity for a head: its hidden states are the logits.
Letters: B sequences (chosen, then rejected, then gold), T tokens of each, V vocabulary, P pairs.
"""

import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from isdaa_kernels import linear_preference_loss, preference_loss, shift_targets
from isdaa_kernels.objectives import OBJECTIVES
from isdaa_kernels.objectives.library_names import READ, SETTINGS
from isdaa_kernels.objectives.names import objective_of

pytestmark = pytest.mark.slow  # seconds to import

P, T, V = 4, 12, 7
LENGTHS = (5, 8, 3, 9, 7, 2, 6, 4, 5, 9, 4, 7)  # completions of chosen, rejected, gold


class Batch:
    """Right-padded sequences with prompts of 2 tokens or `prompt`, and logits of policy and reference, fp64."""

    def __init__(self, B: int = 2 * P, prompt: int = 2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.B = B
        self.input_ids = torch.randint(1, V, (B, T), generator=generator)
        place = torch.arange(T)
        ends = prompt + torch.tensor(LENGTHS[:B])[:, None]
        self.attention_mask = (place < ends).long()
        self.completion_mask = ((place >= prompt) & (place < ends)).long()
        self.labels = torch.where(self.completion_mask == 1, self.input_ids, -100)
        self.logits, self.reference = (
            1.5 * torch.randn(B, T, V, dtype=torch.float64, generator=generator) for _ in "ab"
        )

    def ours(self, named, **more) -> tuple[Tensor, Tensor]:
        """(loss, gradient by the logits) of an objective by its name elsewhere."""
        hidden = self.logits.reshape(-1, V).clone().requires_grad_()
        reference = self._token_logprob(self.reference).reshape(-1)
        needs = named.objective.needs
        loss, _ = linear_preference_loss(
            hidden,
            torch.eye(V, dtype=torch.float64),
            self._targets().reshape(-1),
            torch.arange(self.B + 1) * T,
            reference_logprob=reference[None] if "reference" in needs else None,
            backend="reference",
            **named.arguments(),
            **more,
        )
        (grad,) = torch.autograd.grad(loss, hidden)
        return loss.detach(), grad.view(self.B, T, V)

    def reference_sums(self) -> Tensor:
        return self._token_logprob(self.reference).sum(1)

    def _targets(self) -> Tensor:
        return shift_targets(self.labels)

    def _token_logprob(self, logits: Tensor) -> Tensor:
        targets = self._targets()
        logprob = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return torch.where(targets == -100, 0, logprob)


class Model(nn.Module):
    """Answers with given logits, and with what TRL's fused head makes of them, in `dtype`."""

    is_gradient_checkpointing = False

    def __init__(self, logits: Tensor, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.logits, self.dtype = logits, dtype

    def forward(self, *args, labels: Tensor | None = None, fused_lm_head: bool = False, **kwargs) -> SimpleNamespace:
        if not fused_lm_head:
            return SimpleNamespace(logits=self.logits)
        logits, labels = self.logits[:, :-1], labels[:, 1:]
        logprob = logits.log_softmax(-1)
        scored = labels != -100
        token = torch.where(scored, logprob.gather(-1, labels.clamp(min=0)[..., None])[..., 0], 0)
        return SimpleNamespace(
            log_probs=token.to(self.dtype),
            log_sum_sq_probs=(2 * logprob).logsumexp(-1).to(self.dtype),
            entropy=torch.zeros_like(token),
            mean_logits=torch.zeros_like(token),
            is_top1=scored,
        )


def defaults_of(config: type) -> dict:
    return {
        f.name: f.default_factory() if f.default is MISSING and f.default_factory is not MISSING else f.default
        for f in fields(config)
    }


def bare(trainer: type, model: nn.Module, **attributes):
    """A trainer of one process with these attributes and nothing else of its constructor."""
    own = object.__new__(trainer)
    own.__dict__.update(
        model=model,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=_same, gather_for_metrics=_same),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return own


def _same(value):
    return value


def theirs(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=tolerance, atol=0)
    scale = expected[1].abs().max()
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=tolerance * scale.item())
    assert scale > 0


# DPO


def trl_dpo(batch: Batch, loss_type: str | list[str], dtype=torch.float64, **settings) -> tuple[Tensor, Tensor]:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    values = defaults_of(DPOConfig) | settings
    loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
    logits = batch.logits.clone().requires_grad_()
    trainer = bare(
        DPOTrainer,
        Model(logits, dtype),
        ref_model=Model(batch.reference, dtype),
        precompute_ref_logps=False,
        args=SimpleNamespace(discopop_tau=values["discopop_tau"], gradient_checkpointing_kwargs=None),
        loss_types=loss_types,
        loss_weights=values["loss_weights"] or [1.0] * len(loss_types),
        **{
            name: values[name]
            for name in (
                "beta",
                "label_smoothing",
                "ld_alpha",
                "f_divergence_type",
                "f_alpha_divergence_coef",
                "use_weighting",
            )
        },
    )
    inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "completion_mask")}
    return theirs(trainer._compute_loss(trainer.model, inputs, False), logits)


SMOOTHED = {"label_smoothing": 0.15}
DPO_CASES = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.7}),
    ("sigmoid_norm", {"beta": 2.0}),
    ("hinge", {"beta": 0.4}),
    ("ipo", {"beta": 0.6}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("exo_pair", {"beta": 0.5, **SMOOTHED}),
    ("nca_pair", {"beta": 0.2}),
    ("robust", {}),
    ("robust", {"beta": 0.5, **SMOOTHED}),
    ("bco_pair", {"beta": 0.3}),
    ("sppo_hard", {"beta": 0.8}),
    ("aot", {"beta": 0.3}),
    ("aot", {"beta": 0.3, **SMOOTHED}),
    ("aot_unpaired", {"beta": 0.3}),
    ("aot_unpaired", {"beta": 0.3, **SMOOTHED}),
    ("apo_zero", {"beta": 0.5}),
    ("apo_down", {"beta": 0.5}),
    ("discopop", {}),
    ("discopop", {"beta": 0.5, "discopop_tau": 0.4}),
    ("sft", {}),
    ("sigmoid", {"beta": 0.3, "f_divergence_type": "forward_kl"}),
    ("sigmoid", {"beta": 0.3, "f_divergence_type": "js_divergence"}),
    ("sigmoid", {"beta": 0.3, "ld_alpha": 0.4}),
    ("hinge", {"beta": 0.1, "ld_alpha": 0.0}),
    ("ipo", {"beta": 0.6, "ld_alpha": 0.3}),
    ("aot", {"beta": 0.3, "ld_alpha": 0.3}),
    ("sigmoid", {"beta": 0.3, "use_weighting": True}),
    ("ipo", {"beta": 0.3, "use_weighting": True}),
    ("bco_pair", {"beta": 0.3, "use_weighting": True}),
    ("sigmoid", {"beta": 0.3, "use_weighting": True, "loss_weights": [0.5]}),
    ("sigmoid", {"beta": 0.3, "ld_alpha": 0.4, "loss_weights": [0.5]}),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    (["sigmoid", "sft"], {"loss_weights": [1.0, 0.5], "beta": 0.3}),
    (["sigmoid", "sft"], {"beta": 0.3, "f_divergence_type": "forward_kl"}),
    (["hinge", "nca_pair"], {"beta": 0.3, "ld_alpha": 0.6}),
    (["sigmoid", "ipo"], {"loss_weights": [1.0, -0.1], "beta": 0.3, "use_weighting": True}),
    # each takes the label smoothing or ignores it as it does alone
    (["sigmoid", "robust", "aot"], {"loss_weights": [1.0, 0.5, 2.0], "beta": 0.3, **SMOOTHED}),
    (["bco_pair", "aot_unpaired"], {"beta": 0.3}),
]


@pytest.mark.parametrize(("loss_type", "settings"), DPO_CASES)
def test_dpo_of_trl(loss_type, settings):
    batch = Batch()
    named = objective_of("trl", loss_type, **settings)
    assert_same(batch.ours(named), trl_dpo(batch, loss_type, **settings))


@pytest.mark.parametrize("coefficient", [0.5, 0.2, -0.6, 1.0, 1.7])
def test_alpha_divergence_of_trl(coefficient):
    """fp32, which TRL's clamp asks for."""
    batch = Batch()
    settings = {"beta": 0.2, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
    found = batch.ours(objective_of("trl", "sigmoid", **settings))
    assert_same(found, trl_dpo(batch, "sigmoid", torch.float32, **settings), 2e-5)


def test_every_loss_type_of_trl_is_run():
    run = {name for name, _ in DPO_CASES if isinstance(name, str)}
    from trl.trainer import dpo_trainer

    with pytest.raises(ValueError, match="Unknown loss type") as raised:
        trl_dpo(Batch(), "no such loss")
    names = set(str(raised.value).split("[")[1].split("]")[0].replace("'", "").split(", "))
    assert names == run, dpo_trainer.__file__


def test_trl_cannot_weigh_what_we_refuse_to():
    """The sum over a batch is one number for all pairs there, and is weighted in place."""
    with pytest.raises(RuntimeError):
        trl_dpo(Batch(), ["sigmoid", "sft"], use_weighting=True)


# Kahneman-Tversky


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("kto", {}),
        ("kto", {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
        ("apo_zero_unpaired", {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ],
)
@pytest.mark.parametrize("shift", [0.5, -3.0])  # the KL estimate is above 0, or held at 0
def test_kto_of_trl(loss_type, settings, shift):
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    batch = Batch()
    label = torch.arange(batch.B) % 3 > 0
    mismatched = torch.linspace(-1, 2, batch.B, dtype=torch.float64) + shift
    values = defaults_of(KTOConfig) | settings
    logits = batch.logits.clone().requires_grad_()
    trainer = bare(
        KTOTrainer,
        Model(logits),
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        _compute_kl_logps=lambda model, batch: mismatched,
        **{name: values[name] for name in ("beta", "desirable_weight", "undesirable_weight")},
    )
    inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "completion_mask")}
    inputs |= {"label": label, "ref_logps": batch.reference_sums(), "ref_KL_logps": torch.zeros_like(mismatched)}
    expected = theirs(trainer._compute_loss(trainer.model, inputs, False), logits)

    named = objective_of("trl", loss_type, **settings)
    given = {"mismatched": mismatched} if "mismatched" in named.objective.needs else {}
    assert_same(batch.ours(named, desirable=label, **given), expected)


# Without a reference: CPO and its kin, ORPO, TPO


def trl_concatenated(trainer: type, batch: Batch, **attributes) -> tuple[Tensor, Tensor]:
    """The loss of a trainer that joins chosen and rejected inputs itself."""
    logits = batch.logits.clone().requires_grad_()
    own = bare(trainer, Model(logits), is_encoder_decoder=False, pad_token_id=0, padding_value=0, **attributes)
    inputs = {}
    for half, name in enumerate(("chosen", "rejected")):
        rows = slice(half * P, (half + 1) * P)
        inputs |= {f"{name}_input_ids": batch.input_ids[rows], f"{name}_attention_mask": batch.attention_mask[rows]}
        inputs[f"{name}_labels"] = batch.labels[rows]
    loss, _ = own.get_batch_loss_metrics(own.model, inputs)
    return theirs(loss, logits)


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("sigmoid", {}),
        ("sigmoid", {"beta": 0.3, "cpo_alpha": 0.4, **SMOOTHED}),
        ("sigmoid", {"beta": 0.3, "cpo_alpha": 0.0}),
        ("hinge", {"beta": 0.1, "cpo_alpha": 0.4}),
        ("ipo", {"beta": 0.6, "cpo_alpha": 0.4}),
        ("simpo", {}),
        ("simpo", {"beta": 2.5, "simpo_gamma": 1.1, "cpo_alpha": 0.0, **SMOOTHED}),
        ("simpo", {"beta": 2.5, "alpha": 0.3}),
        ("alphapo", {}),
        ("alphapo", {"beta": 2.5, "simpo_gamma": 0.1, "alpha": -0.5, **SMOOTHED}),
    ],
)
def test_cpo_of_trl(loss_type, settings):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    values = defaults_of(CPOConfig) | settings
    if loss_type == "alphapo":  # CPOConfig.__post_init__
        values |= {"loss_type": "simpo", "cpo_alpha": 0.0}
    else:
        values["loss_type"] = loss_type
    names = ("beta", "label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma", "alpha")
    batch = Batch()
    expected = trl_concatenated(CPOTrainer, batch, **{name: values[name] for name in names})
    assert_same(batch.ours(objective_of("trl", loss_type, trainer="cpo", **settings)), expected)


def test_alphapo_is_a_name_for_simpo_without_imitation():
    from trl.experimental.cpo import CPOConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CPOConfig(output_dir="unused", loss_type="alphapo", alpha=0.3, bf16=False, use_cpu=True, report_to=[])
    assert (config.loss_type, config.cpo_alpha) == ("simpo", 0.0)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.7}])
def test_orpo_of_trl(settings):
    """Prompts of one token, of which nothing is scored, or TRL's likelihood term has more tokens than ours."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    batch = Batch(prompt=1)
    expected = trl_concatenated(ORPOTrainer, batch, beta=(defaults_of(ORPOConfig) | settings)["beta"])
    assert_same(batch.ours(objective_of("trl", "orpo", **settings)), expected, 1e-5)  # fp32 there


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("sigmoid", {}),
        ("sigmoid", {"beta": 0.3, "tpo_alpha": 0.4, **SMOOTHED}),
        ("sigmoid", {"beta": 0.3, "tpo_alpha": 0.0}),
        ("hinge", {"beta": 0.1}),
        ("hinge", {"beta": 0.1, "tpo_alpha": 0.0}),
        ("ipo", {"beta": 0.6}),
        ("ipo", {"beta": 0.6, "tpo_alpha": 0.0}),
        ("tpo-l", {}),
        ("tpo-l", {"beta": 2.0, "tpo_l_gamma": 1.2, "tpo_alpha": 0.4, **SMOOTHED}),
        ("tpo-l", {"beta": 2.0, "tpo_alpha": 0.0}),
    ],
)
def test_tpo_of_trl(loss_type, settings, monkeypatch):
    from trl.experimental.tpo import TPOConfig, TPOTrainer, tpo_trainer

    def selected(logits, index, entropy_requires_grad=True, row_mask=None):
        """What TRL's Triton kernel gives."""
        logprob = logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
        return torch.where(row_mask.bool(), logprob, 0), torch.zeros_like(logprob)

    monkeypatch.setattr(tpo_trainer, "selective_log_softmax_and_entropy", selected)
    values = defaults_of(TPOConfig) | settings
    batch = Batch(B=2 * P if values["tpo_alpha"] == 0 else 3 * P)
    logits = batch.logits.clone().requires_grad_()
    names = ("beta", "label_smoothing", "tpo_alpha", "tpo_l_gamma")
    trainer = bare(TPOTrainer, Model(logits), loss_type=loss_type, **{name: values[name] for name in names})
    inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "completion_mask")}
    expected = theirs(trainer._compute_loss(trainer.model, inputs, False), logits)
    assert_same(batch.ours(objective_of("trl", loss_type, trainer="tpo", **settings)), expected)


# Settings


def configs() -> dict[str, type]:
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.online_dpo import OnlineDPOConfig
    from trl.experimental.orpo import ORPOConfig
    from trl.experimental.tpo import TPOConfig

    return {
        "dpo": DPOConfig, "kto": KTOConfig, "cpo": CPOConfig, "online_dpo": OnlineDPOConfig, "orpo": ORPOConfig, "tpo": TPOConfig,
    }  # fmt: skip


def test_defaults_are_those_of_the_installed_trl():
    release = tuple(map(int, READ["trl"].last.split(".")))
    for trainer, config in configs().items():
        values = defaults_of(config)
        rules = [s for s in SETTINGS if (s.library, s.trainer) == ("trl", trainer) and s.holds(release)]
        assert rules
        for rule in rules:
            value = values[rule.name]
            assert rule.default == (value[0] if rule.name == "beta" and isinstance(value, list) else value), rule


# Liger


@contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def liger_pair(function, chosen: Tensor, rejected: Tensor, **arguments) -> tuple[Tensor, Tensor]:
    policy = torch.cat([chosen, rejected]).requires_grad_()
    loss, *_ = function(*policy.chunk(2), torch.zeros(2 * len(chosen), 1), **arguments)
    return theirs(loss, policy)


def our_pair(named, policy: Tensor, **inputs) -> tuple[Tensor, Tensor]:
    policy = policy.clone().requires_grad_()
    loss, _ = preference_loss(policy, **inputs, **named.arguments())
    return theirs(loss, policy)


def log_probs() -> tuple[Tensor, Tensor, Tensor]:
    """(policy, reference, lengths) of 6 pairs, with margins on both sides of the hinge."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 9, (12,), generator=generator).double()
    reference = -2.5 * lengths
    return reference + 4 * torch.randn(12, generator=generator, dtype=torch.float64), reference, lengths


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("sigmoid", {"beta": 0.3}),
        ("hinge", {"beta": 0.3}),
        ("exo_pair", {"beta": 0.3, **SMOOTHED}),
        ("nca_pair", {"beta": 0.3}),
        ("robust", {"beta": 0.3, **SMOOTHED}),
        ("bco_pair", {"beta": 0.3}),
        ("sppo_hard", {"beta": 0.3}),
        ("apo_zero", {"beta": 0.3}),
        ("apo_down", {"beta": 0.3}),
        ("discopop", {"beta": 0.3, "discopop_tau": 0.2}),
    ],
)
def test_dpo_of_liger(loss_type, settings):
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    policy, reference, _ = log_probs()
    ref_chosen, ref_rejected = reference.chunk(2)
    arguments = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected, "loss_type": loss_type, **settings}
    expected = liger_pair(LigerFusedLinearDPOFunction.preference_loss_fn, *policy.chunk(2), **arguments)
    assert_same(our_pair(objective_of("trl", loss_type, **settings), policy, reference=reference), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_cpo_and_simpo_of_liger(smoothing):
    from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

    policy, _, lengths = log_probs()
    expected = liger_pair(
        LigerFusedLinearCPOFunction.preference_loss_fn, *policy.chunk(2), beta=0.3, label_smoothing=smoothing
    )
    named = objective_of("trl", "sigmoid", trainer="cpo", beta=0.3, label_smoothing=smoothing, cpo_alpha=0.0)
    assert_same(our_pair(named, policy, lengths=lengths), expected)

    means = policy / lengths
    loss, grad = liger_pair(
        LigerFusedLinearSimPOFunction.preference_loss_fn,
        *means.chunk(2),
        beta=2.5,
        gamma=0.8,
        label_smoothing=smoothing,
    )
    named = objective_of("trl", "simpo", beta=2.5, simpo_gamma=0.8, label_smoothing=smoothing, cpo_alpha=0.0)
    assert_same(our_pair(named, policy, lengths=lengths), (loss, grad / lengths))


def test_odds_ratio_of_liger():
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction

    policy, _, lengths = log_probs()
    policy = -policy.abs()
    loss, grad = liger_pair(LigerFusedLinearORPOFunction.preference_loss_fn, *(policy / lengths).chunk(2), beta=0.3)
    named = objective_of("llama_factory", "orpo", version="0.9.5", pref_beta=0.3)
    named = named._replace(options={**named.options, "sft_weight": 0.0})
    assert_same(our_pair(named, policy, lengths=lengths), (loss, grad / lengths))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_of_liger(loss_type):
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction

    policy, reference, _ = log_probs()
    desirable = torch.arange(12) % 3 > 0
    mismatched = torch.linspace(-1, 2, 12, dtype=torch.float64)
    kl = mismatched.mean() if loss_type == "kto" else None
    theirs_S = policy.clone().requires_grad_()
    loss, *_ = LigerFusedLinearKTOFunction.preference_loss_fn(
        theirs_S, desirable, torch.zeros(12, 1), ref_log_prob_chunk=reference, beta=0.3, kl=kl
    )
    named = objective_of("trl", loss_type, beta=0.3)
    given = {"mismatched": mismatched} if loss_type == "kto" else {}
    found = our_pair(named, policy, reference=reference, desirable=desirable, **given)
    assert_same(found, theirs(loss, theirs_S))


# The whole of Liger's fused losses, from hidden states, with the likelihood term of those that have one; fp32.
WHOLE = {
    "LigerFusedLinearDPOLoss": ({"beta": 0.3}, ("trl", "sigmoid", {"beta": 0.3})),
    "LigerFusedLinearCPOLoss": (
        {"beta": 0.3, "alpha": 0.4, "label_smoothing": 0.15},
        ("trl", "sigmoid", {"trainer": "cpo", "beta": 0.3, "cpo_alpha": 0.4, "label_smoothing": 0.15}),
    ),
    "LigerFusedLinearSimPOLoss": (
        {"beta": 2.5, "gamma": 0.8, "alpha": 0.4},
        ("trl", "simpo", {"beta": 2.5, "simpo_gamma": 0.8, "cpo_alpha": 0.4}),
    ),
    "LigerFusedLinearORPOLoss": ({"beta": 0.3}, ("trl", "orpo", {"beta": 0.3})),
}


@pytest.mark.parametrize("name", WHOLE)
def test_fused_losses_of_liger(name):
    import liger_kernel.chunked_loss as chunked_loss

    arguments, (library, theirs_name, settings) = WHOLE[name]
    named = objective_of(library, theirs_name, **settings)
    batch = Batch()
    hidden = batch.logits.float().requires_grad_()
    target = shift_targets(batch.labels)
    inputs = {"ref_input": batch.reference.float(), "ref_weight": torch.eye(V)} if "DPO" in name else {}
    with _quiet():
        loss, _ = getattr(chunked_loss, name)(compiled=False, **arguments)(torch.eye(V), hidden, target, **inputs)
        loss, grad = theirs(loss, hidden)
    assert_same(batch.ours(named), (loss.double(), grad.double()), 2e-5)


def test_a_mixture_is_trls_list():
    named = objective_of("trl", ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    batch = Batch()
    ours = SimpleNamespace(objective=OBJECTIVES["mpo"], arguments=lambda: {"objective": "mpo"})
    assert_same(batch.ours(ours), batch.ours(named), 1e-12)
