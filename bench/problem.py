"""One problem as every contender receives it, and the cases it comes in.

N tokens, D hidden size, V vocabulary, P pairs of sequences, S = 2 P sequences of T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.states import States

PAIR_TOKENS = 260  # both completions of a pair together, about as long as a short answer and its prompt
REFERENCE_NOISE = 0.02  # of the standard deviation of the states: log-ratios of about 1 a sequence
TINY = 1e-30  # the coefficient of a saturated pair


@dataclass(frozen=True)
class Problem:
    """The sequences of the pair table are runs of T tokens, N = S * T, so that nobody pays for padding; the chosen come first. The
    reference has the same head and slightly other states."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    upstream_N: Tensor  # fp32, the gradient of the log-probs
    reference_hidden_ND: Tensor
    sequences: int
    frozen_head: bool = False

    @property
    def tokens(self) -> int:
        return self.targets_N.shape[0]

    @property
    def length(self) -> int:
        """T, tokens of one sequence."""
        return self.tokens // self.sequences

    @property
    def pairs(self) -> int:
        return self.sequences // 2

    def cu_seqlens(self) -> Tensor:
        return torch.arange(0, self.tokens + 1, self.length, device=self.targets_N.device)

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: getattr(self, name).to(dtype) for name in ("hidden_ND", "weight_VD", "reference_hidden_ND")}
        return replace(self, **tensors)

    def shorter(self, length: int) -> "Problem":
        """The same number of sequences, each of `length` tokens, the first tokens there are: warms a contender up without touching
        much memory, and is what the gate judges where the whole is too large."""
        names = ("hidden_ND", "targets_N", "upstream_N", "reference_hidden_ND")
        return replace(self, **{name: getattr(self, name)[: self.sequences * length] for name in names})


def count_sequences(tokens: int) -> int:
    """How many sequences `tokens` tokens are cut into; they all get `tokens // count_sequences(tokens)` of them.

    Raises ValueError for fewer than two tokens.
    """
    if tokens < 2:
        raise ValueError(f"tokens: expected at least 2, one a sequence, got {tokens}")
    return 2 * max(1, round(tokens / PAIR_TOKENS))


def make_problem(states: States, seed: int = 0) -> Problem:
    """A problem of as many of the states as fill sequences of equal length: all but a few."""
    S = count_sequences(states.targets_N.shape[0])
    states = states.first(states.targets_N.shape[0] // S * S)
    random = torch.Generator().manual_seed(seed)
    noise_ND = torch.randn(states.hidden_ND.shape, generator=random) * states.hidden_ND.std() * REFERENCE_NOISE
    upstream_N = torch.randn(states.targets_N.shape, generator=random)
    reference_ND = states.hidden_ND + noise_ND
    return Problem(states.hidden_ND, states.weight_VD, states.targets_N, upstream_N, reference_ND, S)


CASES: dict[str, Callable[[Problem], Problem]] = {
    "ordinary": lambda problem: problem,
    "frozen head": lambda problem: replace(problem, frozen_head=True),
    "bf16 inputs": lambda problem: problem.to(torch.bfloat16),
    "saturated": lambda problem: replace(problem, upstream_N=torch.full_like(problem.upstream_N, TINY)),
}
