"""The problem that `bench.routed` measures: states, upstream coefficients, orders of the vocabulary, and the calls.

N tokens, D hidden size, V vocabulary, B blocks of it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.contenders import BY_NAME, make_run, ours
from bench.problem import Problem, make_problem
from bench.states import States, load_states
from bench.timing import Call
from isdaa_kernels import Routed, VocabOrder, linear_logprob, make_vocab_order, preference_loss, sequence_logprob
from isdaa_kernels.backends.reference.routed import block_logsumexp
from isdaa_kernels.routing import choose_routes

NATURAL, OWN, OTHER = "natural", "vocab", "vocab, other text"  # orders of the vocabulary
RANDOM, PREFERENCE = "random", "is_dpo"  # upstream coefficients
SEQUENCES = 8  # with one random coefficient each
TOLERANCES = (1e-4, 3e-4, Routed().tolerance, 1e-3, 3e-3, 1e-2)
ROW_SHARES = (0.0, 0.7)  # beside the default
BLOCKS = (64, 256)  # beside the default
COARSE = Routed(4.2e-3, row_share=0.0)  # errors of at most 1e-2 on both texts
CHUNK = 256  # tokens


@dataclass(frozen=True)
class Settings:
    states: str = "smollm2"
    order_states: str | None = None
    tokens: int = 3900
    order_tokens: int = 512
    repeats: int = 5
    device: str = "cpu"
    dense: bool = True
    memory: bool = True


@dataclass(frozen=True)
class Case:
    """A line of the results."""

    routed: Routed
    order: str

    @property
    def is_default(self) -> bool:
        return (self.routed, self.order) == (Routed(), OWN)


def all_cases(has_other: bool) -> list[Case]:
    cases = [Case(Routed(tolerance), order) for order in (NATURAL, OWN) for tolerance in TOLERANCES]
    cases += [Case(Routed(row_share=share), OWN) for share in ROW_SHARES]
    cases += [Case(Routed(block=block), OWN) for block in BLOCKS]
    cases.append(Case(COARSE, OWN))
    return cases + ([Case(Routed(), OTHER)] if has_other else [])


class Lab:
    """States, orders, log-sum-exps of blocks, coefficients and truths, each made once.

    Raises ValueError where there are fewer states than tokens to measure and to make an order from, or where the other text's states
    belong to another head.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        states = load_states(settings.states, settings.tokens + settings.order_tokens)
        self.source = states.source
        self.problem = on_device(make_problem(states.first(settings.tokens)), self.device)
        self.samples = {OWN: states.hidden_ND[settings.tokens :]}
        if settings.order_states is not None:
            self.samples[OTHER] = other_sample(settings, states)
        self.coefficients = self._coefficients()
        self._orders: dict[tuple[str, int], VocabOrder] = {}
        self._block_lse: dict[tuple[str, int], Tensor] = {}

    def order(self, name: str, block: int) -> VocabOrder | None:
        if name == NATURAL:
            return None
        if (name, block) not in self._orders:
            sample_ND = self.samples[name].to(self.device)
            self._orders[name, block] = make_vocab_order(self.problem.weight_VD, sample_ND, block)
        return self._orders[name, block]

    def block_lse(self, name: str, block: int) -> Tensor:
        """[N, B] fp32, by another way than a backend's forward."""
        if (name, block) not in self._block_lse:
            order, weight_VD = self.order(name, block), self.problem.weight_VD
            ordered_VD = weight_VD if order is None else weight_VD[order.rows]
            parts = [block_logsumexp(h @ ordered_VD.T, block) for h in self.problem.hidden_ND.split(CHUNK)]
            self._block_lse[name, block] = torch.cat(parts)
        return self._block_lse[name, block]

    def target_block(self, name: str, block: int) -> Tensor:
        order, targets_N = self.order(name, block), self.problem.targets_N
        return (targets_N if order is None else order.rows.argsort()[targets_N]) // block

    def upstream(self, kind: str) -> Problem:
        return replace(self.problem, upstream_N=self.coefficients[kind])

    def shares(self, case: Case, kind: str) -> dict[str, float]:
        """Of all (token, block) pairs, those routed; tokens without a coefficient are routed nowhere."""
        block_lse_NB = self.block_lse(case.order, case.routed.block)
        active_N = self.coefficients[kind] != 0
        lse_N = block_lse_NB.double().logsumexp(1)
        target_N = self.target_block(case.order, case.routed.block)
        routes = choose_routes(
            *(x[active_N] for x in (block_lse_NB, lse_N, -self.coefficients[kind], target_N)), case.routed
        )
        return {
            "share_hidden": float(routes.hidden_BN.sum() / block_lse_NB.numel()),
            "share_weight": float(routes.weight_BN.sum() / block_lse_NB.numel()),
        }

    def call(self, case: Case | None, kind: str) -> Call:
        """Forward and backward, routed as the case says or exact; gives an Outcome."""
        options = {} if case is None else self.options(case)
        return make_run(replace(BY_NAME["ours"], prepare=ours(**options)), self.upstream(kind), "full")

    def forward(self, case: Case | None) -> Call:
        """The forward that a backward will follow: it keeps what that needs."""
        hidden_ND, weight_VD = (x.detach().requires_grad_() for x in (self.problem.hidden_ND, self.problem.weight_VD))
        options = {} if case is None else self.options(case)
        return lambda: linear_logprob(hidden_ND, weight_VD, self.problem.targets_N, **options).detach()

    def options(self, case: Case) -> dict[str, object]:
        return {"gradient": case.routed, "vocab_order": self.order(case.order, case.routed.block)}

    def _coefficients(self) -> dict[str, Tensor]:
        N = self.problem.tokens
        random = torch.Generator().manual_seed(0)
        a_sequence = torch.randn(SEQUENCES, generator=random)
        return {
            RANDOM: a_sequence.repeat_interleave(-(-N // SEQUENCES))[:N].to(self.device),
            PREFERENCE: preference_coefficients(self.problem),
        }


def on_device(problem: Problem, place: torch.device) -> Problem:
    moved = {name: value.to(place) for name, value in vars(problem).items() if isinstance(value, Tensor)}
    return replace(problem, **moved)


def other_sample(settings: Settings, states: States) -> Tensor:
    other = load_states(settings.order_states, settings.order_tokens)
    if not torch.equal(other.weight_VD, states.weight_VD):
        raise ValueError(
            f"order_states: expected states of the same head as {settings.states!r}, got {settings.order_states!r}"
        )
    return other.hidden_ND


def preference_coefficients(problem: Problem) -> Tensor:
    """The gradient [N] of the mean IS-DPO loss with respect to the token log-probs, from the sums of the problem's sequences under its
    policy and its reference."""
    with torch.no_grad():
        policy_N, reference_N = (
            linear_logprob(hidden_ND, problem.weight_VD, problem.targets_N)
            for hidden_ND in (problem.hidden_ND, problem.reference_hidden_ND)
        )
    policy_N.requires_grad_()
    sums = [sequence_logprob(logprob_N, problem.cu_seqlens()) for logprob_N in (policy_N, reference_N)]
    preference_loss(*sums, objective="is_dpo").loss.backward()
    return policy_N.grad
