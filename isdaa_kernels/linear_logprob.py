"""Token log-probs from hidden states and an LM head, without the logits.

N tokens, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from isdaa_kernels import ops
from isdaa_kernels.arguments import autocast, check_floats, check_targets, split_temperature
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.routing import Routed, check_gradient
from isdaa_kernels.stats import StatsRequest, VocabStats, check_stats
from isdaa_kernels.targets import raise_bad_targets
from isdaa_kernels.vocab_order import VocabOrder
from isdaa_kernels.workspace import check_workspace


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    max_scored: int | None = None,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor:
    """Log-probability of each target under the LM head, with exact gradients for hidden, weight and bias. Equal to

        z = (hidden @ weight.T + bias).float() * logit_scale
        z = softcap * (z / softcap).tanh() / temperature           # softcap only where given
        logprob = z.log_softmax(-1).gather(-1, targets[..., None])[..., 0].where(targets != ignore_index, 0)

    Neither the logits [..., V] nor their gradient is ever allocated: they exist one tile at a time, in fp32 (fp64 for fp64 inputs).

    hidden [..., D] and weight [V, D]: fp16, bf16, fp32 or fp64, dtypes may differ, any strides. targets [...]: int64 or int32, the
    label of each hidden state, already shifted (`shift_targets`); an ignored one costs no matrix work on backends that compact.
    bias [V]. temperature: a positive number, or one a token [...]; not differentiable. max_scored: an upper bound on the targets
    that are not ignored, known to a collator; sizes buffers. max_workspace_mb: MiB that the call may allocate beyond inputs, output
    and gradients; more keeps part of the logits for the backward and saves their recomputation (`plan` says what it buys); None
    keeps none. gradient: "exact", or `Routed(...)`, whose docstring says what it leaves out and how far that can be off; the log-prob
    is the same. vocab_order: of `make_vocab_order`; with it fewer blocks are routed to. backend: a name, or None for the best one for
    the device (`explain_backends`). validate: check targets now, even where that waits for a device.

    Under autocast hidden and weight are cast to its dtype. Gradients have the dtypes of their inputs, are summed in fp32 and
    rounded once. A second derivative raises RuntimeError.

    Returns fp32 [...] (fp64 for fp64 inputs), 0 where the target is ignored. Raises ValueError for shapes, dtypes, devices and
    values that do not fit (a target outside the vocabulary: at once on the CPU, through `check` on a device), NoBackend where no
    backend takes the problem.
    """
    head = LMHead(weight, bias, logit_scale, softcap)
    logprob, _ = _run(
        hidden,
        head,
        targets,
        StatsRequest(),
        temperature,
        ignore_index,
        max_scored,
        gradient,
        vocab_order,
        max_workspace_mb,
        backend,
        validate,
    )
    return logprob


def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    stats: Sequence[str] = ("entropy",),
    detached: Sequence[str] = (),
    top_k: int = 20,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    max_scored: int | None = None,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, VocabStats]:
    """`linear_logprob`, and statistics of each token's distribution from the same pass over the logits. With its z, equal to

        p = z.softmax(-1); log_p = z.log_softmax(-1)
        entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)                  # differentiable
        lse = z.logsumexp(-1)                                               # differentiable
        mean_logit = z.mean(-1)                                             # differentiable
        log_sum_sq_prob = (2 * log_p).logsumexp(-1)
        is_top1 = z.gather(-1, targets[..., None])[..., 0] >= z.amax(-1)
        top_k_mass = p.topk(min(top_k, V)).values.sum(-1)
        top_k_entropy = the terms of entropy of those top_k rows, summed

    No logits, probabilities or sorted copies [..., V] are allocated, and no matrix product is added, forward or backward, but one of
    2 N V D flop for top_k_mass and top_k_entropy on the Triton backend. Entropy is
    summed as log S0 + sum e^d (-d) / S0 with d = z - max z, S0 = sum e^d: nothing cancels where the distribution is sharp.

    stats: which of the seven; what is not asked for costs nothing and is None in the result. detached: those of `stats` that are wanted as
    numbers only: the same values from the same pass, without a gradient. top_k: 1 to 64; more than V means V.
    Everything else as in `linear_logprob`, to the bit for the log-probs; the statistics' own sums, about 32 bytes a scored
    token and 32 top_k where the largest are asked for, are not counted in max_workspace_mb.

    entropy, lse and mean_logit have gradients for hidden, weight and bias, in the same backward as the log-prob's (one recomputation
    of the logits for all of them). The others come detached. For what is detached nothing is saved, and the backward is that of a call
    without it: detached, entropy and mean_logit may stand beside `Routed`, and leave a frozen head its 2 units of matrix work on the CPU.
    A second derivative raises RuntimeError.

    Returns (logprob [...], VocabStats of [...]): fp32 (fp64 for fp64 inputs), is_top1 bool; 0 (False) where the target is ignored.
    Raises ValueError for unknown, missing or doubled names, a detached one that is not in `stats`, a top_k outside 1..64, entropy or
    mean_logit with a gradient beside `Routed`, and what `linear_logprob` raises for.
    """
    request = check_stats(stats, detached, top_k)
    head = LMHead(weight, bias, logit_scale, softcap)
    return _run(
        hidden, head, targets, request, temperature, ignore_index, max_scored, gradient, vocab_order,
        max_workspace_mb, backend, validate,
    )  # fmt: skip


def _run(
    hidden,
    head: LMHead,
    targets,
    request: StatsRequest,
    temperature,
    ignore_index,
    max_scored,
    gradient,
    vocab_order,
    max_workspace_mb,
    backend,
    validate,
) -> tuple[Tensor, VocabStats]:
    _check_tensors(hidden, head, targets, ignore_index)
    N, D = targets.numel(), hidden.shape[-1]
    if max_scored is not None and not (isinstance(max_scored, int) and 0 <= max_scored <= N):
        raise ValueError(f"max_scored: expected 0 to {N} (the number of targets), got {max_scored}")
    check_workspace(max_workspace_mb)
    constant, per_token = split_temperature(temperature, targets)
    hidden, weight = autocast(hidden, head.weight)
    grad = torch.is_grad_enabled()
    needs = [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, head.bias)]
    order, routed = _routing(gradient, vocab_order, head, request, any(needs))
    targets_N = targets.reshape(N)
    if validate:
        raise_bad_targets(targets_N, weight.shape[0], ignore_index)
    # With a constant slope dz / d(hidden @ weight') the gradient of hidden is linear in those of log-prob and lse.
    linear = head.softcap is None and routed is None and not _bent(request)
    logprob_N, stats_SN, _, _ = ops.linear_logprob_forward(
        hidden.reshape(N, D),
        weight,
        targets_N,
        head.bias,
        per_token,
        constant,
        float(head.logit_scale),
        None if head.softcap is None else float(head.softcap),
        ignore_index,
        N if max_scored is None else max_scored,
        None if max_workspace_mb is None else float(max_workspace_mb),
        needs[:2],
        ",".join(request.differentiable),
        request.top_k,
        backend,
        order if any(needs) else None,
        routed if any(needs) else None,
        linear and needs == [True, False, False],
        ",".join(request.detached),
    )
    return logprob_N.reshape(targets.shape), VocabStats.from_rows(stats_SN, request, targets.shape)


def _bent(request: StatsRequest) -> list[str]:
    """The statistics asked for whose gradient is not a[n] p[n, j] in all columns but the target's."""
    return [name for name in ("entropy", "mean_logit") if name in request.differentiable]


def _routing(
    gradient: Literal["exact"] | Routed,
    vocab_order: VocabOrder | None,
    head: LMHead,
    request: StatsRequest,
    wanted: bool,
) -> tuple[Tensor | None, list[float] | None]:
    check_gradient(gradient)
    if gradient == "exact":
        if vocab_order is not None:
            raise ValueError("vocab_order: expected None with gradient='exact', which has no blocks, got an order")
        return None, None
    if head.softcap is not None:
        raise ValueError(
            f"softcap: expected None with gradient=Routed(...), got {head.softcap}; its slope varies within a block"
        )
    unrouted = _bent(request)
    if unrouted and wanted:
        raise ValueError(
            f"stats: expected none of entropy, mean_logit with gradient=Routed(...), got {unrouted[0]!r}; it has no routed gradient, "
            f"detached=({unrouted[0]!r},) gives it without"
        )
    if vocab_order is None:
        return None, gradient.pack()
    if len(vocab_order.rows) != len(head.weight) or vocab_order.rows.device != head.weight.device:
        raise ValueError(
            f"vocab_order: expected {len(head.weight)} rows on {head.weight.device}, "
            f"got {len(vocab_order.rows)} on {vocab_order.rows.device}"
        )
    return vocab_order.rows, gradient.pack()


def _check_tensors(hidden: Tensor, head: LMHead, targets: Tensor, ignore_index: int) -> None:
    V, D = head.weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != D:
        raise ValueError(f"hidden: expected [..., {D}] to fit weight [{V}, {D}], got {list(hidden.shape)}")
    if D == 0 or V == 0:
        raise ValueError(f"weight: expected at least one row and one column, got [{V}, {D}]")
    check_targets(targets, hidden.shape[:-1], "hidden", ignore_index)
    for name, tensor in (("hidden", hidden), ("weight", head.weight), ("bias", head.bias)):
        check_floats(name, tensor, targets)
