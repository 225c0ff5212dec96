"""Golden rows of objectives, and a batch for each objective of the registry. Letters: S sequences, P pairs, G groups, H policies."""

from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor

from isdaa_kernels.objectives import OBJECTIVES, Objective
from isdaa_kernels.preference_terms import needs_of

# The standard pair: log-ratios a = 0.5, b = -1.0, so Delta = 1.5 and a + b = -0.5; mean log-probs -2.4 and -2.3125.
STANDARD = {"policy": (-12.0, -9.25), "reference": (-12.5, -8.25), "lengths": (5, 4)}


# Two completions of three and two tokens with advantages 1 and -2: ratios 1, 1.5, 0.5 and 0.75, 1.5 to an old policy of probability 0.2.
RATIOS = (1.0, 1.5, 0.5, 0.75, 1.5)
STANDARD_TOKENS = {
    "logprob": tuple(log(0.2 * ratio) for ratio in RATIOS),
    "cu_seqlens": (0, 3, 5),
    "old_logprob": (log(0.2),) * 5,
    "advantages": (1.0, -2.0),
}

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
    """What `preference_loss(**inputs, **options)`, or `policy_loss` for a loss of tokens, must give: numbers worked out by hand or by the
    authors' code.

    inputs: the arguments that hold tensors, as tuples, beside or instead of `STANDARD` (`STANDARD_TOKENS`); None takes one away. gradient:
    of the loss by each number of the policy, or of the input called `by`. Both are in fp64 and hold to 1e-6 of their size.
    """

    objective: str
    loss: float
    gradient: tuple[float, ...]
    options: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    by: str | None = None

    def tensors(self) -> dict[str, Tensor]:
        standard = STANDARD_TOKENS if OBJECTIVES[self.objective].kind == "token" else STANDARD
        given = {name: value for name, value in (standard | self.inputs).items() if value is not None}
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
    dtypes = {"desirable": torch.bool, "mask": torch.bool}
    dtypes |= dict.fromkeys(("pairs", "groups", "cu_seqlens", "step_cu_seqlens"), torch.int64)
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
        "reference_kl": lambda: uniform(0.1, 3, S),
    }
    arguments |= {name: make() for name, make in made.items() if name in needs}
    if objective.state_required:
        arguments["state"] = objective.make_state()
    return arguments


def sample_tokens(objective: Objective, items: int = 4, seed: int = 0, log_ratio: Tensor | None = None) -> dict:
    """Arguments of `policy_loss` with all that a loss of tokens needs, fp64: `items` completions of 3 to 8 tokens, the first of each scored
    no more than what else is masked; log-ratios to the old policy of up to one half, or `log_ratio` [N]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(3, 9, (items,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    N = int(cu_seqlens[-1])
    mask = torch.ones(N, dtype=torch.bool)
    mask[cu_seqlens[:-1]] = False  # prompts
    old = uniform(-3, -1, N)
    arguments = {
        "logprob": old + (uniform(-0.5, 0.5, N) if log_ratio is None else log_ratio),
        "cu_seqlens": cu_seqlens,
        "mask": mask,
        "old_logprob": old,
    }
    made = {
        "advantages": lambda: uniform(-2, 2, items),
        "reference": lambda: old + uniform(-0.3, 0.3, N),
        "values": lambda: uniform(-1, 1, N),
        "rewards": lambda: uniform(-1, 1, items),
    }
    names = {"reference": "reference_logprob"}
    arguments |= {names.get(name, name): make() for name, make in made.items() if name in objective.needs}
    return arguments | ({"max_length": 10} if objective.reduction == "max_length" else {})
