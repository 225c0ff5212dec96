import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import isdaa_trainer.train as train_module
import pytest
import torch
from isdaa_trainer.checkpoint import checkpoints
from isdaa_trainer.curves import draw_curves
from isdaa_trainer.train import InterruptedRunError, Trainer, learning_rate, main
from trainer_fixtures import lines, make_config, make_model_folder, make_records, stop_after, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path, model):
    """A run of 6 steps of 4 pairs, in 2 epochs, with 3 pairs held out."""
    write_jsonl(tmp_path / "pairs.jsonl", make_records(15))
    return make_config(tmp_path, model, epochs=2, eval_fraction=0.2, warmup_steps=1)


@pytest.fixture(autouse=True)
def _quick_curves(monkeypatch):
    """Drawing takes longer than everything else in these runs; one test has the real one."""
    monkeypatch.setattr(train_module, "draw_curves", lambda steps, evaluations, target: target.touch())


def test_a_run_from_files_to_files(config, monkeypatch):
    monkeypatch.setattr(train_module, "draw_curves", draw_curves)
    config = dataclasses.replace(config, eval_every=2, save_every=12, epochs=8)
    Trainer(config).train()
    out = Path(config.out)
    names = ["checkpoints", "curves.png", "evaluation.jsonl", "metrics.jsonl", "model", "reference.pt", "run.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    metrics = lines(config, without=())
    assert [line["step"] for line in metrics] == list(range(1, 25))
    assert metrics[0]["loss/mean"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("lr", "margin/mean", "accuracy/frac", "weight/mean", "weight/clipped_frac", "weight/ess", "grad_norm"):
        assert all(math.isfinite(line[name]) for line in metrics)
    assert metrics[0]["tokens_per_second"] == pytest.approx(metrics[0]["tokens"] / metrics[0]["seconds"])
    assert 10 < metrics[0]["peak_rss_mb"] < 100_000
    assert [line["step"] for line in lines(config, "evaluation.jsonl")] == [0, *range(2, 25, 2)]
    assert [path.name for path in checkpoints(out)] == ["step-000024"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    # it has learned the pairs it was shown
    last = metrics[-3:]
    assert sum(line["accuracy/frac"] for line in last) / 3 > 0.9
    assert sum(line["margin/mean"] for line in last) / 3 > 1


def test_the_saved_model_is_what_transformers_loads(config):
    trainer = Trainer(config)
    initial = {name: value.clone() for name, value in trainer.policy.model.state_dict().items()}
    trainer.train()
    folder = Path(config.out) / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in trainer.policy.model.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name
        assert not value.equal(initial[name]), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "w1"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert loaded.generate(ids, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(config, monkeypatch, number):
    config = dataclasses.replace(config, eval_every=2)
    whole = dataclasses.replace(config, out=config.out + "-whole")
    Trainer(whole).train()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, number)
        with pytest.raises(InterruptedRunError) as stop:
            trainer.train()
    assert str(stop.value) == f"stopped by {number.name} after step 4; go on with --resume"
    assert stop.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(lines(config)) == 4
    Trainer(config, resume=True).train()
    assert lines(config) == lines(whole)
    assert lines(config, "evaluation.jsonl") == lines(whole, "evaluation.jsonl")
    a, b = (AutoModelForCausalLM.from_pretrained(Path(c.out) / "model").state_dict() for c in (config, whole))
    assert all(a[name].equal(b[name]) for name in b)


@pytest.mark.parametrize("objective", ["bco", "beta_dpo"])
def test_what_an_objective_keeps_survives_a_stop(config, monkeypatch, objective):
    """A mean over all steps, and draws of pairs: an evaluation moves neither."""
    config = dataclasses.replace(config, objective=objective, beta=0.2, eval_every=2, max_tokens_per_micro_batch=1000)
    whole = dataclasses.replace(config, out=config.out + "-whole", eval_every=3)
    Trainer(whole).train()
    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGTERM)
        with pytest.raises(InterruptedRunError):
            trainer.train()
    resumed = Trainer(config, resume=True)
    assert resumed.state.state_dict() == trainer.state.state_dict()
    assert any(value != 0 for value in resumed.state.state_dict().values())
    resumed.train()
    assert lines(config) == lines(whole)


def test_a_crash_between_checkpoints_redoes_the_lost_steps_once(config, monkeypatch):
    config = dataclasses.replace(config, save_every=2, eval_every=1)
    whole = dataclasses.replace(config, out=config.out + "-whole")
    Trainer(whole).train()
    trainer = Trainer(config)
    save = Trainer.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", lambda self: save(self) if self.step < 4 else {}["crash"])
        with pytest.raises(KeyError, match="crash"):
            trainer.train()
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4]
    resumed = Trainer(config, resume=True)
    assert resumed.step == 2
    resumed.train()
    assert lines(config) == lines(whole)
    assert lines(config, "evaluation.jsonl") == lines(whole, "evaluation.jsonl")


def test_a_run_that_died_before_its_first_checkpoint_starts_over(config, monkeypatch):
    trainer = Trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "next_step", lambda self: {}["crash"])
        with pytest.raises(KeyError, match="crash"):
            trainer.train()
    Trainer(config, resume=True).train()
    assert [line["step"] for line in lines(config)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(config, "evaluation.jsonl")] == [0, 6]


def test_resuming_a_finished_run_changes_nothing(config):
    config = dataclasses.replace(config, save_every=3)
    Trainer(config).train()
    before = {path: path.stat().st_mtime_ns for path in (Path(config.out) / "model").iterdir()}
    metrics, evaluations = lines(config), lines(config, "evaluation.jsonl")
    Trainer(config, resume=True).train()
    assert {path: path.stat().st_mtime_ns for path in (Path(config.out) / "model").iterdir()} == before
    assert (lines(config), lines(config, "evaluation.jsonl")) == (metrics, evaluations)


def test_a_folder_with_a_run_is_refused_before_anything_is_read(config):
    Trainer(config).train()
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(dataclasses.replace(config, model="nowhere"))
    with pytest.raises(ValueError, match=r"lr: the run in .* was started with 0\.01, got 0\.02"):
        Trainer(dataclasses.replace(config, lr=0.02), resume=True)
    write_jsonl(Path(config.train_data), make_records(16))
    with pytest.raises(ValueError, match="the pairs are not those"):
        Trainer(config, resume=True)


def test_bad_data_is_refused_before_the_model_is_read_and_leaves_no_run(config, monkeypatch):
    monkeypatch.setattr(train_module, "load_policy", lambda *_, **__: pytest.fail("the model was read"))
    path = Path(config.train_data)
    path.write_text(path.read_text() + '{"prompt": "w1", "chosen": "w2", "rejected": ""}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl line 16: rejected: the completion is empty"):
        Trainer(config)
    assert not Path(config.out).exists()


def test_reference_log_probs_cover_what_the_run_uses_only(config):
    trainer = Trainer(dataclasses.replace(config, max_steps=2))
    used = sorted(trainer.order(0) + trainer.order(1))
    assert trainer.reference["train"].isfinite().all(1).nonzero()[:, 0].tolist() == used
    assert trainer.reference["heldout"].isfinite().all()


def test_another_model_as_reference(config, tmp_path_factory):
    other = make_model_folder(tmp_path_factory.mktemp("other"), seed=5)
    own = Trainer(config)
    trainer = Trainer(dataclasses.replace(config, reference_model=other, out=config.out + "-other"))
    expected = Trainer(dataclasses.replace(config, model=other, out=config.out + "-expected")).reference
    for name in ("train", "heldout"):
        torch.testing.assert_close(trainer.reference[name], expected[name], rtol=0, atol=0, equal_nan=True)
        assert not trainer.reference[name].equal(own.reference[name])
    for name, value in own.policy.model.state_dict().items():
        assert trainer.policy.model.state_dict()[name].equal(value)
    trainer.train()
    first = lines(trainer.config, "evaluation.jsonl")[0]
    assert abs(first["margin/mean"]) > 0.01


def test_other_objectives_and_options_train(config):
    for index, changes in enumerate(
        (
            {"objective": "ipo", "gradient_checkpointing": True},
            {"objective": "is_slic", "importance_mode": "per_completion", "freeze_head": True},
            {"objective": "is_ipo_mean", "importance_length_exponent": 1.0, "weight_decay": 0.1, "dtype": "bfloat16"},
            {"importance_normalize": True, "max_tokens_per_micro_batch": 1000, "attention": "eager"},
            {"backend": "reference", "max_workspace_mb": 64.0, "clip_grad_norm": None},
            {"objective": "simpo", "objective_options": "margin=0.3, sft_weight=0.1"},
            {"objective": "is_orpo"},
        )
    ):
        run = dataclasses.replace(config, max_steps=3, out=f"{config.out}-{index}", **changes)
        Trainer(run).train()
        assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_what_looks_at_all_pairs_needs_the_step_in_one_micro_batch(config):
    for changes in ({"importance_normalize": True}, {"objective": "sft"}, {"objective": "is_aot"}):
        why = "importance_normalize" if len(changes) == 1 and "objective" not in changes else "objective = "
        with pytest.raises(ValueError, match=rf"{why}.*: the .* tokens of step 1 must fit one micro-batch"):
            Trainer(dataclasses.replace(config, **changes))


def test_learning_rate(config):
    config = dataclasses.replace(config, lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 13, config) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert learning_rate(0, 1, dataclasses.replace(config, warmup_steps=0)) == 1.0


def flags(config, *names):
    return [text for name in names for text in ("--" + name.replace("_", "-"), str(getattr(config, name)))]


BASIC = ("model", "train_data", "out", "max_length", "max_prompt_length", "pairs_per_step")


def test_main_says_where_the_model_is(config, capsys):
    assert main([*flags(config, *BASIC), "--max-steps", "1"]) == 0
    assert f"trained model: {Path(config.out) / 'model'}" in capsys.readouterr().out


def test_main_reports_bad_input_in_one_line(config, capsys):
    Path(config.train_data).write_text('{"prompt": "w1"\n')
    assert main(flags(config, *BASIC)) == 1
    assert "isdaa-train: error: pairs.jsonl line 1: broken JSON" in capsys.readouterr().err


def test_main_reports_a_non_finite_loss(config, capsys):
    record = {"chosen_logprob": -1e308, "rejected_logprob": -1e308}
    records = [r | {"chosen_logprob": -5.0, "rejected_logprob": -5.0} for r in make_records(15)]
    write_jsonl(Path(config.train_data), [*records[:5], records[5] | record, *records[6:]])
    assert main([*flags(config, *BASIC), "--importance-mode", "none"]) == 1
    assert "non-finite loss; pair from pairs.jsonl line 6" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_on_a_signal_and_goes_on(config, number):
    command = [sys.executable, "-m", "isdaa_trainer", *flags(config, *BASIC), "--max-steps", "400"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not lines(config) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name} after step" in errors
    done = len(lines(config))
    assert 0 < done < 400
    assert checkpoints(Path(config.out))[-1].name == f"step-{done:06d}"
    assert json.loads((Path(config.out) / "run.json").read_text())["config"]["max_steps"] == 400
