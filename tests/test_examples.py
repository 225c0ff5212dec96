"""The example loops, run on a tiny model: they learn, and both do the same."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_fixtures import make_model, make_model_folder, make_records, make_tokenizer, write_jsonl

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {"lr": 1e-3, "pairs_per_step": 4}


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def load(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)["train"]


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
@pytest.mark.parametrize("chat_template", [True, False])
def test_a_loop_learns(name, chat_template):
    tokenizer = make_tokenizer() if chat_template else make_tokenizer(None)
    model, pairs = make_model(), make_records(4) * 12
    losses = load(name)(model, tokenizer, pairs, objective="dpo", beta=0.1, **SETTINGS)
    assert len(losses) == 12
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    assert losses[-1] < 0.6


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_an_objective_without_beta(name):
    (loss,) = load(name)(make_model(), make_tokenizer(None), make_records(4), objective="orpo", **SETTINGS)
    assert loss > 0


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "attention_bias": True}], ids=("tied", "untied")
)
def test_both_loops_do_the_same(changes):
    models = [make_model(**changes) for _ in range(2)]
    pairs = make_records(12)
    losses = [
        load(name)(model, make_tokenizer(), pairs, steps=3, **SETTINGS)
        for name, model in zip(("plain_loop", "accelerate_loop"), models, strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def low_words(prompt, answer):
    words = [int(word[1:]) for word in answer.split() if word[1:].isdigit()]
    return sum(number < 50 for number in words) / max(len(words), 1)


def test_grpo_learns_what_is_rewarded():
    prompts, model = [record["prompt"] for record in make_records(4)] * 10, make_model()
    torch.manual_seed(0)
    options = {"max_new_tokens": 8, "lr": 3e-3, "kl_weight": 0.01}
    means = load("grpo_loop")(model, make_tokenizer(), prompts, low_words, **options)
    assert len(means) == 20
    assert sum(means[-4:]) > sum(means[:4]) + 1.2  # of at most 4


def test_what_grpo_writes_and_rewards():
    write = runpy.run_path(str(EXAMPLES / "grpo_loop.py"))["write"]
    seen = []

    def reward(prompt, answer):
        seen.append((prompt, answer))
        return len(answer)

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    batch, rewards = write(make_model(), tokenizer, ["w1 w2", "w3"], 3, 12, reward)
    assert [prompt for prompt, _ in seen] == ["w1 w2"] * 3 + ["w3"] * 3
    scored = batch["labels"] != -100
    assert torch.equal(batch["labels"][scored], batch["input_ids"][scored])
    assert scored.sum(-1).max() <= 12
    for row, mask, (_, answer), score in zip(batch["input_ids"], scored, seen, rewards, strict=True):
        assert tokenizer.decode(row[mask], skip_special_tokens=True) == answer
        assert score == len(answer)
        assert tokenizer.eos_token_id not in row[mask][:-1]
    assert (batch["attention_mask"].bool() | ~scored).all()


def test_the_batch():
    make_batch = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["make_batch"]
    tokenizer, pair = make_tokenizer(), {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5 w6"}
    batch = make_batch(tokenizer, [pair], "cpu")
    words = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
    assert words[1] == ["<|user|>", "w1", "w2", "<|end|>", "<|line|>", "<|assistant|>", "w4", "w5", "w6", "<|end|>"]
    assert words[0][6:8] == ["w3", "<|end|>"]
    scored = batch["labels"] != -100
    assert scored.sum(-1).tolist() == [2, 4]
    assert batch["attention_mask"].sum(-1).tolist() == [8, 10]
    assert torch.equal(batch["labels"][scored], batch["input_ids"][scored])


def run(script, *arguments, launcher=(), **environment):
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [("plain_loop", "no"), ("accelerate_loop", "no"), ("accelerate_loop", "bf16")]
)
def test_as_a_command(name, precision, tmp_path):
    folder = make_model_folder(tmp_path / "model")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_records(8))
    options = ("--steps", 2, "--objective", "dpo")
    lines = run(EXAMPLES / f"{name}.py", folder, pairs, *options, ACCELERATE_MIXED_PRECISION=precision).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("1: loss 0.693")


@pytest.mark.slow
def test_grpo_as_a_command(tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "w1 w2"}, {"prompt": "w3"}] * 2)
    folder = make_model_folder(tmp_path / "model")
    options = ("--steps", 2, "--group", 2, "--max-new-tokens", 4, "--reward", "operator:eq")
    lines = run(EXAMPLES / "grpo_loop.py", folder, prompts, *options).splitlines()
    assert [line.split(",")[0] for line in lines] == ["1: reward 0.000", "2: reward 0.000"]


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_records(16))
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import torch\n"
        "from plain_loop import read_arguments\n"
        "from accelerate_loop import train, Accelerator\n"
        "model, tokenizer, pairs, options = read_arguments('', sys.argv[2:])\n"
        "accelerator = Accelerator()\n"
        "train(model, tokenizer, pairs, accelerator=accelerator, **options)\n"
        "if accelerator.is_main_process: torch.save(model.state_dict(), sys.argv[1])\n"
    )
    states = []
    for processes in (1, 2):
        out, launcher = tmp_path / f"{processes}.pt", ("-m", "torch.distributed.run", "--standalone")
        options = ("--lr", 1e-3, "--pairs-per-step", 8 // processes)
        run(script, out, folder, pairs, *options, launcher=(*launcher, "--nproc_per_node", str(processes)))
        states.append(torch.load(out))
    start = make_model().state_dict()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)
    assert any((states[0][name] - start[name]).abs().max() > 1e-3 for name in start)
