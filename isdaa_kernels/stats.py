"""What a pass over the logits can tell of each token besides its log-prob, and how its gradient reaches the backward.

N tokens, V vocabulary, S statistics asked for. z are the final logits of a token, lse = log sum exp z, p = exp(z - lse).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STATS = ("entropy", "lse", "mean_logit", "log_sum_sq_prob", "is_top1", "top_k_mass", "top_k_entropy")
DIFFERENTIABLE = ("entropy", "lse", "mean_logit")
MAX_TOP_K = 64


@dataclass(frozen=True)
class VocabStats:
    """Statistics of each token's distribution over the vocabulary, [...] as the targets; None where not asked for.

    entropy           -sum p log p                        differentiable, unless asked for as `detached`
    lse               log sum exp z                       differentiable, unless asked for as `detached`
    mean_logit        sum z / V                           differentiable, unless asked for as `detached`
    log_sum_sq_prob   log sum p^2 (minus the Renyi entropy of order 2)
    is_top1           bool: no logit is above the target's; False where the log-prob is NaN
    top_k_mass        sum of the k largest p
    top_k_entropy     -sum p log p over the k largest p, p as in the whole softmax

    z are the final logits (after bias, scale, softcap, temperature). fp32 (fp64 for fp64 inputs). Terms with p = 0 are 0, so that
    masked vocabulary rows (bias -inf) give right numbers (mean_logit is -inf then). 0 (False) where the target is ignored, NaN
    (False) where it is outside the vocabulary on a device that cannot raise.
    """

    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq_prob: Tensor | None = None
    is_top1: Tensor | None = None
    top_k_mass: Tensor | None = None
    top_k_entropy: Tensor | None = None

    @classmethod
    def from_rows(cls, stats_SN: Tensor, request: "StatsRequest", shape: torch.Size) -> "VocabStats":
        """The rows that a backend made, in the order of the request; those without a gradient come detached."""
        fields = {}
        for s, name in enumerate(request.names):
            value_N = stats_SN[s] if name in request.differentiable else stats_SN.detach()[s]
            fields[name] = (value_N > 0 if name == "is_top1" else value_N).reshape(shape)
        return cls(**fields)


@dataclass(frozen=True)
class StatsRequest:
    """What a backend is asked for: the rows of its `stats_SN`, in the order of `names`, is_top1 as 0 or 1. `detached`: the last of them,
    which have no part in the backward."""

    names: tuple[str, ...] = ()
    top_k: int = 20
    detached: tuple[str, ...] = ()

    def wants(self, *names: str) -> bool:
        return any(name in self.names for name in names)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in DIFFERENTIABLE and name not in self.detached)


@dataclass(frozen=True)
class TokenGradient:
    """The upstream gradient of each token's numbers, as a backend's backward receives it:

        d loss / d z[n, j] = logprob[n] * (onehot[n, j] - p[n, j]) + p[n, j] * (prob[n] + log_prob[n] * log p[n, j]) + flat[n]

    A term is None unless a statistic that needs it was asked for and has a gradient: then it costs nothing.
    """

    logprob_N: Tensor
    prob_N: Tensor | None = None  # g_lse - g_entropy * entropy
    log_prob_N: Tensor | None = None  # -g_entropy
    flat_N: Tensor | None = None  # g_mean_logit / V

    @classmethod
    def of(
        cls, grad_N: Tensor | None, grad_SN: Tensor | None, stats_SN: Tensor, names: Sequence[str], V: int
    ) -> "TokenGradient":
        """From the gradients of the log-prob and of the rows of `stats_SN`; either may be None, not both."""
        logprob_N = grad_SN.new_zeros(grad_SN.shape[1]) if grad_N is None else grad_N
        if grad_SN is None:
            return cls(logprob_N)
        row = {name: s for s, name in enumerate(names)}
        lse, entropy, mean = (grad_SN[row[n]] if n in row else None for n in ("lse", "entropy", "mean_logit"))
        prob_N = lse
        if entropy is not None:
            prob_N = -entropy * stats_SN[row["entropy"]]
            # A token without gradient stays without one, whatever its entropy is.
            prob_N = torch.where(entropy == 0, 0, prob_N)
            prob_N = prob_N if lse is None else prob_N + lse
        return cls(logprob_N, prob_N, None if entropy is None else -entropy, None if mean is None else mean / V)

    def terms(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.logprob_N, self.prob_N, self.log_prob_N, self.flat_N) if t is not None)

    def active(self) -> Tensor:
        """bool [N]: any coefficient other than 0 (NaN counts)."""
        first, *others = (term_N != 0 for term_N in self.terms())
        for other in others:
            first = first | other
        return first

    def select(self, rows: Tensor) -> "TokenGradient":
        """The tokens `rows` (indices)."""
        return self.map(lambda term_N: term_N.index_select(0, rows))

    def map(self, function) -> "TokenGradient":
        """`function` of every term that is there."""
        terms = (self.logprob_N, self.prob_N, self.log_prob_N, self.flat_N)
        return TokenGradient(*(None if term_N is None else function(term_N) for term_N in terms))


def check_stats(stats: Sequence[str], detached: Sequence[str], top_k: int) -> StatsRequest:
    """The request, its rows with a gradient first; ValueError for names that are unknown, missing or doubled, for detached ones that are
    not in `stats`, and for a top_k outside 1..64."""
    allowed = f"some of {', '.join(STATS)}"
    if isinstance(stats, str) or len(stats) == 0:
        raise ValueError(f"stats: expected a sequence of {allowed}, got {stats!r}")
    for name in stats:
        if name not in STATS:
            raise ValueError(f"stats: expected {allowed}, got {name!r}")
    if len(set(stats)) != len(stats):
        raise ValueError(f"stats: expected each name once, got {tuple(stats)}")
    if isinstance(detached, str):
        raise ValueError(f"detached: expected a sequence of names, got {detached!r}")
    for name in detached:
        if name not in stats:
            raise ValueError(f"detached: expected some of stats = {', '.join(stats)}, got {name!r}")
    if len(set(detached)) != len(detached):
        raise ValueError(f"detached: expected each name once, got {tuple(detached)}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"top_k: expected a whole number from 1 to {MAX_TOP_K}, got {top_k!r}")
    constant = tuple(name for name in stats if name in detached or name not in DIFFERENTIABLE)
    return StatsRequest((*(name for name in stats if name not in constant), *constant), top_k, constant)
