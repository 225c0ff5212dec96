"""One optimizer step of IS-DAA, the log-probs it compares with, and the evaluation on held-out pairs.

Letters: N tokens of a packed micro-batch, D hidden size, P pairs, S = 2P sequences (chosen 0..P-1, rejected P..2P-1).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from isdaa_kernels import (
    BatchState,
    PreferenceLoss,
    linear_logprob,
    linear_logprob_stats,
    monitors,
    preference_loss,
    sequence_logprob,
)
from isdaa_trainer.config import Config
from isdaa_trainer.data import IGNORED, MicroBatch, Pair, micro_batches, pack
from isdaa_trainer.model import Policy
from isdaa_trainer.routing import Routing


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    reference: torch.Tensor,
    config: Config,
    step: int,
    routing: Routing | None = None,
    state: BatchState | None = None,
) -> dict[str, float]:
    """Moves the policy by one step on `pairs`; returns the metrics of `preference_loss`, the monitors, grad_norm and tokens.

    reference: [len(pairs), 2] float64 log-probs of (chosen, rejected) under the reference policy. routing: what earlier
    steps left for this one where gradients are routed, and takes from it for the next; None: nothing. state: what the
    objective keeps from one micro-batch to the next, if anything.
    Raises NonFiniteError, naming the step and the pairs, before the optimizer sees a non-finite loss or gradient.
    """
    routing = Routing(config) if routing is None else routing
    parts, vocabulary, gradients = [], [], []
    for batch in micro_batches(pairs, config.max_tokens_per_micro_batch, reference):
        # The sum over the micro-batches is divided by the pairs of the step, so that how they are cut does not matter.
        batch = batch.to(policy.device)
        logprob_S, means = monitored_sums(policy, batch, config, routing, config.monitor_top_k)
        logprob_S.retain_grad()
        loss, metrics = pair_loss(logprob_S, batch, config, denominator=len(pairs), state=state)
        loss.backward()
        gradients.append((logprob_S.grad, batch.lengths))
        parts.append((len(batch.pairs), loss.detach(), metrics | pair_monitors(logprob_S, batch, config)))
        vocabulary.append((batch.num_scored, means))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm or math.inf)
    for name, value in (("loss", sum(loss for _, loss, _ in parts)), ("gradient", grad_norm)):
        if not torch.isfinite(value):
            raise NonFiniteError(
                f"step {step}: non-finite {name}; {blame(policy, optimizer, pairs, reference, config, routing, state)}"
            )
    optimizer.step()
    optimizer.zero_grad()
    routing.follow(gradients)
    metrics = merge_metrics([(size, metrics) for size, _, metrics in parts]) | merge(vocabulary)
    return metrics | {"grad_norm": grad_norm.item(), "tokens": sum(pair.num_tokens for pair in pairs)}


def sequence_sums(policy: Policy, batch: MicroBatch, config: Config, routing: Routing) -> torch.Tensor:
    """Log-prob of each completion of a micro-batch, float64 [S]: hidden states -> log-probs, without logits."""
    return monitored_sums(policy, batch, config, routing, top_k=None)[0]


def monitored_sums(
    policy: Policy, batch: MicroBatch, config: Config, routing: Routing, top_k: int | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`sequence_sums`, and of the top_k likeliest tokens the means over the scored tokens, from the same pass; none without top_k."""
    hidden_ND = policy.hidden_states(batch.input_ids, batch.position_ids)
    head = policy.head()
    transforms = {"bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
    settings = {"max_scored": batch.num_scored, **config.kernel_settings(), **routing.kernel_settings()}
    with policy.autocast():
        if top_k is None:
            logprob_N, means = linear_logprob(hidden_ND, head.weight, batch.targets, **transforms, **settings), {}
        else:
            settings |= {"stats": ("top_k_mass", "top_k_entropy"), "top_k": top_k}
            logprob_N, stats = linear_logprob_stats(hidden_ND, head.weight, batch.targets, **transforms, **settings)
            means = monitors.vocabulary_means(stats, batch.targets != IGNORED)
    return sequence_logprob(logprob_N, batch.cu_seqlens), means


def pair_monitors(logprob_S: torch.Tensor, batch: MicroBatch, config: Config) -> dict[str, torch.Tensor]:
    """What `preference_loss` does not report of a micro-batch, on its device: kl/sqrt, and weight/floored_frac where there is a floor."""
    found = {"kl/sqrt": monitors.sqrt_kl(logprob_S, batch.reference)}
    if config.importance_floor is not None:
        behaviour_S = batch.reference if batch.behaviour is None else batch.behaviour
        importance = config.importance_weight()
        shares = monitors.importance_fractions(logprob_S, behaviour_S, importance, lengths=batch.lengths)
        found["weight/floored_frac"] = shares["weight/floored_frac"]
    return found


def pair_loss(
    logprob_S: torch.Tensor,
    batch: MicroBatch,
    config: Config,
    denominator: int | None,
    state: BatchState | None = None,
) -> PreferenceLoss:
    """The loss of a micro-batch from its `sequence_sums`. Not `linear_preference_loss`, which is the two in one: the
    step also wants the gradient of the sums."""
    return preference_loss(
        logprob_S,
        batch.reference,
        lengths=batch.lengths,
        behaviour=batch.behaviour if config.importance_weight() else None,
        denominator=denominator,
        state=state,
        **config.preference_settings(),
    )


@torch.no_grad()
def pair_logprob(policy: Policy, pairs: Sequence[Pair], config: Config, description: str) -> torch.Tensor:
    """Log-probs of (chosen, rejected) of each pair under `policy` as it is now, float64 [len(pairs), 2]."""
    found = []
    with tqdm(total=len(pairs), desc=description, unit="pair") as bar:
        for batch in micro_batches(pairs, config.max_tokens_per_micro_batch):
            logprob_S = sequence_sums(policy, batch.to(policy.device), config, Routing(config))
            found.append(logprob_S.cpu().view(2, -1).T)
            bar.update(len(batch.pairs))
    return torch.cat(found) if found else torch.empty(0, 2, dtype=torch.float64)


def evaluate(
    logprob: torch.Tensor,
    reference: torch.Tensor,
    pairs: Sequence[Pair],
    config: Config,
    state: BatchState | None = None,
) -> dict[str, float]:
    """Metrics of `preference_loss` and `pair_monitors` over all `pairs` at once, and how often the chosen answer is the likelier one.

    logprob, reference: [len(pairs), 2] float64, under the policy and under the reference policy. A tie counts one half.
    """
    logprob_S, batch = logprob.T.flatten(), pack(pairs, reference)
    with unmoved(state):
        _, metrics = pair_loss(logprob_S, batch, config, denominator=None, state=state)
    metrics |= pair_monitors(logprob_S, batch, config)
    likelier, margin = logprob[:, 0] - logprob[:, 1], (logprob - reference)[:, 0] - (logprob - reference)[:, 1]
    return to_numbers(metrics) | {
        "accuracy/tied_frac": share_positive(margin),
        "likelier/frac": share_positive(likelier),
    }


@contextmanager
def unmoved(state: BatchState | None) -> Iterator[None]:
    """What the objective keeps is used and stays as it is."""
    if state is None:
        yield
        return
    training = state.training
    state.eval()
    try:
        yield
    finally:
        state.train(training)


def share_positive(difference: torch.Tensor) -> float:
    """Share of positive entries; a zero counts one half."""
    return ((difference.sign() + 1) / 2).mean().item()


def to_numbers(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    if not metrics:
        return {}
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))  # one copy from the device


def merge_metrics(parts: list[tuple[int, dict[str, torch.Tensor]]]) -> dict[str, float]:
    """The metrics of a step from (number of pairs, metrics) of its micro-batches; the ending of a name says how."""
    sizes, numbers = [size for size, _ in parts], [to_numbers(metrics) for _, metrics in parts]
    merged = merge_numbers(sizes, numbers)
    sums = [part["weight/mean"] * size for part, size in zip(numbers, sizes, strict=True)]
    squares = [
        total**2 / part["weight/ess"] for part, total in zip(numbers, sums, strict=True) if part["weight/ess"] > 0
    ]
    merged["weight/ess"] = sum(sums) ** 2 / sum(squares) if squares and sum(squares) > 0 else 0.0
    return merged


def merge(parts: list[tuple[int, dict[str, torch.Tensor]]]) -> dict[str, float]:
    """The same of metrics that are means over other things than pairs: (how many of them, metrics) of the micro-batches."""
    return merge_numbers([size for size, _ in parts], [to_numbers(metrics) for _, metrics in parts])


def merge_numbers(sizes: list[int], numbers: list[dict[str, float]]) -> dict[str, float]:
    reduce = {name: REDUCTIONS[name.rsplit("/")[-1].rsplit("_")[-1]] for name in numbers[0]}
    return {name: reduce[name]([part[name] for part in numbers], sizes) for name in reduce}


def weighted_mean(values: list[float], sizes: list[int]) -> float:
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


REDUCTIONS: dict[str, Any] = {
    "mean": weighted_mean,
    "frac": weighted_mean,
    "sqrt": lambda values, sizes: math.sqrt(weighted_mean([value**2 for value in values], sizes)),
    "max": lambda values, sizes: max(values),
    "count": lambda values, sizes: sum(values),
    "ess": lambda values, sizes: 0.0,  # not a mean of its parts: merged from their sums and squares
}


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite; the message names the step and the pairs."""


def blame(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    reference: torch.Tensor,
    config: Config,
    routing: Routing,
    state: BatchState | None,
) -> str:
    """Which pairs give a non-finite loss or gradient on their own, as "pair from pairs.jsonl line 37"."""
    guilty = []
    for index, pair in enumerate(pairs):
        optimizer.zero_grad()
        batch = pack([pair], reference[index : index + 1]).to(policy.device)
        with unmoved(state):
            loss = pair_loss(sequence_sums(policy, batch, config, routing), batch, config, len(pairs), state).loss
        loss.backward()
        grads = [parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None]
        if not torch.isfinite(loss) or not all(torch.isfinite(grad).all() for grad in grads):
            guilty.append(pair.source)
    optimizer.zero_grad()
    if not guilty:
        return f"no pair alone; the step's are from {', '.join(pair.source for pair in pairs)}"
    return f"pair{'s' if len(guilty) > 1 else ''} from {', '.join(guilty)}"
