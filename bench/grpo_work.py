"""The head's part of a GRPO step, as every contender does it and as it is in fp64.

N tokens in S completions of T, D hidden size, V vocabulary; rho = policy / old of a token, A the advantage of its completion. Of a token

    loss = -min(rho A, clip(rho) A) + KL_WEIGHT (exp(d) - d - 1) - weight of the entropy * entropy,  d = log reference - log policy

or the exact KL(policy || reference) over the vocabulary in the place of its estimate; then the mean over a completion, then over
completions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.contenders import LIGER, TRL, TRL_CHUNK, Outcome, room_mb
from bench.problem import Problem, make_problem
from bench.states import States
from isdaa_kernels import Routed, linear_policy_loss, make_vocab_order
from isdaa_kernels.integrations.liger import LigerFusedLinearGRPOLoss

CLIP, KL_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.04, 0.01
DRIFT = 0.15  # standard deviation of what a given reference log-prob is off by
# |log policy - log old|: some ratios of tokens are clipped, most are not, and none is so near the clip that rounding decides
NEAR, FAR, FAR_SHARE = 0.05, 0.4, 0.3
IGNORED = -100
CHUNK = 128  # tokens of the truth at once


@dataclass(frozen=True, kw_only=True)
class Work(Problem):
    """Old and reference log-probs are numbers that the step is given. Completions are padded with IGNORED to T."""

    old_N: Tensor
    reference_N: Tensor
    advantages_S: Tensor

    @property
    def scored(self) -> Tensor:
        return self.targets_N != IGNORED

    @property
    def rows(self) -> tuple[int, int]:
        return self.sequences, self.length

    def shorter(self, length: int) -> "Work":
        """For the call that warms up: all its tokens are scored."""
        cut = {name: getattr(self, name)[: self.sequences * length] for name in ("old_N", "reference_N")}
        short = super().shorter(length)
        return replace(short, targets_N=short.targets_N.clamp(min=0), **cut)

    def written_out(self, logprob_N: Tensor, part: slice = slice(None), **terms: Tensor | None) -> Tensor:
        """The share of some tokens in the loss, from their log-probs; terms: reference, entropy, kl, [N] as far as they enter."""
        reference_N, entropy_N, kl_N = (terms.get(name) for name in ("reference", "entropy", "kl"))
        reference_N = self.reference_N[part] if reference_N is None else reference_N
        advantages_N = self.advantages_S.to(logprob_N.dtype).repeat_interleave(self.length)[part]
        ratio_N = (logprob_N - self.old_N[part]).exp()
        loss_N = -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(1 - CLIP, 1 + CLIP) * advantages_N)
        gap_N = reference_N - logprob_N
        loss_N = loss_N + KL_WEIGHT * (gap_N.exp() - gap_N - 1 if kl_N is None else kl_N)
        if entropy_N is not None:
            loss_N = loss_N - ENTROPY_WEIGHT * entropy_N
        counts_N = self.scored.view(self.rows).sum(1).repeat_interleave(self.length)[part]
        return (loss_N.where(self.scored[part], 0) / counts_N).sum() / self.sequences

    def mean(self, value_N: Tensor, part: slice = slice(None)) -> Tensor:
        """The share of some tokens in the mean over the scored ones."""
        return value_N.where(self.scored[part], 0).sum() / self.scored.sum()


def make_work(states: States, padding: float = 0.0, seed: int = 0) -> Work:
    """Work on as many of the states as fill completions of equal length, of which shares between 0 and twice `padding` are padding."""
    problem = make_problem(states, seed)
    S, T = problem.sequences, problem.length
    kept_S = (T * (1 - 2 * padding * torch.linspace(0, 1, S))).long().clamp(min=1)
    scored_ST = torch.arange(T) < kept_S[:, None]
    return add_numbers(replace(problem, targets_N=problem.targets_N.where(scored_ST.flatten(), IGNORED)), seed)


def add_numbers(problem: Problem, seed: int = 0) -> Work:
    """Advantages, old and reference log-probs of a problem, where it is."""
    generator, device = torch.Generator().manual_seed(seed + 1), problem.targets_N.device
    advantages_S, sign_N, drift_N = (
        torch.randn(size, generator=generator) for size in (problem.sequences, problem.tokens, problem.tokens)
    )
    far_N = torch.rand(problem.tokens, generator=generator) < FAR_SHARE
    gap_N = torch.where(far_N, FAR, NEAR) * sign_N.sign()
    # also the reference drifts: numbers that are given are not those that a step makes of its states, so that no contender is taken
    # for having made them
    return Work(
        **vars(problem),
        old_N=_logprob(problem.hidden_ND, problem) + gap_N.to(device),
        reference_N=_logprob(problem.reference_hidden_ND, problem) + DRIFT * drift_N.to(device),
        advantages_S=advantages_S.to(device),
    )


def _logprob(hidden_ND: Tensor, problem: Problem) -> Tensor:
    """fp32 [N], 0 where there is no target; of no contender, whose faults would else be everyone's."""
    weight_VD, parts = problem.weight_VD.float(), []
    for hidden_nD, targets_n in zip(hidden_ND.split(CHUNK), problem.targets_N.split(CHUNK), strict=True):
        log_p = (hidden_nD.float() @ weight_VD.T).log_softmax(-1)
        parts.append(log_p.gather(-1, targets_n.clamp(min=0)[:, None])[:, 0].where(targets_n != IGNORED, 0))
    return torch.cat(parts)


class Case(NamedTuple):
    """What a step does beside log-probs and loss."""

    name: str
    title: str
    entropy: str | None = None  # "metric": its mean is returned; "bonus": it is in the loss
    reference_forward: bool = False  # the reference's log-probs come from its states, in the step
    full_kl: bool = False

    def value(self, loss: Tensor, entropy: Tensor | None) -> Tensor:
        """What is compared: the loss, and the mean entropy where it is a metric."""
        return torch.stack([loss.double(), entropy.detach().double()]) if self.entropy == "metric" else loss


CASES = {
    case.name: case
    for case in (
        Case("loss", "Log-probs, clipped loss, k3 to given reference log-probs"),
        Case("entropy", "The same and the mean entropy, a metric", entropy="metric"),
        Case("bonus", "The entropy in the loss, with its gradient", entropy="bonus"),
        Case("reference", "Log-probs, clipped loss, k3; the reference's forward in the step", reference_forward=True),
        Case("full-kl", "Log-probs, clipped loss, exact KL over the vocabulary", full_kl=True),
    )
}
Function = Callable[[Tensor, Tensor], Tensor]  # (hidden_ND, weight_VD) -> Case.value


def dense(work: Work, case: Case) -> Function:
    """Log-softmaxes kept, one of each model, and shared by all that needs them."""

    def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        loss, entropy = dense_part(work, case, hidden_ND, weight_VD, work.reference_hidden_ND, work.weight_VD)
        return case.value(loss, entropy)

    return function


def dense_part(
    work: Work,
    case: Case,
    hidden_nD: Tensor,
    weight_VD: Tensor,
    other_nD: Tensor,
    other_VD: Tensor,
    part: slice = slice(None),
) -> tuple[Tensor, Tensor | None]:
    """The share of some tokens in (loss, mean entropy). Logits as the product rounds them, the rest in fp32 or fp64."""
    targets_n1 = work.targets_N[part].clamp(min=0)[:, None]
    dtype = torch.promote_types(hidden_nD.dtype, torch.float32)
    log_p = (hidden_nD @ weight_VD.T).to(dtype).log_softmax(-1)
    terms, entropy = {}, None
    if case.reference_forward or case.full_kl:
        with torch.no_grad():
            log_q = (other_nD @ other_VD.T).to(dtype).log_softmax(-1)
        if case.reference_forward:
            terms["reference"] = log_q.gather(-1, targets_n1)[:, 0]
        else:
            terms["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
    if case.entropy is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and case.entropy == "bonus"):
            entropy_n = -(log_p.exp() * log_p).sum(-1)
        entropy = work.mean(entropy_n, part)
        terms |= {"entropy": entropy_n} if case.entropy == "bonus" else {}
    return work.written_out(log_p.gather(-1, targets_n1)[:, 0], part, **terms), entropy


def trl(work: Work, case: Case) -> Function:
    """What TRL 1.16's GRPOTrainer does on the CPU: its fused head over all positions, label 0 where there is none, and the loss in
    PyTorch; the divergence of its DistillationTrainer where the exact one is asked for."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    targets_N, outputs = work.targets_N.clamp(min=0), () if case.entropy is None else ("entropy",)

    def head(hidden_ND: Tensor, weight_VD: Tensor, outputs: tuple[str, ...] = ()) -> tuple[Tensor | None, ...]:
        return ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, targets_N, 1.0, TRL_CHUNK, None, 1.0, outputs)

    def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        terms = {}
        if case.reference_forward:
            with torch.no_grad():
                terms["reference"] = head(work.reference_hidden_ND, work.weight_VD)[0]
        if case.full_kl:
            other = (work.reference_hidden_ND, work.weight_VD, None)
            terms["kl"] = ChunkedDivergenceFunction.apply(hidden_ND, weight_VD, None, *other, 1.0)[0]
        logprob_N, entropy_N, *_ = head(hidden_ND, weight_VD, outputs)
        terms |= {"entropy": entropy_N} if case.entropy == "bonus" else {}
        loss = work.written_out(logprob_N, **terms)
        return case.value(loss, None if entropy_N is None else work.mean(entropy_N))

    return function


def of_liger(find: Callable[[], type]) -> Callable[[Work, Case], Function]:
    """`find`: Liger's class, imported when it is needed, or ours with its signature."""

    def prepare(work: Work, case: Case) -> Function:
        loss = find()(beta=KL_WEIGHT, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo")
        rows = work.rows
        reference = {"ref_per_token_logps": work.reference_N.view(rows)}
        if case.reference_forward:
            reference = {"ref_input": work.reference_hidden_ND.view(*rows, -1), "ref_weight": work.weight_VD}
        targets_ST, mask_ST = work.targets_N.clamp(min=0).view(rows), work.scored.view(rows).long()
        old_ST = work.old_N.view(rows)

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            hidden_STD = hidden_ND.view(*rows, -1)
            given = (hidden_STD, weight_VD, targets_ST, mask_ST, work.advantages_S)
            return loss(*given, old_per_token_logps=old_ST, **reference)[0]

        return function

    return prepare


def liger_class() -> type:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Original

    return Original


def ours(**kernel: object) -> Callable[[Work, Case], Function]:
    def prepare(work: Work, case: Case) -> Function:
        cu_seqlens, other = work.cu_seqlens(), (work.reference_hidden_ND, work.weight_VD)
        options = {"advantages": work.advantages_S, "old_logprob": work.old_N, "kl_weight": KL_WEIGHT}
        options |= {"monitors": ("entropy",)} if case.entropy == "metric" else {}
        options |= {"entropy_weight": ENTROPY_WEIGHT} if case.entropy == "bonus" else {}
        options |= {"kl_direction": "reverse"} if case.full_kl else {}
        options |= (
            {"reference": other} if case.reference_forward or case.full_kl else {"reference_logprob": work.reference_N}
        )

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            given = (hidden_ND, weight_VD, work.targets_N, cu_seqlens)
            loss, metrics = linear_policy_loss(*given, objective="grpo", **options, **kernel)
            return case.value(loss, metrics.get("entropy/mean"))

        return function

    return prepare


def ours_room(work: Work, case: Case) -> Function:
    return ours(max_workspace_mb=room_mb(work))(work, case)


def ours_routed(work: Work, case: Case) -> Function:
    """The order of the vocabulary is made beforehand, as a trainer makes it once in many steps."""
    return ours(gradient=Routed(), vocab_order=make_vocab_order(work.weight_VD, work.hidden_ND[:256]))(work, case)


@dataclass(frozen=True)
class Contender:
    name: str
    provider: str
    prepare: Callable[[Work, Case], Function]
    cases: tuple[str, ...] = tuple(CASES)
    needs: str | None = None  # "module:attribute" that must be importable
    bar: float = 1e-3  # relative error that it may have: far above rounding, far below a wrong formula
    note: str = ""


NO_STATS = ("loss", "reference")
CONTENDERS = (
    Contender("dense PyTorch", "torch", dense, note="fp32 logits and log-softmax, autograd"),
    Contender(
        "TRL 1.16",
        "trl",
        trl,
        needs=TRL,
        note="its trainers' ChunkedLogProbFunction; for the exact KL, which GRPOTrainer has not, ChunkedDivergenceFunction too",
    ),
    Contender("Liger", "liger", of_liger(liger_class), NO_STATS, LIGER, note="LigerFusedLinearGRPOLoss, compiled"),
    Contender("ours", "isdaa", ours(), note="linear_policy_loss; default workspace"),
    Contender("ours, by Liger's signature", "isdaa_liger", of_liger(lambda: LigerFusedLinearGRPOLoss), NO_STATS),
    Contender("ours, room for all logits", "isdaa_room", ours_room, ("loss", "entropy"), note="max_workspace_mb"),
    Contender("ours, routed", "isdaa_routed", ours_routed, NO_STATS, bar=1e-2, note="gradient=Routed(), in order"),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def truth(work: Work, case: Case, differentiated: int | None = None) -> Outcome:
    """In fp64 by autograd, CHUNK tokens at a time. `differentiated`: d_hidden of so many of the first tokens alone, and no d_weight."""
    first = work.tokens if differentiated is None else differentiated
    weight_VD = work.weight_VD.double().requires_grad_(differentiated is None)
    other_VD = weight_VD.detach()
    work = replace(work, **{n: getattr(work, n).double() for n in ("old_N", "reference_N", "advantages_S")})
    values, d_hidden = [], []
    for start in range(0, work.tokens, CHUNK):
        part = slice(start, min(start + CHUNK, work.tokens))
        hidden_nD = work.hidden_ND[part].double().requires_grad_(start < first)
        other_nD = work.reference_hidden_ND[part].double()
        with torch.set_grad_enabled(start < first):
            loss, entropy = dense_part(work, case, hidden_nD, weight_VD, other_nD, other_VD, part)
        if start < first:
            loss.backward()
            d_hidden.append(hidden_nD.grad)
        values.append(case.value(loss, entropy).detach())
    return Outcome(torch.stack(values).sum(0), torch.cat(d_hidden)[:first], weight_VD.grad)


def make_run(contender: Contender, work: Work, case: Case, mode: str) -> Callable[[], Outcome]:
    """What is measured, forward and backward: mode "full", or "frozen head" without a gradient for the head."""
    function = contender.prepare(work, case)

    def run() -> Outcome:
        hidden_ND = work.hidden_ND.detach().requires_grad_()
        weight_VD = work.weight_VD.detach().requires_grad_(mode == "full")
        value = function(hidden_ND, weight_VD)
        (value[0] if value.dim() else value).backward()
        return Outcome(value.detach(), hidden_ND.grad, weight_VD.grad)

    return run
