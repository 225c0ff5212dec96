"""LLaMA-Factory with and without `patch_llama_factory`, run by run: the same losses, metrics and weights, stage by stage. Not part of the
test suite, as CI does not install it; in an environment with llamafactory 0.9.5 (docs/integrations/llama_factory.md says how):

    PYTHONPATH=.:python:tests python tests/check_llama_factory.py
"""

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from check_models import make_model, make_words
from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file

from isdaa_kernels import linear_logprob
from isdaa_kernels.integrations import llama_factory, transformers
from isdaa_kernels.integrations.llama_factory import patch_llama_factory

COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
QUICK = {
    "do_train": True,
    "template": "default",
    "cutoff_len": 64,
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "finetuning_type": "full",
    "report_to": "none",
    "use_cpu": True,
    "overwrite_output_dir": True,
    "overwrite_cache": True,
    "preprocessing_num_workers": 1,
    "disable_tqdm": True,
    "seed": 3,
    "val_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 2,
}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
DPO = {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.2}
RUNS = {
    **{f"dpo {loss}": {**DPO, "pref_loss": loss} for loss in ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")},
    "dpo with label smoothing, ftx and bco": {
        **DPO,
        "dpo_label_smoothing": 0.1,
        "pref_ftx": 0.3,
        "pref_bco_weight": 0.5,
    },
    "ld-dpo": {**DPO, "ld_alpha": 0.4},
    "dpo lora": {**DPO, **LORA},
    "dpo bf16": {**DPO, "bf16": True},
    "kto": {"stage": "kto", "dataset": "rated", "pref_ftx": 0.2},
    "sft": {"stage": "sft", "dataset": "answers"},
    "sft lora, accumulated": {"stage": "sft", "dataset": "answers", **LORA, "gradient_accumulation_steps": 2},
    "sft bf16": {"stage": "sft", "dataset": "answers", "bf16": True},
    "sft with accuracy": {"stage": "sft", "dataset": "answers", "compute_accuracy": True},
    "pt": {"stage": "pt", "dataset": "texts"},
}
REFUSED = {
    "use_dft_loss": {"stage": "sft", "dataset": "answers", "use_dft_loss": True},
    "use_eaft_loss": {"stage": "sft", "dataset": "answers", "use_eaft_loss": True},
    "label_smoothing_factor": {"stage": "sft", "dataset": "answers", "label_smoothing_factor": 0.1},
}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_data(folder / "data")
        only = sys.argv[1:]
        failed = [run for run in RUNS if (not only or run in only) and not same(folder, run)]
        failed += [option for option in REFUSED if (not only or option in only) and not refused(folder, option)]
    print("failed: " + ", ".join(failed) if failed else "all the same")
    return len(failed)


def same(folder: Path, run: str) -> bool:
    """Whether both runs log the same and end with the same weights."""
    logs, weights = zip(*(train(folder, RUNS[run], patched) for patched in (False, True)), strict=True)
    names = [set(log) for step in logs for log in step]
    off = max(
        abs(mine[name] - theirs[name]) / max(1.0, abs(theirs[name]))
        for theirs, mine in zip(*logs, strict=True)
        for name in theirs
        if not ("bf16" in run and "accuracies" in name)  # of rewards that are equal but for rounding
    )
    far = max((mine - theirs).abs().max().item() for theirs, mine in zip(*map(dict.values, weights), strict=True))
    limit = 5e-2 if "bf16" in run else 2e-4
    good = (
        len(logs[0]) == len(logs[1]) > 0
        and off < limit
        and far < limit
        and names[: len(logs[0])] == names[len(logs[0]) :]
    )
    print(f"{run}: {'same' if good else 'DIFFERENT'}, {len(names[0])} numbers, off by {off:.1e}, weights by {far:.1e}")
    return good


def refused(folder: Path, option: str) -> bool:
    try:
        train(folder, REFUSED[option], True)
    except ValueError as error:
        print(f"{option}: {error}")
        return option in str(error)
    print(f"{option}: NOT REFUSED")
    return False


def train(folder: Path, settings: dict, patched: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """(what a run logs step by step, without times; the weights that it saved)."""
    out = Path(tempfile.mkdtemp(dir=folder))
    where = {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder / "data"),
        "output_dir": str(out),
    }
    calls = [patch.object(module, "linear_logprob", wraps=linear_logprob) for module in (llama_factory, transformers)]
    with patch_llama_factory() if patched else nullcontext(), calls[0] as rows, calls[1] as losses:
        run_exp({**QUICK, **where, **settings})
    assert (rows.called or losses.called) == patched, "the kernels did not run" if patched else "they ran"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    [saved] = out.glob("*model.safetensors")
    times = ("runtime", "per_second", "flos")
    logs = [{k: v for k, v in log.items() if not any(time in k for time in times)} for log in history]
    return logs, load_file(saved)


def make_data(folder: Path, count: int = 24) -> None:
    folder.mkdir()
    words = make_words()
    pairs = [{"prompt": words(4 + i % 3), "chosen": words(5 + i % 4), "rejected": words(7)} for i in range(count)]
    rated = [{"prompt": p["prompt"], "answer": p["chosen"], "good": i % 3 > 0} for i, p in enumerate(pairs)]
    files = {
        "pairs": (pairs, {"ranking": True, "columns": COLUMNS}),
        "rated": (rated, {"columns": {"prompt": "prompt", "response": "answer", "kto_tag": "good"}}),
        "answers": (rated, {"columns": {"prompt": "prompt", "response": "answer"}}),
        "texts": ([{"text": words(30)} for _ in range(count)], {"columns": {"prompt": "text"}}),
    }
    for name, (records, _) in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    about = {name: {"file_name": f"{name}.json", **columns} for name, (_, columns) in files.items()}
    (folder / "dataset_info.json").write_text(json.dumps(about))


if __name__ == "__main__":
    sys.exit(main())
