"""What the tables and the panels of a report show: which rows, under which title, and what they measure."""

from collections.abc import Iterable
from typing import NamedTuple

from bench.gpu.lab import COMPLETIONS, DRIFT
from bench.gpu.settings import ProblemSet, Shape
from bench.gpu.tasks import CHECKS
from bench.gpu.two_heads import BAR, OUR_STEP_BAR, ROUNDED_BAR
from bench.grpo_work import KL_WEIGHT

LOGPROBS, PAIRS = (None, "sum"), ("dpo", "is_dpo")  # objectives


class Section(NamedTuple):
    title: str
    shape: Shape
    objectives: tuple[str | None, ...]
    text: str = ""

    def select(self, rows: Iterable[dict]) -> list[dict]:
        """Its rows of `rows`, checks apart."""
        return [
            row
            for row in rows
            if tuple(row["shape"]) == self.shape and row["objective"] in self.objectives and row["mode"] not in CHECKS
        ]


def logprob_sections(problems: ProblemSet) -> list[Section]:
    return [Section(f"{s} (tokens x hidden size x vocabulary)", s, LOGPROBS) for s in problems.shapes]


def pair_section(problems: ProblemSet) -> Section:
    pair = problems.pair
    title = f"One preference pair of {pair.N // 2} tokens a side, {pair}, reference forward included"
    return Section(title, pair, PAIRS)


def two_model_sections(problems: ProblemSet) -> list[Section]:
    """Divergences and GRPO steps."""
    first, last = problems.shapes[0], problems.shapes[-1]
    return [
        Section(f"Reverse KL of two models, {first}", first, ("reverse_kl",), _REVERSE),
        *([Section(f"Reverse KL of two models, {last}", last, ("reverse_kl",), _REVERSE)] if last != first else []),
        Section(f"Jensen-Shannon of two models, {first}", first, ("jsd",), _JSD),
        Section(f"GRPO step with exact KL, {first}", first, ("grpo_kl",), _EXACT_STEP),
        Section(f"GRPO step with k3, {first}", first, ("grpo",), _STEP),
    ]


_MODELS = f"""\
The reference has the policy's head and hidden states whose logits differ from the policy's by {DRIFT} (standard deviation); gradients go
to the policy alone. A unit is a product of one of the two models."""
_REVERSE = f"""\
Measured: KL(policy || reference) over the whole vocabulary, one number a token, and its gradients; neither model's log-probs are returned.
{_MODELS}
Red is an error above {BAR:g}; above {ROUNDED_BAR:g} where logits are rounded to bf16, which costs a small divergence most of its digits."""
_JSD = f"""\
Measured: the divergence of both models from their mean, weight 0.5, one number a token, and its gradients. {_MODELS} Red is an
error above {BAR:g}."""
_LOSS = f"""\
Measured: the head's part of a step of {COMPLETIONS} completions, from hidden states to the loss and its
gradients. Log-probs of the policy, ratio to given old log-probs, clipped loss with an advantage for each completion,"""
_STEP_BARS = f"Red is an error of ours above {OUR_STEP_BAR:g}; of peers, whose log-probs come of logits rounded to bf16, above 0.05."
_EXACT_STEP = f"""\
{_LOSS} and {KL_WEIGHT} times the exact KL(policy || reference) over the vocabulary: the products of both models. {_MODELS} {_STEP_BARS}"""
_STEP = f"""\
{_LOSS} and {KL_WEIGHT} times the estimate k3 from given reference log-probs: products of the policy alone. {_STEP_BARS}"""
