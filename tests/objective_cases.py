"""Golden rows of objectives, and a batch for each objective of the registry. Letters: S sequences, P pairs, G groups, H policies."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from isdaa_kernels.objectives import OBJECTIVES, Objective
from isdaa_kernels.preference_terms import needs_of

# The standard pair: log-ratios a = 0.5, b = -1.0, so Delta = 1.5 and a + b = -0.5; mean log-probs -2.4 and -2.3125.
STANDARD = {"policy": (-12.0, -9.25), "reference": (-12.5, -8.25), "lengths": (5, 4)}


# Pairwise objectives of policy, reference, behaviour and lengths, each pair by itself.
PLAIN = [
    name
    for name, objective in OBJECTIVES.items()
    if objective.kind == "pair"
    and needs_of(objective, objective.importance) <= {"reference", "behaviour", "lengths"}
    and objective.token_weight is None
    and not objective.state_required
    and not objective.whole_batch
]


@dataclass(frozen=True)
class Golden:
    """What `preference_loss(**inputs, **options)` must give: numbers worked out by hand or by the authors' code.

    inputs: the arguments that hold tensors, as tuples, beside or instead of `STANDARD`; None takes one away. gradient: of the loss by
    each number of the policy. Both are in fp64 and hold to 1e-6 of their size.
    """

    objective: str
    loss: float
    gradient: tuple[float, ...]
    options: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        given = {name: value for name, value in (STANDARD | self.inputs).items() if value is not None}
        return {name: _tensor(name, value) for name, value in given.items()}

    def arguments(self) -> dict:
        """Options that are tuples hold one value an item."""
        options = {
            name: torch.tensor(value, dtype=torch.float64) if isinstance(value, tuple) else value
            for name, value in self.options.items()
        }
        return {"objective": self.objective, **options}


def _tensor(name: str, value: object) -> object:
    if isinstance(value, int):  # groups of one size
        return value
    dtypes = {"desirable": torch.bool, "pairs": torch.int64, "groups": torch.int64}
    return torch.tensor(value, dtype=dtypes.get(name, torch.float64))


def sample(objective: Objective, items: int = 6, seed: int = 0, log_ratio: Tensor | None = None) -> dict:
    """Arguments of `preference_loss` with all that the objective needs, fp64: log-probs of -2 to -3 a token, log-ratios of a few nats,
    or `log_ratio` [S]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    needs = needs_of(objective, objective.importance)
    S = items * {"pair": 3 if "gold" in needs else 2, "completion": 1, "group": 4}[objective.kind]
    lengths = torch.randint(3, 9, (S,), generator=generator).double()
    logprob = -lengths * uniform(2, 3, S)
    log_ratio = uniform(-1.9, 1.9, S) if log_ratio is None else log_ratio
    # both below 0, as log-probs are
    policy, reference = logprob + log_ratio.clamp(max=0), logprob - log_ratio.clamp(min=0)
    arguments = {"policy": policy, "reference": reference, "lengths": lengths}
    if objective.kind == "group":
        # the last group lacks a completion
        arguments["groups"] = torch.arange(S).view(items, 4)
        arguments["groups"][-1, -1] = -1
    made = {
        "rewards": lambda: uniform(-2, 2, S),
        "opponents": lambda: reference + uniform(-1, 1, 2, S),
        "desirable": lambda: torch.arange(S) % 2 == 0,
        "mismatched": lambda: uniform(-1, 2, S),
        "log_sum_sq_prob": lambda: -lengths * uniform(1, 2, S),
        "kl_score": lambda: uniform(-3, 3, S),
    }
    arguments |= {name: make() for name, make in made.items() if name in needs}
    if objective.state_required:
        arguments["state"] = objective.make_state()
    return arguments
