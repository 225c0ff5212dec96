"""Where Adam takes the parameters with routed gradients and where with exact ones.

V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from isdaa_trainer import checkpoint as disk
from isdaa_trainer.config import Config
from isdaa_trainer.data import Pair, step_order
from isdaa_trainer.model import Policy
from isdaa_trainer.routing import Routing
from isdaa_trainer.step import pair_logprob, train_step
from isdaa_trainer.train import learning_rate, make_optimizer
from torch import Tensor
from tqdm import tqdm

from bench.routed_training_bias import first_routing, quotient, root, row_cosines, square

if TYPE_CHECKING:
    from bench.routed_training import Lab


@dataclasses.dataclass(frozen=True)
class Place:
    """A policy: its parameters, the head (tied to the embedding or not) among them as "head", and the held-out pairs' log-probs."""

    parameters: dict[str, Tensor]
    heldout: Tensor  # float64 [pairs, 2]


def place_of(lab: "Lab", policy: Policy) -> Place:
    head = policy.head().weight
    rest = {name: p.detach().cpu() for name, p in policy.model.named_parameters() if p is not head}
    heldout = pair_logprob(policy, lab.data.heldout, lab.config("exact"), "held-out pairs")
    return Place({"head": head.detach().cpu(), **rest}, heldout)


def adam_paths(lab: "Lab", checkpoint: Path) -> dict[str, Any]:
    """Where Adam gets from one checkpoint, its moments included, at a constant rate, against exact: routed; exact, but one pair after the
    other, so that nothing but rounding differs; exact in another order of the pairs."""
    exact = lab.config("exact")
    longest = max(pair.num_tokens for pair in lab.data.train)
    ways = {
        "routed": lab.config("routed"),
        "one by one": dataclasses.replace(exact, max_tokens_per_micro_batch=longest),
        "other order": dataclasses.replace(exact, seed=exact.seed + 1),
    }
    start, end = place_of(lab, lab.policy(checkpoint)), adam_path(lab, checkpoint, exact, "exact")
    seen_V = seen_words(lab.data.train, start)
    paths = {
        name: differences(start, end, adam_path(lab, checkpoint, config, name), seen_V) for name, config in ways.items()
    }
    return {"steps": lab.settings.adam_steps, "seen_words": seen_V.sum().item(), **paths}


def adam_path(lab: "Lab", checkpoint: Path, config: Config, title: str) -> Place:
    exact, first = lab.config("exact"), disk.step_of(checkpoint)
    policy = lab.policy(checkpoint)
    optimizer = make_optimizer(policy, config)
    disk.restore(checkpoint, policy, optimizer, Routing(exact))
    routing = first_routing(lab, config) if config.gradient == "routed" else Routing(config)
    reference = torch.load(lab.reference_file, weights_only=True)["train"]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(first, lab.settings.steps, exact)
    for step in tqdm(range(first, first + lab.settings.adam_steps), desc=f"Adam, {title}", unit="step"):
        order = step_order(step, len(lab.data.train), config.pairs_per_step, config.seed)
        pairs = [lab.data.train[index] for index in order]
        train_step(policy, optimizer, pairs, reference[order], config, step=step + 1, routing=routing)
    return place_of(lab, policy)


def movement(lab: "Lab", runs: Sequence[str]) -> dict[str, Any]:
    """The same from the first step of each run to its last, against the first of `runs`."""
    start, *ends = (
        place_of(lab, lab.policy(folder)) for folder in (lab.initial, *(lab.work / run / "model" for run in runs))
    )
    seen_V = seen_words(lab.data.train, start)
    return {run: differences(start, ends[0], end, seen_V) for run, end in zip(runs[1:], ends[1:], strict=True)}


def seen_words(pairs: Sequence[Pair], start: Place) -> Tensor:
    """bool [V]: the words of the training texts; all others move in the head alone, and by their probability alone."""
    seen_V = torch.zeros(len(start.parameters["head"]), dtype=torch.bool)
    for pair in pairs:
        seen_V[list(pair.prompt + pair.chosen + pair.rejected)] = True
    return seen_V


def differences(start: Place, end: Place, other: Place, seen_V: Tensor) -> dict[str, Any]:
    """Of the way to `other` from that to `end`: relative norm and cosine, by part; cosines of the head's rows; root mean square of the
    difference of held-out log-probs, and of the way that they went."""
    ways = [{name: to.parameters[name] - value for name, value in start.parameters.items()} for to in (end, other)]
    a, b = ways
    rest = [name for name in a if name != "head"]
    parts = {
        "seen": [[way["head"][seen_V]] for way in ways],
        "unseen": [[way["head"][~seen_V]] for way in ways],
        "body": [[way[name] for name in rest] for way in ways],
        "all": [list(way.values()) for way in ways],
    }
    return {
        **{part: compare_ways(*both) for part, both in parts.items()},
        "cosines": row_cosines(b["head"], a["head"]),
        "logprob": {
            "difference": rms(other.heldout - end.heldout),
            "way": rms(end.heldout - start.heldout),
        },
    }


def compare_ways(a: list[Tensor], b: list[Tensor]) -> dict[str, float | None]:
    """None where there is no way to compare with."""
    apart, length_a, length_b = (square(ts) for ts in ([y - x for x, y in zip(a, b, strict=True)], a, b))
    lengths = math.sqrt(length_a * length_b)
    return {
        "difference": root(quotient(apart, length_a)),
        "cosine": (length_a + length_b - apart) / (2 * lengths) if lengths > 0 else None,
        "rms_way": root(quotient(length_a, sum(t.numel() for t in a))),
    }


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
