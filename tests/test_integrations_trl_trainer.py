"""ISDPOTrainer: TRL's loss where the objective is TRL's, ours by hand elsewhere, and all that DPOTrainer can besides."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from test_integrations_trl import assert_same_run
from trainer_fixtures import make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer, TrlParser
from trl_fixtures import QUICK, make_folder, make_pairs, train

from isdaa_kernels import OBJECTIVES, ImportanceWeight, SelfWeight
from isdaa_kernels.integrations import patching
from isdaa_kernels.integrations.trl import patch_trl
from isdaa_kernels.integrations.trl_trainer import ISDPOConfig, ISDPOTrainer

OURS = ("weight/", "log_weight/", "kl/", "empty_pairs/")


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")


def trained(folder, model, **settings):
    return train(folder, model, ISDPOTrainer, ISDPOConfig, **settings)


def build(folder, model, trainer=ISDPOTrainer, config=ISDPOConfig, data=None, **settings):
    """A trainer that has not trained, whose policy has moved away from its reference."""
    of_trainer = {name: settings.pop(name) for name in ("eval_dataset", "compute_metrics") if name in settings}
    built = trainer(
        model=model,
        args=config(str(folder), **{**QUICK, **settings}),
        train_dataset=make_pairs() if data is None else data,
        processing_class=make_tokenizer(None),
        **of_trainer,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return built


def batch_of(trainer, count=4):
    examples = [trainer.train_dataset[i] for i in range(count)]
    return trainer._prepare_inputs(trainer.data_collator(examples))


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def dense_sums(model, inputs):
    """fp64 [S], of fp64 logits."""
    logits = model.double()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    logprob = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return (logprob * inputs["completion_mask"][:, 1:]).sum(1)


def without_ours(logs):
    return [
        {name: value for name, value in step.items() if not name.removeprefix("eval_").startswith(OURS)}
        for step in logs
    ]


# With and without precomputed log-probs of the reference; two micro-batches a step; an evaluation between.
@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_is_trls_for_20_steps(tmp_path, precompute):
    model = make_folder(tmp_path)
    settings = {"max_steps": 20, "gradient_accumulation_steps": 2, "precompute_ref_log_probs": precompute}
    settings |= {"eval_dataset": make_pairs(4, seed=1), "eval_strategy": "steps", "eval_steps": 10}
    _, expected = train(tmp_path / "theirs", model, **settings)
    _, found = trained(tmp_path / "ours", model, objective="dpo", **settings)
    if (
        precompute
    ):  # TRL's sums of the same row in batches of other lengths: at the first step chance says which is larger
        expected[0]["rewards/accuracies"] = found[0]["rewards/accuracies"] = 0.0
    assert_same_run(expected, without_ours(found), 1e-4)
    assert {"kl/mean", "empty_pairs/count"} <= found[0].keys()
    assert "eval_kl/mean" in found[10]
    assert "weight/mean" not in found[0]


# TRL's losses that have a name here; the log-ratios of the batch are about 1
@pytest.mark.parametrize(
    ("loss_type", "objective", "theirs", "ours"),
    [
        ("sigmoid", "dpo", {}, {}),
        ("hinge", "slic", {}, {}),
        ("ipo", "ipo_mean", {}, {}),
        ("robust", "robust_dpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ("exo_pair", "exo", {"label_smoothing": 1e-3}, {}),
        ("nca_pair", "nca", {}, {}),
        ("sppo_hard", "sppo_hard", {"beta": 0.5}, {"beta": 0.5}),
        ("aot", "aot", {}, {}),
        ("aot_unpaired", "aot_unpaired", {}, {}),
        ("apo_zero", "apo_zero", {}, {}),
        ("apo_down", "apo_down", {}, {}),
        ("discopop", "discopop", {"discopop_tau": 0.1}, {"objective_options": {"mixing_temperature": 0.1}}),
        ("sigmoid_norm", "dpo_mean", {}, {}),
        ("sigmoid", "dpo_js", {"f_divergence_type": "js_divergence"}, {}),
        ("sigmoid", "dpo_alpha", {"f_divergence_type": "alpha_divergence"}, {}),
    ],
)
def test_losses_that_trl_has_too(tmp_path, loss_type, objective, theirs, ours):
    model = make_folder(tmp_path)
    ours = {"beta": 0.1, **ours}
    expected = build(tmp_path / "theirs", model, DPOTrainer, DPOConfig, loss_type=loss_type, **theirs)
    found = build(tmp_path / "ours", model, objective=objective, **ours)
    inputs = batch_of(expected)
    loss, gradient = loss_and_gradient(expected, inputs)
    our_loss, our_gradient = loss_and_gradient(found, inputs)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("patched", [False, True])
def test_is_dpo_by_hand(tmp_path, patched):
    model = make_folder(tmp_path)
    trainer = build(
        tmp_path / "run", model, beta=0.3, label_smoothing=0.1, importance_epsilon=0.2, importance_power=0.5
    )
    inputs = batch_of(trainer)
    if patched:
        with patch_trl():
            loss, gradient = loss_and_gradient(trainer, inputs)
    else:
        loss, gradient = loss_and_gradient(trainer, inputs)

    policy, reference = trainer.model, trainer.ref_model
    policy.zero_grad()
    a, b = (dense_sums(policy, inputs) - dense_sums(reference, inputs).detach()).chunk(2)
    weight = (0.5 * (a + b)).clamp(max=0.4).exp().detach()
    z = 0.3 * (a - b)
    pairs = weight * -(0.9 * torch.nn.functional.logsigmoid(z) + 0.1 * torch.nn.functional.logsigmoid(-z))
    pairs.mean().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert loss.item() == pytest.approx(pairs.mean().item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["weight/mean"] == pytest.approx(weight.mean().item(), rel=1e-5)
    assert metrics["weight/max"] == pytest.approx(weight.max().item(), rel=1e-5)
    assert metrics["weight/ess"] == pytest.approx((weight.sum() ** 2 / (weight**2).sum()).item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(z.mean().item(), rel=1e-4)
    assert metrics["kl/mean"] == pytest.approx(-(a + b).mean().item() / 2, rel=1e-4)


def test_at_the_start_the_weights_are_1(tmp_path):
    _, logs = trained(tmp_path / "run", make_folder(tmp_path), max_steps=1)
    assert logs[0]["weight/mean"] == logs[0]["weight/max"] == 1
    assert logs[0]["rewards/margins"] == 0
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_wpo_by_hand(tmp_path):
    trainer = build(tmp_path / "run", make_folder(tmp_path), objective="wpo")
    assert trainer.use_weighting is trainer.args.use_weighting is False
    inputs = batch_of(trainer)
    loss, _ = loss_and_gradient(trainer, inputs)
    mask = inputs["completion_mask"][:, 1:]
    log_p = (
        trainer.model.double()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        .logits[:, :-1]
        .log_softmax(-1)
    )
    squares = ((2 * log_p).logsumexp(-1) * mask).sum(1)
    policy = dense_sums(trainer.model, inputs)
    a, b = (policy - dense_sums(trainer.ref_model, inputs)).chunk(2)
    weight = ((policy - squares) / mask.sum(1)).view(2, -1).sum(0).clamp(max=0).exp()
    assert loss.item() == pytest.approx(
        (weight * -torch.nn.functional.logsigmoid(0.1 * (a - b))).mean().item(), rel=1e-5
    )


def with_behaviour(data, **columns):
    for name, values in columns.items():
        data = data.add_column(f"behaviour_{name}_logps", values[: len(data)])
    return data


# sums that fp32 does not hold
CHOSEN, REJECTED = ([-(2.0**15) - i / 1024 for i in range(24)] for _ in range(2))


def test_behaviour_log_probs_of_the_data_set(tmp_path):
    model, data = make_folder(tmp_path), make_pairs()
    given = {"importance_mode": "none", "importance_power": 1e-4}
    plain = build(tmp_path / "plain", model, data=data, **given)
    written = with_behaviour(data, chosen=CHOSEN, rejected=REJECTED)
    trainer = build(tmp_path / "run", model, data=written, eval_dataset=written, **given)
    inputs = batch_of(trainer)
    assert inputs["behaviour_chosen_logps"].dtype == torch.float64
    assert inputs["behaviour_chosen_logps"].tolist() == CHOSEN[:4]
    trainer.compute_loss(trainer.model, dict(inputs))
    plain.compute_loss(plain.model, batch_of(plain))
    reference = dense_sums(trainer.ref_model, inputs).view(2, -1).sum(0).mean()
    behaviour = (inputs["behaviour_chosen_logps"] + inputs["behaviour_rejected_logps"]).mean()
    shift = (
        trainer._metrics["eval" if not trainer.model.training else "train"]["log_weight/mean"][-1]
        - plain._metrics["eval" if not plain.model.training else "train"]["log_weight/mean"][-1]
    )
    assert shift == pytest.approx(1e-4 * (reference - behaviour).item(), rel=1e-5)
    trainer.train()
    trainer.evaluate()


def test_behaviour_columns_that_do_not_fit(tmp_path):
    model, data = make_folder(tmp_path), make_pairs()
    with pytest.raises(ValueError, match="behaviour_chosen_logps: expected beside it behaviour_rejected_logps"):
        build(tmp_path / "run", model, data=with_behaviour(data, chosen=CHOSEN))
    both = with_behaviour(data, chosen=CHOSEN, rejected=REJECTED)
    with pytest.raises(ValueError, match="behaviour_chosen_logps: 'dpo' would ignore it"):
        build(tmp_path / "run", model, data=both, objective="dpo")
    everywhere = "behaviour_chosen_logps: expected in every data set or in none, found in "
    with pytest.raises(ValueError, match=f"{everywhere}train_dataset and not in eval_dataset$"):
        build(tmp_path / "run", model, data=both, eval_dataset=data)
    with pytest.raises(ValueError, match=rf"{everywhere}eval_dataset\['b'\] and not in train_dataset$"):
        build(tmp_path / "run", model, data=data, eval_dataset={"a": data, "b": both})
    for of_trainer, of_call, where in ((both, data, "in"), (data, both, "not in")):
        trainer = build(tmp_path / "run", model, data=of_trainer)
        with pytest.raises(ValueError, match=f"behaviour_chosen_logps: expected {where} every data set"):
            trainer.evaluate(of_call)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "hinge"}, "loss_type: objective='is_dpo' would ignore it; take the objective that"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}, "loss_type"),
        ({"loss_weights": [0.5]}, "loss_weights"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type: .*dpo_js"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef"),
        ({"use_weighting": True}, "use_weighting: .* objective='wpo'"),
        ({"discopop_tau": 0.1}, "discopop_tau"),
        ({"objective": "dpo", "importance_epsilon": 0.5}, "importance_epsilon: 'dpo' has no importance weight"),
        ({"objective": "wpo", "importance_normalize": True}, "importance_normalize: 'wpo' has no importance weight"),
        ({"importance_mode": "half"}, "ImportanceWeight: mode"),
        ({"objective": "sft_mean", "label_smoothing": 0.1}, "sft_mean: unknown option 'label_smoothing'"),
        ({"objective": "orpo", "beta": 0.1}, "orpo: unknown option 'beta'"),
        ({"beta": -1.0}, "is_dpo: beta"),
        ({"objective_options": {"beta": 0.1}}, "objective_options: beta"),
        ({"objective_options": {"temperature": 0.1}}, "is_dpo: unknown option 'temperature'"),
        ({"objective": "beta_dpo", "objective_options": {"keep": 0.5}}, "beta_dpo: keep: BetaState gives it"),
        ({"objective": "bco", "objective_options": {"baseline": 0.5}}, "bco: baseline: RewardMean gives it"),
        ({"objective": "ppo"}, "objective: expected one of dpo, ipo, .* got 'ppo'"),
        ({"objective": "ld_dpo"}, "objective: expected one of"),  # weighs tokens
        ({"objective": "tpo"}, "objective: expected one of"),  # imitates a third completion
        ({"objective": "inpo"}, "objective: expected one of"),  # has opponents
        ({"objective": "kto"}, "objective: expected one of"),  # of single completions
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ISDPOConfig(str(tmp_path), bf16=False, use_cpu=True, **settings)


@pytest.mark.parametrize(("name", "value"), [("loss_type", ["hinge"]), ("ld_alpha", 0.5)])
def test_settings_that_would_be_ignored_and_come_late(tmp_path, name, value):
    config = ISDPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{name}: objective='is_dpo' would ignore it"):
        ISDPOTrainer(make_folder(tmp_path), args=config, train_dataset=make_pairs())


def test_a_compiled_reference(tmp_path):
    """torch_compile=True makes one; it has no truth value."""
    trainer = build(tmp_path / "run", make_folder(tmp_path), objective="dpo")
    inputs = batch_of(trainer)
    expected = trainer.compute_loss(trainer.model, dict(inputs))
    trainer.ref_model = torch.compile(trainer.ref_model, backend="eager")
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(inputs)), expected)


def test_settings_of_the_weight_and_the_objective(tmp_path):
    config = ISDPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        objective="is_discopop",
        objective_options='{"mixing_temperature": "0.2"}',
        importance_floor=0.1,
    )
    settings = {"objective": "is_discopop", "importance": ImportanceWeight(floor=0.1), "mixing_temperature": 0.2}
    assert config.objective_settings() == settings
    assert config.metric_beta() == OBJECTIVES["discopop"].defaults["beta"]
    config = ISDPOConfig(str(tmp_path), use_cpu=True, bf16=False, objective="wpo", beta=0.3)
    assert config.objective_settings() == {"objective": "wpo", "importance": SelfWeight(), "beta": 0.3}
    assert config.metric_beta() == 0.3


def test_settings_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --bf16 False --objective is_ipo --beta 0.2 --importance_epsilon 0.5"
    line += " --importance_normalize True"
    (config,) = TrlParser((ISDPOConfig,)).parse_args_and_config(line.split())
    assert config.objective_settings() == {
        "objective": "is_ipo",
        "importance": ImportanceWeight(0.5, normalize=True),
        "beta": 0.2,
    }


def test_other_arguments_that_do_not_fit(tmp_path, monkeypatch):
    model = make_folder(tmp_path)
    with pytest.raises(TypeError, match="args: expected an ISDPOConfig, got DPOConfig"):
        build(tmp_path / "run", model, ISDPOTrainer, DPOConfig)
    monkeypatch.setattr(patching, "version", lambda package: "2.0.0")
    with pytest.raises(ImportError, match=r"trl: expected version 1\.16\.0, got 2\.0\.0; pass any_trl_version=True"):
        build(tmp_path / "run", model)
    build(tmp_path / "run", model, any_trl_version=True)


# whole-batch states, one that is required, one without a reference, and one that keeps nothing
@pytest.mark.parametrize(
    "objective", ["bco", "is_bco", "aot", "beta_dpo", "is_beta_dpo", "simpo", "orpo", "mpo", "is_simpo"]
)
def test_objectives_train(tmp_path, objective):
    _, logs = trained(tmp_path / "run", make_folder(tmp_path), objective=objective, max_steps=2)
    assert all(math.isfinite(value) for step in logs for value in step.values())
    assert logs[0]["grad_norm"] > 0


def test_options_of_a_state_reach_it(tmp_path):
    options = {"objective": "beta_dpo", "beta": 0.2, "objective_options": {"strength": 0.3}}
    config = ISDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    assert config.objective_settings() == {"objective": "beta_dpo", "importance": None}
    assert config.objective_state().strength == 0.3
    assert config.metric_beta() == 0.2
    _, logs = trained(tmp_path / "run", make_folder(tmp_path), max_steps=1, **options)
    assert logs[0]["grad_norm"] > 0


def test_evaluation_does_not_move_what_the_objective_keeps(tmp_path):
    trainer = build(tmp_path / "run", make_folder(tmp_path), objective="bco", eval_dataset=make_pairs(4, seed=1))
    loss_and_gradient(trainer, batch_of(trainer))
    before = {name: value.clone() for name, value in trainer.objective_state.state_dict().items()}
    assert before["count"] == 8
    trainer.model.eval()
    logs = trainer.evaluate()
    assert math.isfinite(logs["eval_loss"])
    torch.testing.assert_close(trainer.objective_state.state_dict(), before, rtol=0, atol=0)


def test_compute_metrics_get_logits(tmp_path):
    seen = []

    def measure(prediction):
        seen.append(prediction.predictions.shape)
        return {"seen": len(seen)}

    data = make_pairs(2, seed=1)
    trainer = build(
        tmp_path / "run",
        make_folder(tmp_path),
        eval_dataset=data,
        compute_metrics=measure,
        per_device_eval_batch_size=2,
    )
    with pytest.warns(FutureWarning, match="return_outputs=True"):
        logs = trainer.evaluate()
    assert logs["eval_seen"] == 1
    assert seen[0][0] == 4
    assert seen[0][2] == 300


# Adapters: the reference is the policy without them, and the head is frozen
@pytest.mark.parametrize("patched", [False, True])
def test_adapters(tmp_path, patched):
    model = make_folder(tmp_path)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    _, expected = train(tmp_path / "theirs", model, peft_config=lora, learning_rate=1e-2, max_steps=6)
    if patched:
        with patch_trl():
            trainer, found = trained(
                tmp_path / "ours", model, objective="dpo", peft_config=lora, learning_rate=1e-2, max_steps=6
            )
    else:
        trainer, found = trained(
            tmp_path / "ours", model, objective="dpo", peft_config=lora, learning_rate=1e-2, max_steps=6
        )
    assert trainer.ref_model is None
    assert_same_run(expected, without_ours(found), 1e-4)
    assert found[0]["loss"] != found[4]["loss"]
    _, weighted = trained(tmp_path / "is", model, peft_config=lora, learning_rate=1e-2, max_steps=6)
    assert weighted[0]["weight/mean"] == 1
    assert weighted[5]["weight/mean"] != 1


def test_load_balancing_of_experts(tmp_path):
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = MixtralConfig(
        **sizes, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer(None).save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    expected = build(tmp_path / "theirs", model, DPOTrainer, DPOConfig)
    found = build(tmp_path / "ours", model, objective="dpo")
    inputs = batch_of(expected)
    loss, gradient = loss_and_gradient(expected, inputs)
    our_loss, our_gradient = loss_and_gradient(found, inputs)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-3, atol=1e-5)
    assert loss > 1


# A run that stops after 3 of 6 steps and goes on is the run that did not stop; `bco` and `beta_dpo` keep numbers from step to step.
@pytest.mark.parametrize("objective", ["is_dpo", "bco", "beta_dpo"])
def test_resumed_runs_go_on_as_they_were(tmp_path, objective):
    model = make_folder(tmp_path)
    settings = {"objective": objective, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, expected = trained(tmp_path / "whole", model, **settings)
    resumed, found = trained(tmp_path / "again", model, resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    for step in (*expected, *found):
        step.pop("num_tokens", None)  # TRL counts them from 0 again
    assert_same_run(expected[3:6], found[:3], 1e-6)
    for name, parameter in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], parameter, rtol=1e-6, atol=1e-7)
    if objective != "is_dpo":
        torch.testing.assert_close(resumed.objective_state.state_dict(), whole.objective_state.state_dict())
        assert (tmp_path / "whole" / "checkpoint-6" / "objective_state.pt").is_file()


def test_a_checkpoint_without_what_the_objective_keeps(tmp_path):
    model = make_folder(tmp_path)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path / "theirs", model, **settings)
    checkpoint = str(tmp_path / "theirs" / "checkpoint-1")
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint: 'bco' keeps numbers, and there is no .*objective_state\.pt"
    ):
        trained(tmp_path / "ours", model, objective="bco", resume=checkpoint, **settings)


def test_the_saved_model_loads(tmp_path):
    trainer, _ = trained(tmp_path / "run", make_folder(tmp_path), max_steps=1)
    trainer.save_model(str(tmp_path / "final"))
    assert "IS-DPO" not in (tmp_path / "final" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(loaded.state_dict(), trainer.model.state_dict())
    trainer.create_model_card(model_name="tiny")
    assert "trained with is_dpo" in (tmp_path / "run" / "README.md").read_text()


def test_sums_of_log_probs_are_never_made_16_bit(tmp_path, monkeypatch):
    data = with_behaviour(make_pairs(), chosen=CHOSEN, rejected=REJECTED)
    trainer = build(tmp_path / "run", make_folder(tmp_path), data=data, precompute_ref_log_probs=True)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    inputs = batch_of(trainer)
    assert inputs["behaviour_chosen_logps"].tolist() == CHOSEN[:4]
    assert inputs["ref_chosen_logps"].dtype == torch.float64


def test_streamed_data(tmp_path):
    data = with_behaviour(make_pairs(), chosen=CHOSEN, rejected=REJECTED).to_iterable_dataset()
    _, logs = trained(tmp_path / "run", make_folder(tmp_path), data=data, max_steps=2, importance_power=1e-4)
    assert len(logs) == 3
    assert logs[0]["weight/mean"] > 1


@pytest.mark.parametrize("flags", [[], ["--kernels"], ["--kernels", "--lora", "--objective", "is_dpo"]])
def test_the_example(tmp_path, capsys, flags):
    spec = importlib.util.spec_from_file_location("trl_dpo", Path(__file__).parents[1] / "examples" / "trl_dpo.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    data = write_jsonl(tmp_path / "pairs.jsonl", list(make_pairs(8)))
    settings = (
        "--max_steps 2 --per_device_train_batch_size 2 --use_cpu --bf16 False --report_to none --save_strategy no"
    )
    where = ["--model", make_folder(tmp_path), "--dataset", data, "--output_dir", str(tmp_path / "run")]
    found = example.main([*where, *settings.split(), *flags])
    assert found["seconds_per_step"] > 0
    assert f"kernels={'--kernels' in flags}" in capsys.readouterr().out
    assert (tmp_path / "run" / ("adapter_config.json" if "--lora" in flags else "config.json")).is_file()
