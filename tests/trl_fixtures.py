"""A tiny model in a folder, preference data and settings of a few steps for the tests of the TRL integration."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trainer_fixtures import make_model_folder, make_records, make_tokenizer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

# what TRL's configurations have in common here
QUICK = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


def make_folder(folder: Path, **changes: object) -> str:
    """A random Llama of 2 layers, V = 300, with its tokenizer."""
    return make_model_folder(folder / "model", **{"vocab_size": 300, **changes})


def make_pairs(count: int = 24, seed: int = 0) -> Dataset:
    """Pairs whose completions begin with a space: TRL joins them to the prompt as they are."""
    records = make_records(count, seed)
    return Dataset.from_list([{**r, "chosen": " " + r["chosen"], "rejected": " " + r["rejected"]} for r in records])


class Losses(TrainerCallback):
    """What a run logs, step by step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append({name: value for name, value in logs.items() if not is_time(name)})


def is_time(name: str) -> bool:
    return any(word in name for word in ("runtime", "per_second", "flos"))


def train(
    folder: Path,
    model: Any,
    trainer: type = DPOTrainer,
    config: type = DPOConfig,
    data: Dataset | None = None,
    resume: str | None = None,
    **settings: object,
) -> tuple[Any, list[dict[str, float]]]:
    """(the trainer after its run, what it logged). Settings that no configuration has go to the trainer."""
    of_trainer = {
        name: settings.pop(name)
        for name in ("ref_model", "teacher_model", "peft_config", "eval_dataset", "reward_funcs")
        if name in settings
    }
    losses = Losses()
    built = trainer(
        model=model,
        args=config(str(folder), **{**QUICK, **settings}),
        train_dataset=make_pairs() if data is None else data,
        processing_class=make_tokenizer(None),
        callbacks=[losses],
        **of_trainer,
    )
    torch.manual_seed(0)
    built.train(resume_from_checkpoint=resume)
    return built, losses.logs
