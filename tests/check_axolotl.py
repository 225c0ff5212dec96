"""Axolotl with and without `ISDAAPlugin`, run by run: the same losses, metrics and weights. Not part of the test suite, as CI does not
install it; in an environment with axolotl 0.21.0 (docs/integrations/axolotl.md says how):

    AXOLOTL_DO_NOT_TRACK=1 PYTHONPATH=.:python:tests python tests/check_axolotl.py
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.integrations.base import PluginManager
from check_models import make_model, make_words
from safetensors.torch import load_file

from isdaa_kernels.integrations import transformers, trl

PLUGIN = "isdaa_kernels.integrations.axolotl.ISDAAPlugin"
QUICK = {
    "model_type": "LlamaForCausalLM",
    "tokenizer_type": "PreTrainedTokenizerFast",
    "sequence_len": 64,
    "max_steps": 4,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "optimizer": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 3,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "use_cpu": True,
    "attn_implementation": "sdpa",
    "dataset_num_proc": 1,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "dataset_prepared_path": None,
    "save_safetensors": True,
    "special_tokens": {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"},
}
NO_CUDA = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, **NO_CUDA}
DEFINED = {"field_prompt": "prompt", "prompt_format": "{prompt}"}
PAIRS = {
    **DEFINED,
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "chosen_format": " {chosen}",
    "rejected_format": " {rejected}",
}
RATED = {**DEFINED, "field_completion": "answer", "field_label": "good", "completion_format": " {completion}"}
DATA = {
    "dpo": {"type": PAIRS},
    "kto": {"type": RATED},
    "sft": {"type": "alpaca"},
}
RUNS = {
    "dpo": {"rl": "dpo"},
    "dpo hinge": {"rl": "dpo", "dpo_loss_type": ["hinge"]},
    "ipo": {"rl": "ipo"},
    "dpo lora": {"rl": "dpo", **LORA},
    "kto": {"rl": "kto", "remove_unused_columns": False},
    "sft": {},
    "sft lora, accumulated": {**LORA, "gradient_accumulation_steps": 2},
    "sft packed": {"sample_packing": True, "pad_to_sequence_len": True},
}
REFUSED = {
    "rl": ({"rl": "orpo"}, NotImplementedError),
    "dpo_use_liger_kernel": ({"rl": "dpo", "dpo_use_liger_kernel": False}, ValueError),
    "isdaa_tolerance": ({"isdaa_tolerance": 1e-3}, ValueError),
}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_data(folder)
        only = sys.argv[1:]
        failed = [run for run in RUNS if (not only or run in only) and not same(folder, run)]
        failed += [option for option in REFUSED if (not only or option in only) and not refused(folder, option)]
    print("failed: " + ", ".join(failed) if failed else "all the same")
    return len(failed)


def same(folder: Path, run: str) -> bool:
    """Whether both runs log the same (what both log) and end with the same weights."""
    logs, weights = zip(*(train(folder, RUNS[run], patched) for patched in (False, True)), strict=True)
    both = [set(theirs) & set(mine) for theirs, mine in zip(*logs, strict=True)]
    off = max(
        abs(mine[name] - theirs[name]) / max(1.0, abs(theirs[name]))
        for theirs, mine, names in zip(*logs, both, strict=True)
        for name in names
    )
    far = max((mine - theirs).abs().max().item() for theirs, mine in zip(*map(dict.values, weights), strict=True))
    missing = sorted({name for theirs, names in zip(logs[0], both, strict=True) for name in set(theirs) - names})
    good = off < 2e-4 and far < 2e-4 and "loss" in both[0]
    print(
        f"{run}: {'same' if good else 'DIFFERENT'}, {len(both[0])} numbers, off by {off:.1e}, weights by {far:.1e}"
        + (f"; without {', '.join(missing)}" if missing else "")
    )
    return good


def refused(folder: Path, option: str) -> bool:
    settings, kind = REFUSED[option]
    try:
        train(folder, settings, True)
    except kind as error:
        print(f"{option}: {error}")
        return option in str(error)
    print(f"{option}: NOT REFUSED")
    return False


def train(folder: Path, settings: dict, patched: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """(what a run logs step by step, without times and memory; the weights that it saved)."""
    PluginManager._instance = None  # one run of a process, as on the command line
    out = Path(tempfile.mkdtemp(dir=folder))
    kind = {"ipo": "dpo", "orpo": "dpo"}.get(settings.get("rl"), settings.get("rl", "sft"))
    data = {"ds_type": "json", "path": str(folder / f"{kind}.json"), "split": "train", **DATA[kind]}
    config = {**QUICK, "base_model": str(folder / "model"), "output_dir": str(out / "run"), "datasets": [data]}
    config |= {**settings, "dataset_prepared_path": str(out / "prepared"), "plugins": [PLUGIN] if patched else []}
    (out / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    calls = [patch.object(module, name, wraps=getattr(module, name)) for module, name in KERNELS]
    logs: list[dict[str, float]] = []
    with (
        calls[0] as losses,
        calls[1] as plain,
        calls[2] as with_stats,
        patch("transformers.Trainer.log", logging(logs)),
    ):
        do_train(load_cfg(str(out / "config.yaml")), None)
    assert (losses.called or plain.called or with_stats.called) == patched, f"patched {patched}: {losses.called}"
    saved, *_ = sorted((out / "run").glob("*model*.safetensors"))  # adapters come first
    return logs, load_file(saved)


KERNELS = ((transformers, "linear_logprob"), (trl, "linear_logprob"), (trl, "linear_logprob_stats"))


def logging(into: list[dict[str, float]]):
    from transformers import Trainer

    original = Trainer.log

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            no = ("runtime", "per_second", "flos", "memory", "tokens/")
            into.append({k: float(v) for k, v in logs.items() if not any(word in k for word in no)})
        return original(self, logs, *args, **kwargs)

    return log


def make_data(folder: Path, count: int = 24) -> None:
    words = make_words()
    pairs = [{"prompt": words(4 + i % 3), "chosen": words(5 + i % 4), "rejected": words(7)} for i in range(count)]
    rated = [{"prompt": p["prompt"], "answer": p["chosen"], "good": i % 3 > 0} for i, p in enumerate(pairs)]
    tuned = [{"instruction": p["prompt"], "input": "", "output": p["chosen"]} for p in pairs]
    for name, records in {"dpo": pairs, "kto": rated, "sft": tuned}.items():
        (folder / f"{name}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    sys.exit(main())
