"""A tiny model, its tokenizer and preference files for the tests of the trainer."""

import json
import signal
from pathlib import Path
from typing import Any

import isdaa_trainer.train as train_module
import pytest
import torch
from isdaa_trainer.checkpoint import read_lines
from isdaa_trainer.config import Config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MARKS = ("<|pad|>", "<|end|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>", "<|line|>")
VOCAB_SIZE = 200
# like the usual templates, it writes something after the end of turn that a model never generates
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> <|line|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word: w0, w1, ... and the marks of the chat template."""
    vocab = {word: index for index, word in enumerate((*MARKS, *(f"w{i}" for i in range(VOCAB_SIZE - len(MARKS)))))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        additional_special_tokens=list(MARKS[3:]),
    )
    fast.chat_template = chat_template
    return fast


# what the configuration of any small random model starts from
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama of 2 layers, D = 32, V = 200, whose answers already depend on the words."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": True, **changes})).eval()


def make_model_folder(folder: Path, seed: int = 0, **changes: object) -> str:
    make_model(seed, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Records whose chosen answers lean to low words and rejected ones to high words: something to learn."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int, length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(low, high, (length,), generator=generator).tolist())

    return [
        {
            "prompt": words(0, 190, 3 + i % 4),
            "chosen": words(0, 120, 4 + i % 3),
            "rejected": words(70, 190, 5 + i % 2),
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_config(folder: Path, model: str, **changes: object) -> Config:
    """Settings of a run of a few steps that takes about a second, in `folder`."""
    settings = {
        "model": model,
        "train_data": str(folder / "pairs.jsonl"),
        "out": str(folder / "run"),
        "lr": 1e-2,
        "max_length": 64,
        "max_prompt_length": 32,
        "pairs_per_step": 4,
        "max_tokens_per_micro_batch": 80,
    }
    return Config(**(settings | changes))


TIMES = ("seconds", "tokens_per_second", "peak_rss_mb", "vocab_order_seconds")


def lines(config: Config, name: str = "metrics.jsonl", without: tuple[str, ...] = TIMES) -> list[dict[str, Any]]:
    """What a run has written, without what no two runs have in common."""
    found = read_lines(Path(config.out) / name, last_step=10**9)
    return [{key: value for key, value in line.items() if key not in without} for line in found]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends the signal while `step` is being done."""

    def interrupting(*arguments, **options):
        if options["step"] == step:
            signal.raise_signal(number)
        return train_step(*arguments, **options)

    train_step = train_module.train_step
    monkeypatch.setattr(train_module, "train_step", interrupting)
