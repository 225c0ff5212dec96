"""What an objective sees of a batch: log-probs of pairs, of single completions or of groups, fp64 on any device.

Letters: P preference pairs, S completions, G groups of at most K completions, H earlier policies. All log-probs are sums over the scored
tokens of a completion, in nats. Only `policy`, `kl_score` and `reference_kl` carry a gradient. A field is there when the objective
`needs` it.

An item that does not count (an empty completion in it) has log-probs 0 and lengths 1, so that no formula meets inf or NaN for it, and
False in `present`: a formula that looks at the whole batch leaves it out.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """One value for the chosen and one for the rejected completion of each pair, both [P]."""

    chosen: Tensor
    rejected: Tensor

    def minus(self, other: "Pair") -> "Pair":
        return Pair(self.chosen - other.chosen, self.rejected - other.rejected)

    def over(self, other: "Pair") -> "Pair":
        return Pair(self.chosen / other.chosen, self.rejected / other.rejected)

    @property
    def difference(self) -> Tensor:
        """chosen - rejected."""
        return self.chosen - self.rejected


class Gold(NamedTuple):
    """A third completion of each pair, to be imitated: its log-prob under the policy and its length, both [P]."""

    policy: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class PairLogprob:
    """`reference` is None for an objective without one: log-ratios are the log-probs then. `behaviour` is the policy that wrote the
    completions; it enters importance weights and never the margin. `opponents` are earlier policies, the newest first.
    `log_sum_sq_prob` is the sum over a completion's tokens of log sum_v p_v^2, `reference_kl` that of KL(reference || policy)."""

    policy: Pair
    reference: Pair | None = None
    behaviour: Pair | None = None
    lengths: Pair | None = None
    opponents: tuple[Pair, ...] = ()
    log_sum_sq_prob: Pair | None = None
    gold: Gold | None = None
    present: Tensor | None = None  # bool [P]; None: all
    reference_kl: Pair | None = None

    @property
    def log_ratio(self) -> Pair:
        """a = log policy - log reference of the chosen completion, and b of the rejected one."""
        return self.policy if self.reference is None else self.policy.minus(self.reference)

    @property
    def mean_log_ratio(self) -> Pair:
        """a / |chosen| and b / |rejected|: nats per scored token."""
        return self.log_ratio.over(self.lengths)

    @property
    def mean_policy(self) -> Pair:
        """Log-probs of the policy in nats per scored token."""
        return self.policy.over(self.lengths)

    @property
    def margin(self) -> Tensor:
        """Delta = a - b."""
        return self.log_ratio.difference


@dataclass(frozen=True)
class CompletionLogprob:
    """Single completions, all [S]. `mismatched`: log-ratio of a completion of another prompt to the reference, from which KTO estimates
    the KL divergence. `kl_score`: sum over tokens of stopgrad(log policy - log reference) * log policy."""

    policy: Tensor
    reference: Tensor | None = None
    lengths: Tensor | None = None
    desirable: Tensor | None = None  # bool
    mismatched: Tensor | None = None
    kl_score: Tensor | None = None
    present: Tensor | None = None  # bool; None: all

    @property
    def log_ratio(self) -> Tensor:
        """log policy - log reference."""
        return self.policy if self.reference is None else self.policy - self.reference


@dataclass(frozen=True)
class GroupLogprob:
    """Completions of one prompt side by side, all [G, K]; `present` (bool) is False where a group has fewer than K."""

    policy: Tensor
    reference: Tensor | None = None
    behaviour: Tensor | None = None
    lengths: Tensor | None = None
    rewards: Tensor | None = None
    present: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log policy - log reference."""
        return self.policy if self.reference is None else self.policy - self.reference

    def log_softmax(self, score: Tensor) -> Tensor:
        """Logarithm of the softmax over the completions that are present; 0 elsewhere."""
        return torch.where(self.present, torch.where(self.present, score, -torch.inf).log_softmax(-1), 0)

    def softmax(self, score: Tensor) -> Tensor:
        """The softmax over the completions that are present; 0 elsewhere."""
        return torch.where(self.present, score, -torch.inf).softmax(-1)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the completions that are present; [G]."""
        return torch.where(self.present, value, 0).sum(-1)


@dataclass(frozen=True)
class SequenceInputs:
    """The tensors of a call, each [S] (`opponents` [H, S]) and as they came; `pairs`, `completions` and `groups` arrange them."""

    policy: Tensor
    reference: Tensor | None = None
    lengths: Tensor | None = None
    behaviour: Tensor | None = None
    rewards: Tensor | None = None
    opponents: Tensor | None = None
    desirable: Tensor | None = None
    mismatched: Tensor | None = None
    log_sum_sq_prob: Tensor | None = None
    kl_score: Tensor | None = None
    reference_kl: Tensor | None = None

    def given(self) -> frozenset[str]:
        """Names of the tensors that there are beside the policy."""
        return frozenset(field.name for field in fields(self)[1:] if getattr(self, field.name) is not None)

    def pairs(self, rows: Tensor | None, columns: int = 2) -> PairLogprob:
        """rows: [P, columns] of chosen, rejected and, for columns = 3, gold; None: the columns follow each other."""

        def take(value_S: Tensor | None) -> list[Tensor] | None:
            if value_S is None:
                return None
            value_S = value_S.double()
            if rows is None:
                return list(value_S.view(columns, -1).unbind(0))
            return [value_S[row_P] for row_P in rows.unbind(1)]

        policy = take(self.policy)
        lengths = [torch.ones_like(value_P) for value_P in policy] if self.lengths is None else take(self.lengths)
        present_P = torch.stack([length_P > 0 for length_P in lengths]).all(0)

        def pair(values: list[Tensor] | None, fill: float = 0) -> Pair | None:
            return None if values is None else Pair(*(torch.where(present_P, value_P, fill) for value_P in values[:2]))

        reference = pair(take(_constant(self.reference)))
        opponents = () if self.opponents is None else (pair(take(row_S)) for row_S in self.opponents.detach())
        gold = (torch.where(present_P, policy[2], 0), torch.where(present_P, lengths[2], 1)) if columns == 3 else None
        return PairLogprob(
            pair(policy),
            reference,
            reference if self.behaviour is None else pair(take(_constant(self.behaviour))),
            pair(lengths, 1),
            tuple(opponents),
            pair(take(_constant(self.log_sum_sq_prob))),
            None if gold is None else Gold(*gold),
            present_P,
            pair(take(self.reference_kl)),
        )

    def completions(self) -> CompletionLogprob:
        policy_S = self.policy.double()
        lengths_S = torch.ones_like(policy_S) if self.lengths is None else self.lengths.double()
        present_S = lengths_S > 0

        def keep(value_S: Tensor | None, fill: float = 0) -> Tensor | None:
            return None if value_S is None else torch.where(present_S, value_S.double(), fill)

        return CompletionLogprob(
            keep(policy_S),
            keep(_constant(self.reference)),
            keep(lengths_S, 1),
            self.desirable,
            keep(_constant(self.mismatched)),
            keep(self.kl_score),
            present_S,
        )

    def groups(self, rows_GK: Tensor) -> tuple[GroupLogprob, Tensor]:
        """The groups, and which of them have two completions to compare (bool [G]). Rows below 0 hold no completion."""
        index_GK = rows_GK.clamp(min=0)
        lengths_GK = None if self.lengths is None else self.lengths[index_GK].double()
        present_GK = rows_GK >= 0 if lengths_GK is None else (rows_GK >= 0) & (lengths_GK > 0)
        counts_G = present_GK.sum(-1) > 1

        def keep(value_S: Tensor | None, fill: float = 0) -> Tensor | None:
            if value_S is None:
                return None
            return torch.where(present_GK & counts_G[:, None], value_S[index_GK].double(), fill)

        reference = keep(_constant(self.reference))
        group = GroupLogprob(
            keep(self.policy),
            reference,
            reference if self.behaviour is None else keep(_constant(self.behaviour)),
            torch.ones_like(present_GK, dtype=torch.float64) if lengths_GK is None else keep(self.lengths, 1),
            keep(_constant(self.rewards)),
            # a group that does not count has all its rows, all equal: no softmax over nothing
            present_GK | ~counts_G[:, None],
        )
        return group, counts_G


def mean_of_present(value: Tensor, present: Tensor | None) -> Tensor:
    """The mean over the items that are True in `present` (None: all); 0 where none is."""
    if present is None:
        present = torch.ones_like(value, dtype=torch.bool)
    return torch.where(present, value, 0).sum() / present.sum().clamp(min=1)


def _constant(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
