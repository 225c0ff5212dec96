"""One optimizer step of IS-DAA, the log-probs it compares with, and the evaluation on held-out pairs.

Letters: N tokens of a packed micro-batch, D hidden size, P pairs, S = 2P sequences (chosen 0..P-1, rejected P..2P-1).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from isdaa_kernels import PreferenceLoss, linear_logprob, linear_preference_loss, preference_loss, sequence_logprob
from isdaa_trainer.config import Config
from isdaa_trainer.data import MicroBatch, Pair, micro_batches, pack
from isdaa_trainer.model import Policy


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    reference: torch.Tensor,
    config: Config,
    step: int,
) -> dict[str, float]:
    """Moves the policy by one step on `pairs`; returns the metrics of `preference_loss`, grad_norm and tokens.

    reference: [len(pairs), 2] float64 log-probs of (chosen, rejected) under the reference policy.
    Raises NonFiniteError, naming the step and the pairs, before the optimizer sees a non-finite loss or gradient.
    """
    parts = []
    for batch in micro_batches(pairs, config.max_tokens_per_micro_batch, reference):
        # The sum over the micro-batches is divided by the pairs of the step, so that how they are cut does not matter.
        loss, metrics = pair_loss(policy, batch.to(policy.device), config, denominator=len(pairs))
        loss.backward()
        parts.append((len(batch.pairs), loss.detach(), metrics))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm or math.inf)
    for name, value in (("loss", sum(loss for _, loss, _ in parts)), ("gradient", grad_norm)):
        if not torch.isfinite(value):
            raise NonFiniteError(
                f"step {step}: non-finite {name}; {blame(policy, optimizer, pairs, reference, config)}"
            )
    optimizer.step()
    optimizer.zero_grad()
    metrics = merge_metrics([(size, metrics) for size, _, metrics in parts])
    return metrics | {"grad_norm": grad_norm.item(), "tokens": sum(pair.num_tokens for pair in pairs)}


def pair_loss(policy: Policy, batch: MicroBatch, config: Config, denominator: int) -> PreferenceLoss:
    """The differentiable loss of a micro-batch: hidden states -> loss, without logits."""
    hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
    with policy.autocast():
        return linear_preference_loss(
            hidden_ND,
            policy.head(),
            batch.targets,
            batch.cu_seqlens,
            reference_logprob=batch.reference,
            behaviour_logprob=batch.behaviour if config.importance_weight() else None,
            denominator=denominator,
            max_scored=batch.num_scored,
            **config.preference_settings(),
            **config.kernel_settings(),
        )


@torch.no_grad()
def sequence_sums(policy: Policy, batch: MicroBatch, config: Config) -> torch.Tensor:
    """Log-prob of each completion of a micro-batch, float64 [S] on the CPU."""
    batch = batch.to(policy.device)
    hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
    head = policy.head()
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    with policy.autocast():
        logprob_N = linear_logprob(
            hidden_ND, head.weight, batch.targets, max_scored=batch.num_scored, **transforms, **config.kernel_settings()
        )
    return sequence_logprob(logprob_N, batch.cu_seqlens).cpu()


def pair_logprob(policy: Policy, pairs: Sequence[Pair], config: Config, description: str) -> torch.Tensor:
    """Log-probs of (chosen, rejected) of each pair under `policy` as it is now, float64 [len(pairs), 2]."""
    found = []
    with tqdm(total=len(pairs), desc=description, unit="pair") as bar:
        for batch in micro_batches(pairs, config.max_tokens_per_micro_batch):
            found.append(sequence_sums(policy, batch, config).view(2, -1).T)
            bar.update(len(batch.pairs))
    return torch.cat(found) if found else torch.empty(0, 2, dtype=torch.float64)


def evaluate(logprob: torch.Tensor, reference: torch.Tensor, pairs: Sequence[Pair], config: Config) -> dict[str, float]:
    """Metrics of `preference_loss` over all `pairs` at once, and how often the chosen answer is the likelier one.

    logprob, reference: [len(pairs), 2] float64, under the policy and under the reference policy. A tie counts one half.
    """
    batch = pack(pairs, reference)
    lengths = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    _, metrics = preference_loss(
        logprob.T.flatten(),
        batch.reference,
        lengths=torch.tensor(lengths, dtype=torch.float64),
        behaviour=batch.behaviour if config.importance_weight() else None,
        **config.preference_settings(),
    )
    likelier, margin = logprob[:, 0] - logprob[:, 1], (logprob - reference)[:, 0] - (logprob - reference)[:, 1]
    return to_numbers(metrics) | {
        "accuracy/tied_frac": share_positive(margin),
        "likelier/frac": share_positive(likelier),
    }


def share_positive(difference: torch.Tensor) -> float:
    """Share of positive entries; a zero counts one half."""
    return ((difference.sign() + 1) / 2).mean().item()


def to_numbers(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))  # one copy from the device


def merge_metrics(parts: list[tuple[int, dict[str, torch.Tensor]]]) -> dict[str, float]:
    """The metrics of a step from (number of pairs, metrics) of its micro-batches; the ending of a name says how."""
    sizes = [size for size, _ in parts]
    numbers = [to_numbers(metrics) for _, metrics in parts]
    merged = {}
    for name in numbers[0]:
        values = [part[name] for part in numbers]
        merged[name] = REDUCTIONS[name.rsplit("/")[-1].rsplit("_")[-1]](values, sizes)
    sums = [part["weight/mean"] * size for part, size in zip(numbers, sizes, strict=True)]
    squares = [
        total**2 / part["weight/ess"] for part, total in zip(numbers, sums, strict=True) if part["weight/ess"] > 0
    ]
    merged["weight/ess"] = sum(sums) ** 2 / sum(squares) if squares and sum(squares) > 0 else 0.0
    return merged


def weighted_mean(values: list[float], sizes: list[int]) -> float:
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


REDUCTIONS: dict[str, Any] = {
    "mean": weighted_mean,
    "frac": weighted_mean,
    "max": lambda values, sizes: max(values),
    "count": lambda values, sizes: sum(values),
    "ess": lambda values, sizes: 0.0,  # not a mean of its parts: merged from their sums and squares
}


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite; the message names the step and the pairs."""


def blame(
    policy: Policy, optimizer: torch.optim.Optimizer, pairs: Sequence[Pair], reference: torch.Tensor, config: Config
) -> str:
    """Which pairs give a non-finite loss or gradient on their own, as "pair from pairs.jsonl line 37"."""
    guilty = []
    for index, pair in enumerate(pairs):
        optimizer.zero_grad()
        loss = pair_loss(policy, pack([pair], reference[index : index + 1]).to(policy.device), config, len(pairs)).loss
        loss.backward()
        grads = [parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None]
        if not torch.isfinite(loss) or not all(torch.isfinite(grad).all() for grad in grads):
            guilty.append(pair.source)
    optimizer.zero_grad()
    if not guilty:
        return f"no pair alone; the step's are from {', '.join(pair.source for pair in pairs)}"
    return f"pair{'s' if len(guilty) > 1 else ''} from {', '.join(guilty)}"
