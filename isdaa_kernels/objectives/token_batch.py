"""What a loss of tokens sees of a batch: log-probs of the tokens of packed completions, fp64 on any device.

Letters: N tokens, S completions. Only `policy`, `values` and `token_kl` carry a gradient. A field is there when it was given. At a token
that is not scored all log-probs, values and advantages are 0, so that no formula meets inf or NaN there; what a formula gives for it
is not used.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.objectives.options import MAX_EXPONENT


@dataclass(frozen=True)
class Segments:
    """Runs of neighbouring tokens that make up the batch. `sum`: [N] -> [S]; `spread`: a number of each run, [S] -> [N]."""

    sum: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]

    def total(self, value_N: Tensor) -> Tensor:
        """At every token the sum over its run; [N]."""
        return self.spread(self.sum(value_N))

    def later(self, value_N: Tensor) -> Tensor:
        """At every token the sum over the tokens after it in its run; [N]. A non-finite value makes NaN of its run and of no other.

        A scan, whose order of summation a GPU chooses: its last bits may differ from run to run.
        """
        finite_N = value_N.isfinite()
        known_N = torch.where(finite_N, value_N, 0)
        end_N = self.spread(self.sum(known_N).cumsum(0))
        broken_N = self.total((~finite_N).to(value_N)) > 0
        return torch.where(broken_N, torch.nan, end_N - known_N.cumsum(0))


@dataclass(frozen=True)
class TokenLogprob:
    """`old` is the policy that the step started from; the policy itself, without gradient, where none was given. `advantages` and
    `rewards` are those of a token's completion where each completion has one. `correction` is the factor for what the sampler did
    differently from `old`. `steps` are runs of tokens within completions, `step_starts` (bool) their first scored tokens."""

    policy: Tensor
    old: Tensor
    scored: Tensor  # bool
    completions: Segments
    lengths: Tensor  # scored tokens of a token's completion, at least 1
    advantages: Tensor | None = None
    reference: Tensor | None = None
    sampler: Tensor | None = None
    correction: Tensor | None = None
    values: Tensor | None = None
    rewards: Tensor | None = None
    token_kl: Tensor | None = None
    steps: Segments | None = None
    step_starts: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log policy - log old."""
        return self.policy - self.old

    @property
    def log_ratio_to_reference(self) -> Tensor:
        """log policy - log reference."""
        return self.policy - self.reference

    def mean(self, value_N: Tensor) -> Tensor:
        """At every token the mean over the scored tokens of its completion; `value` is 0 at the others."""
        return self.completions.total(value_N) / self.lengths

    def own_step(self, value_N: Tensor) -> Tensor:
        """At every token the sum over its step; its own value where there are no steps."""
        return value_N if self.steps is None else self.steps.total(value_N)


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp(exponent), of an exponent of at most 80: a larger one has no gradient."""
    return exponent.clamp(max=MAX_EXPONENT).exp()


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """exp(d) - d - 1, d = log reference - log policy, at most 80: Schulman's estimate of KL(policy || reference), never negative.

    d/dlogp = 1 - exp(d). (Schulman 2020, "Approximating KL divergence".)
    """
    d = (reference - policy).clamp(max=MAX_EXPONENT)
    return d.expm1() - d


# The log-ratio of policy to old that an objective exponentiates, by what it calls the ratio of a token.
LOG_RATIOS: dict[str, Callable[[TokenLogprob], Tensor]] = {
    "token": lambda batch: batch.log_ratio,
    "sequence_mean": lambda batch: batch.mean(batch.log_ratio),
    "sequence": lambda batch: batch.completions.total(batch.log_ratio),
}
