import dataclasses
import json
import math
import re
import sys

import pytest
from isdaa_trainer.config import SECTIONS, Config, build_parser, parse_arguments, read_config_file

from isdaa_kernels import Routed

REQUIRED = {"model": "m", "train_data": "d.jsonl", "out": "o"}
ROUTED = {"gradient": "routed"}
FLAGS = ["--model", "m", "--train-data", "d.jsonl", "--out", "o"]


def write(path, text):
    path.write_text(text)
    return str(path)


def test_flags_make_a_config_with_the_defaults():
    config, resume = parse_arguments(FLAGS)
    assert config == Config(**REQUIRED)
    assert not resume
    assert (config.objective, config.beta, config.epsilon) == ("is_dpo", None, 1.0)


def test_flags_override_the_file(tmp_path):
    file = write(tmp_path / "run.json", json.dumps({**REQUIRED, "objective": {"beta": 0.5}, "lr": 1e-4}))
    config, resume = parse_arguments(["--config", file, "--lr", "3e-4", "--gradient-checkpointing", "--resume"])
    assert resume
    assert (config.beta, config.lr, config.gradient_checkpointing) == (0.5, 3e-4, True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_toml_with_and_without_sections_is_the_same(tmp_path):
    flat = write(tmp_path / "flat.toml", 'model = "m"\nbeta = 0.2\nfreeze_head = true\n')
    tables = write(tmp_path / "t.toml", '[model]\nmodel = "m"\nfreeze_head = true\n[objective]\nbeta = 0.2\n')
    assert read_config_file(flat) == read_config_file(tables) == {"model": "m", "beta": 0.2, "freeze_head": True}


def test_none_is_accepted_where_it_means_something():
    assert parse_arguments([*FLAGS, "--clip-grad-norm", "none"])[0].clip_grad_norm is None
    with pytest.raises(SystemExit):
        parse_arguments([*FLAGS, "--lr", "none"])


def test_every_field_is_a_flag_with_its_default_in_the_help():
    help_text = " ".join(build_parser().format_help().split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in help_text
        assert field.metadata["section"] in SECTIONS
    assert "peak learning rate of AdamW (default: 1e-06)" in help_text
    assert "output folder; must be empty or not exist, unless --resume (required)" in help_text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monitor_top_k": 0}, "monitor_top_k: expected a value at least 1, got 0"),
        ({"monitor_top_k": 65}, "monitor_top_k: expected a value at most 64, got 65"),
        ({"lr": -1.0}, "lr: expected a value above 0, got -1.0"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
        ({"epochs": 1.5}, "epochs: expected int, got 1.5"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ({"freeze_head": 1}, "freeze_head: expected bool, got 1"),
        ({"model": None}, "model: expected str, got None"),
        ({"max_steps": 0}, "max_steps: expected a value at least 1, got 0"),
        ({"eval_fraction": 1.0}, "eval_fraction: expected a value below 1, got 1.0"),
        ({"dtype": "float16"}, "dtype: expected one of float32, bfloat16, got 'float16'"),
        ({"objective": "is_ipoo"}, "got 'is_ipoo'; did you mean is_ipo?"),
        ({"max_prompt_length": 1024}, "max_prompt_length: expected less than max_length = 1024, got 1024"),
        ({"eval_data": "e", "eval_fraction": 0.1}, "eval_fraction: expected 0 beside eval_data, got 0.1"),
        ({"label_smoothing": 0.1, "objective": "ipo"}, "label_smoothing"),
        ({"objective": "kto"}, "objective: expected one of"),
        ({"objective": "wpo"}, "objective: expected one of"),
        ({"objective": "simpo", "objective_options": "gamma=1"}, "simpo: unknown option 'gamma'"),
        ({"objective": "simpo", "objective_options": "margin"}, "expected name=number,name=number, got 'margin'"),
        ({"objective": "simpo", "objective_options": "margin=x"}, "expected name=number,name=number, got 'margin=x'"),
        ({"objective": "simpo", "objective_options": "margin=1,margin=2"}, "objective_options: margin is given twice"),
        ({"beta": 1.0, "objective_options": "beta=2"}, "objective_options: beta is given twice"),
        ({"objective": "bco", "objective_options": "baseline=0.5"}, "bco: baseline: RewardMean gives it"),
        ({"objective": "beta_dpo", "objective_options": "keep=0.5"}, "beta_dpo: keep: BetaState gives it"),
        ({"objective": "beta_dpo", "objective_options": "gamma=1"}, "beta_dpo: unknown option 'gamma'"),
        ({"objective": "beta_dpo", "objective_options": "decay=2"}, "BetaState: decay: expected a number in [0, 1)"),
        ({"objective": "sft", "beta": 0.1}, "sft: unknown option 'beta'"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"importance_floor": 2.0}, "floor"),
        ({"objective": "dpo", "importance_power": 0.5}, "importance_power: dpo is not importance weighted"),
        ({"gradient": "sparse"}, "gradient: expected one of exact, routed, got 'sparse'"),
        ({**ROUTED, "routed_tolerance": -1e-3}, "routed_tolerance: expected a finite number from 0 on, got -0.001"),
        ({**ROUTED, "routed_tolerance": math.inf}, "routed_tolerance: expected a finite number, got inf"),
        ({**ROUTED, "routed_block": 48}, "routed_block: expected one of 32, 64, 128, 256, got 48"),
        ({**ROUTED, "routed_block": 64.0}, "routed_block: expected int or none, got 64.0"),
        ({**ROUTED, "routed_row_share": 1.5}, "routed_row_share: expected a number from 0 to 1, got 1.5"),
        ({**ROUTED, "vocab_order_every": -1}, "vocab_order_every: expected a value at least 0, got -1"),
        ({"routed_tolerance": 1e-3}, "routed_tolerance: expected nothing beside gradient = exact, got 0.001"),
        ({"routed_block": 64}, "routed_block: expected nothing beside gradient = exact, got 64"),
        ({"routed_row_share": 0.0}, "routed_row_share: expected nothing beside gradient = exact, got 0.0"),
        ({"vocab_order_every": 0}, "vocab_order_every: expected nothing beside gradient = exact, got 0"),
    ],
)
def test_bad_values_name_the_field_and_the_value(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**(REQUIRED | changes))


def test_settings_reach_the_objective():
    config = Config(**REQUIRED, beta=0.1, label_smoothing=0.1, epsilon=2.0, importance_mode="per_completion")
    settings = config.preference_settings()
    assert (settings["objective"], settings["beta"], settings["label_smoothing"]) == ("is_dpo", 0.1, 0.1)
    assert (settings["importance"].epsilon, settings["importance"].mode) == (2.0, "per_completion")
    assert Config(**REQUIRED, objective="ipo").preference_settings() == {
        "objective": "ipo",
        "importance": None,
    }


def test_options_of_the_objective_and_what_it_keeps():
    config = Config(**REQUIRED, objective="simpo", beta=3.0, objective_options="margin=0.5, sft_weight=1e-2")
    settings = {"objective": "simpo", "importance": None, "beta": 3.0, "margin": 0.5, "sft_weight": 0.01}
    assert config.preference_settings() == settings
    assert config.objective_state() is None
    assert Config(**REQUIRED, objective="bco", beta=0.3).objective_state().beta == 0.3
    assert Config(**REQUIRED, objective="bco").objective_state().beta == 0.01
    options = {"beta": 0.3, "objective_options": "strength=0.9", "seed": 7}
    beta_dpo = Config(**REQUIRED, objective="beta_dpo", **options)  # beta is the state's to give
    state = beta_dpo.objective_state()
    assert (state.beta, state.strength, state.seed) == (0.3, 0.9, 7)
    assert beta_dpo.preference_settings() == {"objective": "beta_dpo", "importance": None}


def test_routed_settings_reach_the_kernels_and_the_rest_is_theirs():
    assert Config(**REQUIRED).routed(2.0) is None
    assert Config(**REQUIRED, **ROUTED).routed() == Routed()
    given = ["--gradient", "routed", "--routed-tolerance", "1e-3", "--routed-block", "64", "--routed-row-share", "none"]
    config, _ = parse_arguments([*FLAGS, *given, "--vocab-order-every", "0"])
    assert config.routed(2.0) == Routed(tolerance=1e-3, scale=2.0, block=64)
    assert config.vocab_order_every == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"batch_size": 4, "betas": 1}', "unknown key batch_size"),
        ('{"betta": 1}', "unknown key betta; did you mean beta?"),
        ('{"objectiv": {"beta": 1}}', "unknown section [objectiv]; did you mean objective?"),
        ('{"model": {"beta": 1}}', "key beta belongs to [objective], found in [model]"),
        ('{"beta": 1, "objective": {"beta": 1}}', "key beta is given twice"),
        ("[1]", "expected an object of settings, got a list"),
        ('{"beta": }', "line 1 column 10"),
    ],
)
def test_bad_files_name_the_key(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"run.json.*{re.escape(message)}"):
        read_config_file(write(tmp_path / "run.json", text))


def test_missing_file_extension_and_required_setting(tmp_path):
    with pytest.raises(ValueError, match=r"config: no such file: nowhere\.json"):
        read_config_file("nowhere.json")
    with pytest.raises(ValueError, match=r"expected a \.json or \.toml file"):
        read_config_file(write(tmp_path / "run.yaml", ""))
    with pytest.raises(ValueError, match="out: required; give --out or put it in the config file"):
        parse_arguments(FLAGS[:4])


def test_toml_without_a_parser_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs Python 3\.11 or the package tomli"):
        read_config_file(write(tmp_path / "run.toml", ""))
