"""Our losses of tokens beside the originals: TRL's GRPO and RLOO trainers and Liger's fused GRPO loss, run on the CPU.

The trainers are made without their constructors and get log-probs that the tests make; compared are the loss and its gradient by each
log-prob. Letters: B completions, T places of a padded one, N tokens of the packed batch, V vocabulary, D hidden size.
"""

from copy import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_objectives_originals import _quiet, assert_same, bare, defaults_of, theirs
from torch import Tensor, nn

from isdaa_kernels import SamplerCorrection, group_advantages, linear_policy_loss, policy_loss
from isdaa_kernels.objectives.names import objective_of
from isdaa_kernels.stats import VocabStats

pytestmark = pytest.mark.slow  # seconds to import

B, T, V, D = 4, 9, 11, 6
LENGTHS = (5, 9, 1, 7)


class Rollout:
    """Right-padded completions, the third one of one token; log-probs with ratios on both sides of every clip, fp64."""

    def __init__(self, seed: int = 0, spread: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(scale: float) -> Tensor:
            return scale * torch.randn(B, T, generator=generator, dtype=torch.float64)

        self.mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
        self.old = -2 * torch.rand(B, T, generator=generator, dtype=torch.float64) - 0.1
        self.logprob = self.old + noise(spread)
        self.reference = self.old + noise(spread)
        self.sampler = self.old + noise(spread / 2)
        self.entropy = torch.rand(B, T, generator=generator, dtype=torch.float64)
        self.advantages = torch.tensor([1.3, -0.7, -0.4, 0.9], dtype=torch.float64)

    def ours(self, **arguments) -> tuple[Tensor, Tensor]:
        """(loss, gradient by the log-probs), over the packed places."""
        logprob = self.logprob.clone().requires_grad_()
        given = {"advantages": self.advantages, "old_logprob": self.old.reshape(-1)} | arguments
        cu_seqlens = torch.arange(len(logprob) + 1) * T
        loss, _ = policy_loss(logprob.reshape(-1), cu_seqlens, mask=self.mask.reshape(-1), **given)
        return theirs(loss, logprob)

    def rows(self, rows: slice) -> "Rollout":
        """A micro-batch of it."""
        part = copy(self)
        for name, value in vars(self).items():
            setattr(part, name, value[rows])
        return part


def ratio_of_sampler(rollout: Rollout, mode: str, largest: float | None, least: float | None) -> Tensor:
    """What TRL makes of the log-probs of its sampler while it generates, [B, T] or [B, 1]."""
    difference = torch.where(rollout.mask, rollout.old - rollout.sampler, 0)
    ratio = (difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(least, largest)
    outside = (ratio > (largest or torch.inf)) | (ratio < (least or 0))
    return ratio.masked_fill(outside, 0.0)


def trl_grpo(
    rollout: Rollout,
    tokens: int | None = None,
    sampler: Tensor | None = None,
    processes: int = 1,
    calls: int = 1,
    **settings,
) -> tuple[Tensor, Tensor]:
    from trl import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    values = defaults_of(GRPOConfig) | settings
    logprob = rollout.logprob.clone().requires_grad_()
    high = values["epsilon_high"]
    trainer = bare(
        GRPOTrainer,
        nn.Linear(1, 1),
        args=SimpleNamespace(**values | {"steps_per_generation": calls}),
        epsilon_low=values["epsilon"],
        epsilon_high=values["epsilon"] if high is None else high,
        use_vllm=sampler is not None,
        current_gradient_accumulation_steps=calls,
        _entropy_bonus_enabled=values["entropy_coef"] != 0,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, rollout.entropy, None),
        **{
            name: values[name]
            for name in (
                "beta", "loss_type", "importance_sampling_level", "max_completion_length", "off_policy_mask_threshold",
                "top_entropy_quantile", "vllm_importance_sampling_correction", "entropy_coef", "use_adaptive_entropy",
            )
        },
    )  # fmt: skip
    trainer.accelerator = SimpleNamespace(
        num_processes=processes,
        gather=_same,
        reduce=_same,
        pad_across_processes=_same,
        sync_gradients=True,
        device=torch.device("cpu"),
    )
    mask = rollout.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": rollout.advantages, "old_per_token_logps": rollout.old, "ref_per_token_logps": rollout.reference,
        "num_items_in_batch": torch.tensor(tokens or sum(LENGTHS)),
    }  # fmt: skip
    if sampler is not None:
        inputs |= {"importance_sampling_ratio": sampler, "sampling_per_token_logps": rollout.sampler}
    return theirs(trainer._compute_loss(trainer.model, inputs), logprob)


def _same(value, *_, **__):
    return value


# (TRL's settings, our arguments)
SEQUENCE = {"importance_sampling_level": "sequence"}
NARROW = {"epsilon": 0.1, "epsilon_high": 0.15}
OUR_NARROW = {"clip_low": 0.1, "clip_high": 0.15}
CASES = [
    ({"loss_type": "grpo"}, {"objective": "grpo"}),
    ({"loss_type": "grpo", **NARROW}, {"objective": "grpo", **OUR_NARROW}),
    ({"loss_type": "grpo", "delta": 1.4}, {"objective": "grpo", "ratio_cap": 1.4}),
    ({"loss_type": "bnpo"}, {"objective": "bnpo"}),
    ({"loss_type": "dr_grpo", "max_completion_length": 32}, {"objective": "dr_grpo", "max_length": 32}),
    ({"loss_type": "dapo"}, {"objective": "dapo", "clip_high": 0.2}),
    ({"loss_type": "dapo", "epsilon_high": 0.28}, {"objective": "dapo"}),
    ({"loss_type": "dapo", "delta": 1.3}, {"objective": "grpo_two_sided", "ratio_cap": 1.3}),
    ({"loss_type": "dapo", "delta": 1.3}, {"objective": "ppo_dual_clip", "ratio_cap": 1.3}),
    ({"loss_type": "dapo"}, {"objective": "ppo"}),
    ({"loss_type": "grpo", **SEQUENCE, **NARROW}, {"objective": "gspo", **OUR_NARROW}),
    ({"loss_type": "grpo", **SEQUENCE, "epsilon": 3e-4, "epsilon_high": 4e-4}, {"objective": "gspo"}),
    ({"loss_type": "grpo", **SEQUENCE, **NARROW}, {"objective": "gspo_token", **OUR_NARROW}),
    ({"loss_type": "dapo", **SEQUENCE}, {"objective": "gspo", "reduction": "token_mean", "clip_low": 0.2, "clip_high": 0.2}),
    ({"loss_type": "luspo", **SEQUENCE}, {"objective": "luspo"}),
    ({"loss_type": "luspo"}, {"objective": "grpo", "reduction": "sequence_sum"}),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, {"objective": "cispo"}),
    ({"loss_type": "cispo", "epsilon_high": 1.1}, {"objective": "cispo", "ratio_cap": 1.1}),
    ({"loss_type": "sapo"}, {"objective": "sapo"}),
    (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 3.0},
        {"objective": "sapo", "positive_temperature": 0.7, "negative_temperature": 3.0},
    ),
    ({"loss_type": "vespo"}, {"objective": "vespo"}),
    (
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.7, "vespo_lambda_neg": 1.5},
        {
            "objective": "vespo", "positive_power": 1.0, "positive_rate": 0.5, "negative_power": 0.7, "negative_rate": 1.5,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "arguments"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("spread", [0.05, 0.4])
def test_losses_of_trl(settings, arguments, spread):
    rollout = Rollout(spread=spread)
    assert_same(rollout.ours(**arguments), trl_grpo(rollout, **settings))


@pytest.mark.parametrize("settings", [settings for settings, _ in CASES], ids=str)
def test_losses_of_trl_by_their_names(settings):
    rollout = Rollout()
    trainer_settings = {name: value for name, value in settings.items() if name != "loss_type"}
    named = objective_of("trl", settings["loss_type"], trainer="grpo", **trainer_settings)
    assert_same(rollout.ours(**named.arguments()), trl_grpo(rollout, **settings))


def test_every_loss_type_of_trl_is_run():
    from trl.trainer import grpo_trainer

    source = Path(grpo_trainer.__file__).read_text()
    lines = source[source.index("def _compute_loss") :].splitlines()
    named = {word for line in lines if "if self.loss_type" in line for word in line.split('"')[1::2]}
    assert named == {settings["loss_type"] for settings, _ in CASES}


@pytest.mark.parametrize(
    ("settings", "arguments", "denominator"),
    [
        ({"loss_type": "grpo"}, {"objective": "grpo"}, B),
        ({"loss_type": "sapo"}, {"objective": "sapo"}, B),
        ({"loss_type": "bnpo"}, {"objective": "bnpo"}, 2),
        ({"loss_type": "dr_grpo", "max_completion_length": 32}, {"objective": "dr_grpo", "max_length": 32}, B),
        ({"loss_type": "dapo"}, {"objective": "dapo", "clip_high": 0.2}, sum(LENGTHS)),
        ({"loss_type": "vespo"}, {"objective": "vespo"}, sum(LENGTHS)),
        ({"loss_type": "luspo", **SEQUENCE}, {"objective": "luspo"}, B),
    ],
    ids=lambda value: str(value),
)
def test_accumulation_of_trl(settings, arguments, denominator):
    """A step of two micro-batches, each with its share of the loss: what the mean divides by is that of the step."""
    rollout = Rollout()
    for rows in (slice(0, 2), slice(2, 4)):
        part = rollout.rows(rows)
        expected = trl_grpo(part, tokens=sum(LENGTHS), calls=2, **settings)
        assert_same(part.ours(denominator=denominator, **arguments), expected)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("settings", "arguments"), [CASES[0], CASES[5], CASES[10], CASES[16], CASES[-2]], ids=lambda value: str(value)
)
def test_divergence_of_trl(settings, arguments, corrected):
    rollout = Rollout()
    expected = trl_grpo(rollout, beta=0.3, use_bias_correction_kl=corrected, **settings)
    reference = rollout.reference.reshape(-1)
    found = rollout.ours(reference_logprob=reference, kl_weight=0.3, kl_corrected=corrected, **arguments)
    assert_same(found, expected)


MODES = {
    "token_truncate": {"level": "token", "mode": "truncate"},
    "token_mask": {"level": "token", "mode": "mask"},
    "sequence_truncate": {"level": "sequence", "mode": "truncate"},
    "sequence_mask": {"level": "sequence", "mode": "mask"},
}


# Sequence corrections of vespo are refused there and here.
CORRECTED = [
    (loss_type, mode)
    for loss_type in ("grpo", "cispo", "vespo")
    for mode in MODES
    if loss_type != "vespo" or mode.startswith("token")
]


@pytest.mark.parametrize(("loss_type", "mode"), CORRECTED)
@pytest.mark.parametrize(("largest", "least"), [(1.2, None), (1.3, 0.9), (None, 0.8)])
def test_corrections_of_trl(loss_type, mode, largest, least):
    rollout = Rollout()
    ratio = ratio_of_sampler(rollout, mode, largest, least)
    settings = {"loss_type": loss_type, "epsilon_high": 5.0} if loss_type == "cispo" else {"loss_type": loss_type}
    expected = trl_grpo(rollout, sampler=ratio, beta=0.1, use_bias_correction_kl=False, **settings)
    found = rollout.ours(
        objective=loss_type,
        sampler_logprob=rollout.sampler.reshape(-1),
        correction=SamplerCorrection(largest=largest, least=least, **MODES[mode]),
        reference_logprob=rollout.reference.reshape(-1),
        kl_weight=0.1,
    )
    assert_same(found, expected)


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1])
def test_off_policy_mask_of_trl(threshold):
    rollout = Rollout()
    ratio = torch.ones(B, 1, dtype=torch.float64)
    expected = trl_grpo(rollout, sampler=ratio, off_policy_mask_threshold=threshold)
    found = rollout.ours(
        objective="dapo",
        clip_high=0.2,
        sampler_logprob=rollout.sampler.reshape(-1),
        correction=SamplerCorrection(mode="none"),
        off_policy_threshold=threshold,
    )
    assert_same(found, expected)


def test_entropy_bonus_and_mask_of_trl():
    rollout = Rollout()
    rollout.entropy.requires_grad_()
    expected = trl_grpo(rollout, entropy_coef=0.2)
    stats = VocabStats(entropy=rollout.entropy.reshape(-1))
    assert_same(rollout.ours(objective="dapo", clip_high=0.2, entropy_weight=0.2, stats=stats), expected)

    rollout.entropy.requires_grad_(False)
    expected = trl_grpo(rollout, top_entropy_quantile=0.4)
    weight = rollout.entropy >= rollout.entropy[rollout.mask].float().quantile(0.6)
    assert_same(rollout.ours(objective="dapo", clip_high=0.2, token_weight=weight.double().reshape(-1)), expected)


def test_advantages_of_tokens_of_trl():
    rollout = Rollout()
    rollout.advantages = torch.linspace(-1, 1, B * T, dtype=torch.float64).view(B, T)
    expected = trl_grpo(rollout, loss_type="grpo")
    assert_same(rollout.ours(objective="grpo", advantages=rollout.advantages.reshape(-1)), expected)


def test_denominator_is_trls_number_of_items():
    rollout = Rollout()
    assert_same(rollout.ours(objective="dapo", clip_high=0.2, denominator=57), trl_grpo(rollout, tokens=57))
    # processes whose gradients are averaged
    of_four = trl_grpo(rollout, tokens=57, processes=4)
    assert_same(rollout.ours(objective="dapo", clip_high=0.2, denominator=57 / 4), of_four)


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_rloo_of_trl(spread):
    from trl import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer

    rollout = Rollout(spread=spread)
    values = defaults_of(RLOOConfig)
    logprob = rollout.logprob.clone().requires_grad_()
    trainer = bare(
        RLOOTrainer,
        nn.Linear(1, 1),
        epsilon_low=values["epsilon"],
        epsilon_high=values["epsilon"],
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, rollout.entropy, None),
    )
    trainer.accelerator = SimpleNamespace(gather=_same, reduce=_same)
    mask = rollout.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": rollout.advantages, "old_logps": (rollout.old * mask).sum(-1),
    }  # fmt: skip
    expected = theirs(trainer._compute_loss(trainer.model, inputs), logprob)
    assert_same(rollout.ours(objective="rloo"), expected)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gmpo_of_trl(beta):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    rollout, values = Rollout(spread=0.6), defaults_of(GMPOConfig)
    logprob = rollout.logprob.clone().requires_grad_()
    trainer = bare(
        GMPOTrainer,
        nn.Linear(1, 1),
        beta=beta,
        epsilon_low=values["epsilon"],
        epsilon_high=values["epsilon"],
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, rollout.entropy, None),
    )
    trainer.accelerator = SimpleNamespace(gather=_same, reduce=_same)
    mask = rollout.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": rollout.advantages, "old_per_token_logps": rollout.old, "ref_per_token_logps": rollout.reference,
    }  # fmt: skip
    expected = theirs(trainer._compute_loss(trainer.model, inputs), logprob)
    more = {"reference_logprob": rollout.reference.reshape(-1), "kl_weight": beta} if beta else {}
    assert_same(rollout.ours(objective="gmpo", log_clip=values["epsilon"], **more), expected)


# Liger, from hidden states, in fp32

LIGER = [
    ({"loss_type": "grpo"}, {"objective": "grpo"}),
    ({"loss_type": "bnpo"}, {"objective": "bnpo"}),
    ({"loss_type": "dr_grpo", "max_completion_length": 16}, {"objective": "dr_grpo", "max_length": 16}),
    ({"loss_type": "dapo", "epsilon_high": 0.28}, {"objective": "dapo"}),
    ({"loss_type": "dapo", "delta": 1.3}, {"objective": "grpo_two_sided", "ratio_cap": 1.3}),
    ({"loss_type": "grpo", **SEQUENCE}, {"objective": "gspo", "clip_low": 0.2, "clip_high": 0.2}),
    ({"loss_type": "luspo", **SEQUENCE}, {"objective": "luspo"}),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, {"objective": "cispo"}),
    ({"loss_type": "sapo"}, {"objective": "sapo"}),
    ({"loss_type": "vespo"}, {"objective": "vespo"}),
]


# But for luspo with a divergence: there that of places that are not scored is in the loss.
LIGER_BETA = [(*row, beta) for row in LIGER for beta in (0.0, 0.2) if beta == 0 or row[0]["loss_type"] != "luspo"]


@pytest.mark.parametrize(("settings", "arguments", "beta"), LIGER_BETA, ids=lambda value: str(value))
def test_fused_losses_of_liger(settings, arguments, beta):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(V, D, generator=generator)
    ids = torch.randint(0, V, (B, T), generator=generator)
    rollout = Rollout()

    def logprob(hidden: Tensor) -> Tensor:
        return (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    hidden = torch.randn(B, T, D, generator=generator)
    old, reference = (logprob(hidden + scale * torch.randn(B, T, D, generator=generator)) for scale in (0.1, 0.2))
    advantages = rollout.advantages.float()
    hidden.requires_grad_()
    with _quiet():
        loss, _ = LigerFusedLinearGRPOLoss(beta=beta, compiled=False, use_ref_model=beta > 0, **settings)(
            hidden, weight, ids, rollout.mask.long(), advantages, old_per_token_logps=old,
            ref_per_token_logps=reference if beta > 0 else None,
        )  # fmt: skip
        expected = _gradient_of_liger(loss, hidden)
    given = {"kl_weight": beta, "reference_logprob": reference.reshape(-1)} if beta > 0 else {}
    loss, _ = linear_policy_loss(
        hidden.reshape(-1, D), weight, torch.where(rollout.mask, ids, -100).reshape(-1), torch.arange(B + 1) * T,
        advantages=advantages, old_logprob=old.reshape(-1), backend="reference", **given, **arguments,
    )  # fmt: skip
    found = theirs(loss, hidden)
    assert_same(tuple(x.double() for x in found), tuple(x.double() for x in expected), 2e-5)


def _gradient_of_liger(loss: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Its autograd function gives fewer gradients than it has inputs: the one that it made in the forward is read."""
    grad = loss.grad_fn.saved_tensors[0]
    return loss.detach(), grad


# Advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_trl(scale):
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([0.0, 1.0, 0.5, torch.nan, 2.0, 2.0, 2.0, 2.0, -1.0, torch.nan, torch.nan, torch.nan])
    grouped = rewards.view(3, 4)
    mean = grouped.nanmean(-1, keepdim=True)
    std = {"group": nanstd(grouped, dim=1, keepdim=True), "batch": nanstd(rewards), "none": None}[scale]
    expected = ((grouped - mean) / (1 if std is None else std + 1e-4)).nan_to_num(nan=0.0)
    torch.testing.assert_close(group_advantages(rewards, 4, scale=scale).float(), expected.reshape(-1))
