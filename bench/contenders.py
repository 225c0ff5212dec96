"""The contenders as a table: what prepares one for a problem, and what it needs to be installed.

`prepare(problem)` gives a function of (hidden_ND, weight_VD), differentiable in both: token log-probs [N] in the "token" table (or
minus their sum, of a peer that gives nothing else), the scalar loss of a preference step in the "pair" table. Time, memory and error are
all taken of what `make_run` makes of it.
N tokens, D hidden size, V vocabulary, P pairs of sequences, S = 2 P sequences of T tokens.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import Problem
from isdaa_kernels import Routed, linear_logprob, make_vocab_order
from isdaa_kernels.linear_preference_loss import linear_preference_loss
from isdaa_kernels.testing import dense_logprob

BETA = 0.1
TRL_CHUNK = 32768  # what TRL's trainers pass
# objective -> direction of `linear_kl`, policy and reference of one head
DIVERGENCES = {"reverse_kl": "reverse", "jsd": "jsd"}
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    name: str
    provider: str
    prepare: Callable[[Problem], Function]
    needs: str | None = None  # "module:attribute" that must be importable
    objective: str | None = None  # what is made; "sum": minus the sum of all log-probs; None: every token's
    note: str = ""
    bar: float | None = None  # error it may have, where it leaves something out on purpose; None: that of its dtype

    @property
    def gives_tokens(self) -> bool:
        """Whether its value is one a token, and no scalar."""
        return self.objective is None or self.objective in DIVERGENCES

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return why_missing(self.needs)


def why_missing(needs: str | None) -> str | None:
    """Why "module:attribute" is not to be had here, or None."""
    if needs is None:
        return None
    module, attribute = needs.split(":")
    try:
        found = hasattr(importlib.import_module(module), attribute)
    except Exception as error:  # packages that disagree about a version fail in many ways: all of them are listed
        return f"{type(error).__name__}: {error}"
    return None if found else f"{module} {_version(module)} has no {attribute}"


class Outcome(NamedTuple):
    value: Tensor  # log-probs [N] or a loss
    d_hidden_ND: Tensor | None
    d_weight_VD: Tensor | None

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self if tensor is not None)


def make_run(contender: Contender, problem: Problem, mode: str) -> Callable[[], Outcome]:
    """What is measured: mode "forward" (no gradient wanted) or "full" (forward and backward)."""
    function = contender.prepare(problem)

    def forward() -> Outcome:
        with torch.no_grad():
            return Outcome(function(problem.hidden_ND, problem.weight_VD), None, None)

    def full() -> Outcome:
        hidden_ND = problem.hidden_ND.detach().requires_grad_()
        weight_VD = problem.weight_VD.detach().requires_grad_(not problem.frozen_head)
        value = function(hidden_ND, weight_VD)
        value.backward(problem.upstream_N.to(value.dtype) if value.dim() else None)
        return Outcome(value.detach(), hidden_ND.grad, weight_VD.grad)

    return {"forward": forward, "full": full}[mode]


def dense(problem: Problem) -> Function:
    return lambda hidden_ND, weight_VD: dense_logprob(hidden_ND, weight_VD, problem.targets_N)


def trl(problem: Problem) -> Function:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden_ND, weight_VD, None, problem.targets_N, 1.0, TRL_CHUNK, None, 1.0, ()
        )[0]

    return function


def pytorch_fused(**options: int) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            return -F.linear_cross_entropy(hidden_ND, weight_VD, problem.targets_N, reduction="none", options=chosen)

        return function

    return prepare


def ours(**options: object) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        return lambda hidden_ND, weight_VD: linear_logprob(hidden_ND, weight_VD, problem.targets_N, **options)

    return prepare


def ours_routed(problem: Problem) -> Function:
    """The order of the vocabulary is made beforehand, as a trainer makes it once in many steps."""
    order = make_vocab_order(problem.weight_VD, problem.hidden_ND[:256])
    return ours(gradient=Routed(), vocab_order=order)(problem)


def room_mb(problem: Problem) -> float:
    """MiB for all logits in fp32, and some more."""
    return problem.tokens * problem.weight_VD.shape[0] * 4 / 2**20 + 64


def ours_room(problem: Problem) -> Function:
    return ours(max_workspace_mb=room_mb(problem))(problem)


def dpo_of(prepare: Callable[[Problem], Function]) -> Callable[[Problem], Function]:
    """The DPO step around token log-probs. The reference goes first: its memory is free again before the policy's is taken."""

    def prepare_dpo(problem: Problem) -> Function:
        logprob = prepare(problem)

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            with torch.no_grad():
                reference_N = logprob(problem.reference_hidden_ND, problem.weight_VD)
            ratio_N = logprob(hidden_ND, weight_VD) - reference_N
            ratio_S = ratio_N.double().view(problem.sequences, problem.length).sum(1)
            return -F.logsigmoid(BETA * (ratio_S[: problem.pairs] - ratio_S[problem.pairs :])).mean()

        return function

    return prepare_dpo


def liger_dpo(problem: Problem) -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA)
    targets_ST = problem.targets_N.view(problem.sequences, problem.length)
    reference_STD = problem.reference_hidden_ND.view(problem.sequences, problem.length, -1)

    def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        hidden_STD = hidden_ND.view(problem.sequences, problem.length, -1)
        return loss(weight_VD, hidden_STD, targets_ST, ref_input=reference_STD, ref_weight=problem.weight_VD)[0]

    return function


def ours_preference(objective: str, room: bool = False, **kernel: object) -> Callable[[Problem], Function]:
    def prepare(problem: Problem) -> Function:
        reference = (problem.reference_hidden_ND, problem.weight_VD)
        cu_seqlens = problem.cu_seqlens()
        options = {"reference": reference, "objective": objective, "beta": BETA, **kernel}
        options |= {"max_workspace_mb": room_mb(problem)} if room else {}

        def function(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            return linear_preference_loss(hidden_ND, weight_VD, problem.targets_N, cu_seqlens, **options).loss

        return function

    return prepare


TRL = "trl.kernels.chunked_logprob:ChunkedLogProbFunction"
FUSED = "torch.nn:LinearCrossEntropyOptions"
LIGER = "liger_kernel.chunked_loss:LigerFusedLinearDPOLoss"

CONTENDERS = (
    Contender("dense PyTorch", "torch", dense, note="fp32 log_softmax and gather, autograd"),
    Contender(
        "TRL chunked",
        "trl",
        trl,
        TRL,
        note=f"ChunkedLogProbFunction, tiles of 4096 x {TRL_CHUNK} as its trainers use",
    ),
    Contender(
        "PyTorch fused", "torch_fused", pytorch_fused(), FUSED, note="linear_cross_entropy, its own choice of chunks"
    ),
    Contender(
        "PyTorch fused 512",
        "torch_fused_512",
        pytorch_fused(batch_chunk_size=512),
        FUSED,
        note="linear_cross_entropy, chunks of 512 tokens",
    ),
    Contender("ours", "isdaa", ours(), note="linear_logprob, default workspace"),
    Contender("ours, room for all logits", "isdaa_room", ours_room, note="max_workspace_mb above N * V * 4 bytes"),
    Contender("ours, routed", "isdaa_routed", ours_routed, note="gradient=Routed(), vocabulary in order", bar=1e-2),
    Contender("ours, reference backend", "isdaa_reference", ours(backend="reference"), note="plain PyTorch in chunks"),
    Contender("dense PyTorch DPO", "torch", dpo_of(dense), objective="dpo"),
    Contender("TRL chunked DPO", "trl", dpo_of(trl), TRL, "dpo", note="DPO around ChunkedLogProbFunction"),
    Contender(
        "Liger DPO", "liger", liger_dpo, LIGER, "dpo", note="LigerFusedLinearDPOLoss, compiled, one pair a chunk"
    ),
    Contender("ours DPO", "isdaa", ours_preference("dpo"), objective="dpo", note="linear_preference_loss"),
    Contender("ours DPO, room for all logits", "isdaa_room", ours_preference("dpo", room=True), objective="dpo"),
    Contender("ours IS-DPO", "isdaa_is", ours_preference("is_dpo"), objective="is_dpo", note="linear_preference_loss"),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def _version(module: str) -> str:
    return getattr(importlib.import_module(module.split(".")[0]), "__version__", "of unknown version")


@dataclass(frozen=True)
class Row:
    """A line of the results: a contender in a case, in each mode, on at most `max_tokens` tokens."""

    contender: Contender
    case: str = "ordinary"
    modes: tuple[str, ...] = ("forward", "full")
    max_tokens: int | None = None

    @property
    def title(self) -> str:
        few = f", {self.max_tokens} tokens" if self.max_tokens else ""
        return self.contender.name + ("" if self.case == "ordinary" else f", {self.case}") + few


def all_rows() -> list[Row]:
    """Dense PyTorch meets saturated coefficients on few tokens: it takes minutes there on many."""
    plain, own, full = BY_NAME["dense PyTorch"], BY_NAME["ours"], ("full",)
    rows = [Row(c) for c in CONTENDERS if c.objective is None and c.name != "ours, room for all logits"]
    rows.append(Row(BY_NAME["ours, room for all logits"], modes=full))
    rows += [Row(plain, "frozen head", full), Row(own, "frozen head", full), Row(own, "bf16 inputs")]
    rows += [Row(own, "saturated", full)]
    rows += [Row(c, case, full, 128) for c in (plain, own) for case in ("ordinary", "saturated")]
    rows += [Row(c, modes=full) for c in CONTENDERS if c.objective is not None]
    return rows
