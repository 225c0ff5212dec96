"""Drop-ins for Liger's fused linear losses (liger-kernel 0.8.2): same constructors, calls, outputs and values.

What makes them differ: the logits of a pair are never held, tokens that are not scored cost no matrix work, what is frozen gets no
gradient, and logits are not rounded to 16 bits. `compiled` and `chunk_size` say how Liger gets its numbers; they are taken and do
nothing. Beyond Liger's arguments each constructor takes gradient, vocab_order, max_workspace_mb and backend, as in
`isdaa_kernels.linear_logprob`.

B rows of T tokens, padded with ignored targets: P chosen, then P rejected. D hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from isdaa_kernels import LMHead, Routed, VocabOrder, linear_logprob, preference_loss, sequence_logprob
from isdaa_kernels.integrations.cross_entropy import (
    TokenLoss,
    check_reduction,
    class_weight_of,
    token_cross_entropy,
    total,
)
from isdaa_kernels.integrations.liger_distillation import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from isdaa_kernels.integrations.liger_policy import LigerFusedLinearGRPOLoss

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]

Gradient = Literal["exact"] | Routed

# loss_type of LigerFusedLinearDPOLoss -> the objective with its formula
DPO_OBJECTIVES = {
    "sigmoid": "dpo",
    "hinge": "slic",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "robust": "robust_dpo",
    "bco_pair": "bco",
    "sppo_hard": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
}
# loss types with label_smoothing: what it may be
SMOOTHED = {
    "exo_pair": ("above 0, up to 0.5", lambda e: 0 < e <= 0.5),
    "robust": ("from 0 to less than 0.5", lambda e: 0 <= e < 0.5),
}
ROWS_OF_A_SUM = 4096


class _PreferenceLoss(nn.Module):
    """What the losses share: how rows of tokens become log-probs. `kernel` goes to `linear_logprob`."""

    ignore_index: int
    kernel: dict[str, object]

    def _row_logprob(self, hidden: Tensor, head: LMHead, target: Tensor, average: bool) -> tuple[Tensor, Tensor]:
        """(log-prob of each row, sum or mean over its scored tokens, fp64 [B]; of each token [B, T])."""
        logprob = self._token_logprob(hidden, head, target)
        scored = target != self.ignore_index
        return sequence_logprob(logprob, mask=scored, reduce="mean" if average else "sum"), logprob

    def _token_logprob(self, hidden: Tensor, head: LMHead, target: Tensor) -> Tensor:
        return linear_logprob(
            hidden, head.weight, target, bias=head.bias, ignore_index=self.ignore_index, **self.kernel
        )

    def _check_reference(self, hidden: Tensor | None, weight: Tensor | None, policy_weight: Tensor) -> None:
        if not self.use_ref_model:
            return
        if hidden is None or weight is None:
            raise ValueError("ref_input, ref_weight: expected both with use_ref_model=True, got None")
        rows = len(policy_weight)
        if len(weight) != rows:
            raise ValueError(f"ref_weight: expected {rows} rows, the vocabulary of lin_weight, got {len(weight)}")

    def _reference(
        self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, target: Tensor, average: bool
    ) -> Tensor:
        """Log-prob of each row under the reference, [B]: zeros where the loss does without."""
        if not self.use_ref_model:
            return torch.zeros(len(target), dtype=torch.float64, device=target.device)
        with torch.no_grad():
            return self._row_logprob(hidden, LMHead(weight, bias), target, average)[0]


class _PairLoss(_PreferenceLoss):
    def _score(self, head: LMHead, hidden: Tensor, target: Tensor, average: bool, nll_target: Tensor | None = None):
        _check_rows(hidden, target)
        if len(target) % 2:
            raise ValueError(f"target: expected chosen rows and as many rejected ones, got {len(target)} rows")
        P = len(target) // 2
        rows_B, logprob = self._row_logprob(hidden, head, target, average)
        nll = torch.zeros((), dtype=torch.float64, device=target.device)
        if self.compute_nll_loss:
            chosen_target, chosen = target[:P], logprob[:P]
            if nll_target is not None:
                chosen_target = nll_target[:P]
                chosen = self._token_logprob(hidden[:P], head, chosen_target)
            nll = -chosen.sum(dtype=torch.float64) / (chosen_target != self.ignore_index).sum().clamp(min=1)
        return _Scored(
            rows_B,
            (target != self.ignore_index).sum(-1),
            nll,
            logit_sums(hidden, head),
            target.shape[1],
            len(head.weight),
        )


@dataclass(frozen=True)
class _Scored:
    """A batch of pairs under the policy."""

    rows_B: Tensor  # log-probs, fp64
    lengths_B: Tensor
    nll: Tensor
    logit_sums_B: Tensor
    T: int
    V: int

    def outputs(self, beta: float, reference_B: Tensor | None = None) -> tuple[Tensor, ...]:
        """Chosen and rejected log-probs [P], mean logits, NLL, chosen and rejected rewards [P]; fp32, detached."""
        rows_B = self.rows_B.detach()
        rewards_B = beta * (rows_B if reference_B is None else rows_B - reference_B)
        means = (self.logit_sums_B.unflatten(0, (2, -1)).mean(-1) / (self.T * self.V)).unbind()
        numbers = (*rows_B.chunk(2), *means, self.nll.detach(), *rewards_B.chunk(2))
        return tuple(number.float() for number in numbers)


class LigerFusedLinearDPOLoss(_PairLoss):
    """DPO and its relatives.

    forward(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias) -> (loss, outputs)

    loss = alpha * NLL of the chosen tokens (with compute_nll_loss) + the mean over pairs of the objective that DPO_OBJECTIVES names, of
    sums of log-probs (means, with average_log_prob) under the policy and, with use_ref_model, the reference; without it that is 0.
    outputs: chosen and rejected log-probs [P], mean logit of chosen and of rejected rows (over all tokens, made from sums of hidden and
    weight), NLL, chosen and rejected rewards [P]; fp32 and detached.

    label_smoothing raises ValueError for loss types other than exo_pair and robust, where Liger would ignore it, and outside of (0, 0.5]
    and [0, 0.5) for these. With average_log_prob a row without scored tokens makes NaN of Liger's loss; here its pair counts for 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        gradient: Gradient = "exact",
        vocab_order: VocabOrder | None = None,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.loss_type, self.label_smoothing, self.discopop_tau = loss_type, label_smoothing, discopop_tau
        self.kernel = _kernel(gradient, vocab_order, max_workspace_mb, backend)
        if loss_type not in DPO_OBJECTIVES:
            raise ValueError(f"loss_type: expected one of {', '.join(DPO_OBJECTIVES)}, got {loss_type!r}")
        if label_smoothing and loss_type not in SMOOTHED:
            raise ValueError(
                f"label_smoothing: loss_type {loss_type!r} would ignore it; expected 0, got {label_smoothing}"
            )
        if loss_type in SMOOTHED and not SMOOTHED[loss_type][1](label_smoothing):
            raise ValueError(
                f"label_smoothing: expected a number {SMOOTHED[loss_type][0]} with loss_type {loss_type!r}, got {label_smoothing}"
            )

    def forward(self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None):
        self._check_reference(ref_input, ref_weight, lin_weight)
        average = self.average_log_prob
        scored = self._score(LMHead(lin_weight, bias), _input, target, average)
        reference_B = self._reference(ref_input, ref_weight, ref_bias, target, average)
        options = {"mixing_temperature": self.discopop_tau} if self.loss_type == "discopop" else {}
        if self.loss_type in SMOOTHED:
            options["label_smoothing"] = self.label_smoothing
        loss, _ = preference_loss(
            scored.rows_B,
            reference_B,
            objective=DPO_OBJECTIVES[self.loss_type],
            beta=self.beta,
            lengths=scored.lengths_B if average else None,
            **options,
        )
        return self.alpha * scored.nll.float() + loss, scored.outputs(self.beta, reference_B)


class LigerFusedLinearSimPOLoss(_PairLoss):
    """SimPO, of mean log-probs m.

    forward(lin_weight, _input, target, bias) -> (loss, outputs), outputs as in `LigerFusedLinearDPOLoss`

    loss = alpha * NLL + the mean over pairs of -(1 - e) LS(u) - e LS(-u), u = beta (m_w - m_l) - gamma, e = label_smoothing.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        *,
        gradient: Gradient = "exact",
        vocab_order: VocabOrder | None = None,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size
        self.label_smoothing, self.gamma = label_smoothing, gamma
        self.kernel = _kernel(gradient, vocab_order, max_workspace_mb, backend)

    def forward(self, lin_weight, _input, target, bias=None):
        scored = self._score(LMHead(lin_weight, bias), _input, target, average=True)
        loss = _margin_loss(scored, self.beta, self.gamma, self.label_smoothing, average=True)
        return self.alpha * scored.nll.float() + loss, scored.outputs(self.beta)


class LigerFusedLinearCPOLoss(_PairLoss):
    """CPO.

    forward(lin_weight, _input, target, bias) -> (loss, outputs), outputs as in `LigerFusedLinearDPOLoss`

    loss = alpha * NLL + the mean over pairs of -(1 - e) LS(u) - e LS(-u), u = beta (logp_w - logp_l), e = label_smoothing, of sums of
    log-probs (means, with average_log_prob).
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        gradient: Gradient = "exact",
        vocab_order: VocabOrder | None = None,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size
        self.label_smoothing, self.average_log_prob = label_smoothing, average_log_prob
        self.kernel = _kernel(gradient, vocab_order, max_workspace_mb, backend)

    def forward(self, lin_weight, _input, target, bias=None):
        scored = self._score(LMHead(lin_weight, bias), _input, target, self.average_log_prob)
        loss = _margin_loss(scored, self.beta, 0.0, self.label_smoothing, self.average_log_prob)
        return self.alpha * scored.nll.float() + loss, scored.outputs(self.beta)


class LigerFusedLinearORPOLoss(_PairLoss):
    """ORPO, of mean log-probs m.

    forward(lin_weight, _input, target, bias, nll_target) -> (loss, outputs)

    loss = NLL - beta * the mean over pairs of LS(o_w - o_l), o = m - log(1 - exp(m)). outputs: those of `LigerFusedLinearDPOLoss`, then
    the means of LS(o_w - o_l) and of o_w - o_l. nll_target: other targets for the NLL, which takes a pass of its own over the chosen
    rows then. Above m = -1e-6 the odds are those of that, where Liger's are infinite at 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        *,
        gradient: Gradient = "exact",
        vocab_order: VocabOrder | None = None,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size
        self.kernel = _kernel(gradient, vocab_order, max_workspace_mb, backend)

    def forward(self, lin_weight, _input, target, bias=None, nll_target=None):
        scored = self._score(LMHead(lin_weight, bias), _input, target, average=True, nll_target=nll_target)
        loss, _ = preference_loss(
            scored.rows_B * scored.lengths_B,
            objective="orpo",
            lengths=scored.lengths_B,
            odds_weight=self.beta,
            sft_weight=0.0,
        )
        mean_B = scored.rows_B.detach().clamp(max=-1e-6)
        chosen_P, rejected_P = (mean_B - torch.log(-torch.expm1(mean_B))).chunk(2)
        log_odds_P = chosen_P - rejected_P
        more = (nn.functional.logsigmoid(log_odds_P).mean().float(), log_odds_P.mean().float())
        return scored.nll.float() + loss, (*scored.outputs(self.beta), *more)


class LigerFusedLinearKTOLoss(_PreferenceLoss):
    """KTO.

    forward(_input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl) -> (loss, outputs)

    loss = mean over rows of 1 - S(beta (r - kl)) where preference_labels [B] is True, of 1 - S(-beta (r - kl)) elsewhere; r is the
    log-ratio to the reference, or the log-prob without one. kl: one number, without gradient; None: 0. outputs: sums over the rows
    of either label of log-probs, logits and rewards (chosen, rejected, chosen, ...); fp32 and detached.

    Numbers are Liger's at its chunk_size = 1; with more, Liger fails or its sums mix the rows of a chunk. A kl for every row, which
    makes Liger's loss B times too large, raises ValueError.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        gradient: Gradient = "exact",
        vocab_order: VocabOrder | None = None,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.use_ref_model = ignore_index, beta, use_ref_model
        self.compiled, self.chunk_size, self.average_log_prob = compiled, chunk_size, average_log_prob
        self.kernel = _kernel(gradient, vocab_order, max_workspace_mb, backend)

    def forward(
        self,
        _input,
        lin_weight,
        target,
        bias=None,
        preference_labels=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        kl=None,
    ):
        _check_rows(_input, target)
        labels_B, average = preference_labels, self.average_log_prob
        if not isinstance(labels_B, Tensor) or labels_B.dtype != torch.bool or labels_B.shape != target.shape[:1]:
            raise ValueError(f"preference_labels: expected bool [{len(target)}], got {_describe(labels_B)}")
        if isinstance(kl, Tensor) and kl.numel() != 1:
            raise ValueError(f"kl: expected one number for the batch, got {list(kl.shape)}")
        self._check_reference(ref_input, ref_weight, lin_weight)
        head = LMHead(lin_weight, bias)
        rows_B, _ = self._row_logprob(_input, head, target, average)
        ratio_B = rows_B - self._reference(ref_input, ref_weight, ref_bias, target, average)
        kl = kl.detach().reshape(()) if isinstance(kl, Tensor) else (kl or 0.0)
        gain_B = self.beta * (ratio_B - kl)
        loss = (torch.where(labels_B, -gain_B, gain_B).sigmoid().sum() / max(len(target), 1)).float()
        numbers = (rows_B, logit_sums(_input, head), self.beta * ratio_B)
        outputs = (
            torch.where(of, number.detach(), 0).sum().float() for number in numbers for of in (labels_B, ~labels_B)
        )
        return loss, tuple(outputs)


@dataclass
class CrossEntropyOutput:
    """What `LigerFusedLinearCrossEntropyLoss` returns where more than the loss is asked for; the other fields have no
    gradient."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross entropy.

    forward(lin_weight, _input, target, bias) -> the loss, or a `CrossEntropyOutput`

    The loss of a token is w[target] ((1 - e) nll + e (lse - mean z)) + lse_square_scale lse^2, e = label_smoothing, w = ce_weight. The
    mean divides the first term by the sum of w[target], the second by the number of tokens; no token: 0. use_token_scaling: times
    the token's probability, detached. return_token_accuracy: the share of targets that no logit exceeds (Liger: that are the first
    of the largest).

    Raises ValueError for ce_weight with label_smoothing, for return_predicted_tokens, and for an accum_dtype other than None and
    torch.float32, in which sums are always made.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        *,
        gradient: Gradient = "exact",
        vocab_order: VocabOrder | None = None,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"accum_dtype: expected None or torch.float32, got {accum_dtype}")
        if return_predicted_tokens:
            raise ValueError("return_predicted_tokens: expected False; the index of the largest logit is not kept")
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = return_z_loss, accum_dtype, use_token_scaling
        self.return_token_accuracy, self.return_predicted_tokens = return_token_accuracy, return_predicted_tokens
        self.kernel = _kernel(gradient, vocab_order, max_workspace_mb, backend)

    def forward(self, lin_weight, _input, target, bias=None):
        weight = class_weight_of(target, self.ce_weight, len(lin_weight), self.ignore_index, self.label_smoothing)
        squared = bool(self.lse_square_scale) or self.return_z_loss
        names = (*(("lse",) if squared else ()), *(("is_top1",) if self.return_token_accuracy else ()))
        tokens = token_cross_entropy(
            _input,
            LMHead(lin_weight, bias, softcap=self.softcap),
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            stats=names,
            **self.kernel,
        )
        return self._reduced(tokens, weight, (target != self.ignore_index).sum().clamp(min=1))

    def _reduced(self, tokens: TokenLoss, weight: Tensor, count: Tensor) -> Tensor | CrossEntropyOutput:
        stats = tokens.stats
        mean = self.reduction == "mean"
        probability = tokens.logprob.detach().exp() if self.use_token_scaling else 1
        loss = tokens.loss * weight / (total(weight).clamp(min=torch.finfo(weight.dtype).tiny) if mean else 1)
        squares = None
        if stats.lse is not None:
            squares = probability * self.lse_square_scale * stats.lse.square() / (count if mean else 1)
        loss = loss * probability + (0 if squares is None else squares)
        correct = None if stats.is_top1 is None else stats.is_top1.float()
        if self.reduction != "none":
            loss = total(loss)
            squares = None if squares is None else total(squares)
            correct = None if correct is None else correct.sum() / count
        if not self.return_z_loss and not self.return_token_accuracy:
            return loss
        return CrossEntropyOutput(loss, squares.detach() if self.return_z_loss else None, correct)


@torch.no_grad()
def logit_sums(hidden: Tensor, head: LMHead) -> Tensor:
    """Sum of the logits of each row of [B, T, D], ignored tokens included, without making them: (sum of hidden) .
    (sum of weight); fp64 [B]."""
    weight_D = _column_sums(head.weight)
    sums_B = torch.stack([_column_sums(hidden_TD) @ weight_D for hidden_TD in hidden]) if len(hidden) else weight_D[:0]
    return sums_B if head.bias is None else sums_B + hidden.shape[1] * head.bias.sum(dtype=torch.float64)


def _column_sums(matrix: Tensor) -> Tensor:
    """Sums over the rows of [N, D], fp64 [D]; in pieces, as a sum in another dtype would copy the matrix."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return sum(piece.sum(0, dtype=dtype).double() for piece in matrix.split(ROWS_OF_A_SUM))


def _margin_loss(scored: _Scored, beta: float, gamma: float, label_smoothing: float, average: bool) -> Tensor:
    """-(1 - e) LS(u) - e LS(-u), u = beta * (chosen - rejected) - gamma, the mean over pairs."""
    options = {"beta": beta, "label_smoothing": label_smoothing, "sft_weight": 0.0}
    if average:
        lengths_B = scored.lengths_B
        loss, _ = preference_loss(
            scored.rows_B * lengths_B, objective="simpo", lengths=lengths_B, margin=gamma, **options
        )
        return loss
    # no row counts as empty: one without scored tokens has the log-prob 0
    loss, _ = preference_loss(scored.rows_B, objective="cpo", lengths=torch.ones_like(scored.lengths_B), **options)
    return loss


def _kernel(
    gradient: Gradient, vocab_order: VocabOrder | None, max_workspace_mb: float | None, backend: str | None
) -> dict[str, object]:
    return {
        "gradient": gradient,
        "vocab_order": vocab_order,
        "max_workspace_mb": max_workspace_mb,
        "backend": backend,
    }


def _check_rows(hidden: Tensor, target: Tensor) -> None:
    if hidden.ndim != 3 or target.shape != hidden.shape[:2]:
        raise ValueError(
            f"_input, target: expected [B, T, D] and [B, T], got {list(hidden.shape)} and {list(target.shape)}"
        )


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
