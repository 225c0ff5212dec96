"""The command line and the loop: settings -> data, policy, reference -> steps -> a trained model on disk."""

import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from isdaa_kernels import OBJECTIVES, NoBackend
from isdaa_trainer import checkpoint as disk
from isdaa_trainer.config import Config, parse_arguments
from isdaa_trainer.curves import draw_curves
from isdaa_trainer.data import Pair, PreferenceData, load_data, step_order
from isdaa_trainer.model import Policy, load_policy, load_tokenizer
from isdaa_trainer.routing import Routing, check_routing
from isdaa_trainer.step import NonFiniteError, evaluate, pair_logprob, train_step


class InterruptedRunError(Exception):
    """The run was asked to stop by a signal; it has finished its step and saved a checkpoint."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; go on with --resume")
        self.exit_code = 128 + number


class Trainer:
    """A run: reads data and model on construction, trains by `train()`. `step` counts the steps done."""

    def __init__(self, config: Config, resume: bool = False) -> None:
        self.config, self.out = config, Path(config.out)
        disk.check_output(self.out, resume)
        torch.manual_seed(config.seed)
        tokenizer = load_tokenizer(config.model)
        self.data = load_data(config, tokenizer)
        for note in self.data.notes:
            tqdm.write(note)
        self.num_steps = count_steps(config, self.data)
        refuse_cut_steps(config, self.data, self.num_steps)
        if resume:
            disk.check_same_run(self.out, config, self.data.fingerprint())
        newest = (disk.checkpoints(self.out) or [None])[-1]
        self.step = disk.step_of(newest) if newest else 0
        self.policy = load_policy(config, tokenizer, path=str(newest) if newest else None)
        if config.gradient == "routed":
            check_routing(self.policy, config)
        self.optimizer, self.routing = make_optimizer(self.policy, config), Routing(config)
        self.state = config.objective_state()
        if self.state is not None:
            self.state.to(self.policy.device)
        if newest:
            disk.restore(newest, self.policy, self.optimizer, self.routing, self.state)
        else:
            disk.write_run(self.out, config, self.data.fingerprint())
        self.reference = self.load_reference()
        for name in ("metrics.jsonl", "evaluation.jsonl"):
            disk.truncate_lines(self.out / name, last_step=self.step if newest else -1)

    def load_reference(self) -> dict[str, torch.Tensor]:
        """Reference log-probs of the pairs this run sees, float64 [pairs, 2] of each split; made once, then read."""
        path = self.out / "reference.pt"
        if path.is_file():
            return torch.load(path, weights_only=True)
        assert self.step == 0, f"{path} is missing, and the policy is no longer the initial one"
        policy = self.policy
        if self.config.reference_model is not None:
            policy = load_policy(self.config, self.policy.tokenizer, path=self.config.reference_model)
        used = sorted({index for step in range(self.num_steps) for index in self.order(step)})
        train = torch.full((len(self.data.train), 2), math.nan, dtype=torch.float64)
        train[used] = pair_logprob(policy, [self.data.train[i] for i in used], self.config, "reference log-probs")
        heldout = pair_logprob(policy, self.data.heldout, self.config, "reference log-probs, held out")
        with disk.whole_file(path) as partial:
            torch.save({"train": train, "heldout": heldout}, partial)
        return {"train": train, "heldout": heldout}

    def order(self, step: int) -> list[int]:
        """Indices of the training pairs of a step, counted from 0."""
        return step_order(step, len(self.data.train), self.config.pairs_per_step, self.config.seed)

    def train(self) -> None:
        """Runs the steps that are left and saves the model; InterruptedRunError after a signal, with a checkpoint."""
        with (
            stop_signals() as received,
            tqdm(total=self.num_steps, initial=self.step, desc="training", unit="step") as bar,
        ):
            if self.step == 0:
                self.evaluate()
            while self.step < self.num_steps:
                metrics = self.next_step()
                bar.set_postfix(loss=f"{metrics['loss/mean']:.4f}", accuracy=f"{metrics['accuracy/frac']:.2f}")
                bar.update()
                if due(self.step, self.config.eval_every) and self.step < self.num_steps:
                    self.evaluate()
                if received or due(self.step, self.config.save_every):
                    self.save_checkpoint()
                if received:
                    raise InterruptedRunError(self.step, received[0])
            self.finish()

    def next_step(self) -> dict[str, float]:
        """One step on the next pairs, and its line in metrics.jsonl."""
        start = time.perf_counter()
        order = self.order(self.step)
        lr = learning_rate(self.step, self.num_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        refreshed = self.refresh_order()
        pairs: list[Pair] = [self.data.train[index] for index in order]
        metrics = train_step(
            self.policy,
            self.optimizer,
            pairs,
            self.reference["train"][order],
            self.config,
            step=self.step + 1,
            routing=self.routing,
            state=self.state,
        )
        metrics |= refreshed
        self.step += 1
        seconds = time.perf_counter() - start
        metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds, "peak_rss_mb": peak_rss_mb()}
        disk.append_line(self.out / "metrics.jsonl", {"step": self.step, "lr": lr, **metrics})
        return metrics

    def refresh_order(self) -> dict[str, float]:
        """Makes the order of the vocabulary anew where it is due: the seconds it took, for the line of the step."""
        if not self.routing.due(self.step):
            return {}
        start = time.perf_counter()
        self.routing.make_order(self.policy, self.data.train)
        return {"vocab_order_seconds": time.perf_counter() - start}

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out pairs, with their line in evaluation.jsonl; nothing where there are none."""
        if not self.data.heldout:
            return {}
        reference = self.reference["heldout"]
        initial = self.step == 0 and self.config.reference_model is None  # the policy still is the reference
        logprob = reference if initial else pair_logprob(self.policy, self.data.heldout, self.config, "evaluation")
        metrics = evaluate(logprob, reference, self.data.heldout, self.config, self.state)
        disk.append_line(self.out / "evaluation.jsonl", {"step": self.step, **metrics})
        return metrics

    def save_checkpoint(self) -> None:
        disk.save_checkpoint(
            self.out, self.step, self.policy, self.optimizer, self.routing, self.config.keep_checkpoints, self.state
        )
        self.draw()

    def draw(self) -> None:
        lines = [disk.read_lines(self.out / name, self.step) for name in ("metrics.jsonl", "evaluation.jsonl")]
        draw_curves(*lines, self.out / "curves.png")

    def finish(self) -> None:
        """Evaluation, curves and the trained model; nothing if the run had finished before."""
        if (self.out / "model").exists():
            return
        disk.truncate_lines(self.out / "evaluation.jsonl", last_step=self.num_steps - 1)
        self.evaluate()
        self.draw()
        with disk.whole_folder(self.out / "model") as folder:
            self.policy.save(folder)


def count_steps(config: Config, data: PreferenceData) -> int:
    return config.max_steps or config.epochs * -(-len(data.train) // config.pairs_per_step)


def refuse_cut_steps(config: Config, data: PreferenceData, num_steps: int) -> None:
    """ValueError if a step needs more than one micro-batch where the loss of a pair depends on the others: an objective of the whole
    batch, or weights to be divided by their mean."""
    why = "importance_normalize" if config.importance_normalize else f"objective = {config.objective}"
    if not config.importance_normalize and not OBJECTIVES[config.objective].whole_batch:
        return
    for step in range(num_steps):
        order = step_order(step, len(data.train), config.pairs_per_step, config.seed)
        size = sum(data.train[index].num_tokens for index in order)
        if size > config.max_tokens_per_micro_batch:
            raise ValueError(
                f"{why}: the {size} tokens of step {step + 1} must fit one micro-batch, got "
                f"max_tokens_per_micro_batch = {config.max_tokens_per_micro_batch}"
            )


def make_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; weight decay on matrices only."""
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def learning_rate(step: int, num_steps: int, config: Config) -> float:
    """Of `step`, counted from 0: linear warm-up to lr, then a cosine to min_lr_ratio * lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    ratio = config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    return config.lr * ratio


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 1024


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM instead of their usual effect; the second one has it again."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        tqdm.write("finishing what is under way, then saving; once more to stop at once")
        restore()

    for number in previous:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def main(arguments: list[str] | None = None) -> int:
    """The command `isdaa-train`; returns its exit status."""
    try:
        config, resume = parse_arguments(arguments)
        trainer = Trainer(config, resume)
        trainer.train()
    except InterruptedRunError as interruption:
        print(f"isdaa-train: {interruption}", file=sys.stderr)
        return interruption.exit_code
    except (ValueError, ImportError, NoBackend, NonFiniteError) as error:
        print(f"isdaa-train: error: {error}", file=sys.stderr)
        return 1
    print(f"trained model: {trainer.out / 'model'}; curves: {trainer.out / 'curves.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
