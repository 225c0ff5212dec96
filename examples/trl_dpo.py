"""DPO with TRL on any model and preference data, with or without the kernels of this package; prints seconds a step and peak memory.

    python examples/trl_dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/ultrafeedback_binarized \\
        --output_dir runs/trl --max_steps 20
    ... --kernels                                          # TRL's losses, our kernels
    ... --kernels --objective is_dpo                       # ISDPOTrainer: an objective of ours
    ... --kernels --lora --precompute_ref_log_probs        # and whatever else DPOTrainer does

All other flags are those of TRL's DPOConfig, or of ISDPOConfig where --objective is among them.
"""

import argparse
import resource
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer, TrlParser

from isdaa_kernels.integrations.trl import patch_trl
from isdaa_kernels.integrations.trl_trainer import ISDPOConfig, ISDPOTrainer


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    ours, rest = parse_own(arguments)
    with_objective = any(argument.split("=")[0] == "--objective" for argument in rest)
    trainer_class, config_class = (ISDPOTrainer, ISDPOConfig) if with_objective else (DPOTrainer, DPOConfig)
    (config,) = TrlParser((config_class,)).parse_args_and_config(rest)
    with patch_trl() if ours.kernels else nullcontext():
        trainer = trainer_class(
            ours.model,
            args=config,
            train_dataset=read(ours.dataset, ours.split),
            peft_config=lora() if ours.lora else None,
        )
        run = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_model()
    found = {"seconds_per_step": run.metrics["train_runtime"] / max(run.global_step, 1), "peak_mib": peak_mib()}
    print(f"kernels={ours.kernels}  {found['seconds_per_step']:.3f} s a step  peak {found['peak_mib']:.0f} MiB")
    return found


def parse_own(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="hub name or folder")
    parser.add_argument(
        "--dataset", required=True, help="hub name, or a .jsonl or .parquet file: prompt, chosen, rejected"
    )
    parser.add_argument("--split", default="train")
    parser.add_argument("--kernels", action="store_true", help="run TRL on the kernels of this package")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16 on all linear layers")
    return parser.parse_known_args(arguments)


def read(dataset: str, split: str) -> Dataset:
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(dataset).suffix)
    return load_dataset(dataset, split=split) if kind is None else load_dataset(kind, data_files=dataset, split="train")


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def peak_mib() -> float:
    """Of the GPU where there is one, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
