"""The kernels of this package under the fused LM head of TRL's trainers and under its divergence of two heads: `patch_trl()`, and nothing
else changes.

N tokens, D hidden size (E that of a teacher), V vocabulary.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from isdaa_kernels import LMHead, Routed, VocabOrder, linear_kl, linear_logprob, linear_logprob_stats
from isdaa_kernels.integrations.patching import Patch, check_kernel, check_version

TESTED = ("1.16.0",)

# TRL's names of what its head may return beside the log-probs, in its order, and ours
STATS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_prob",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


def patch_trl(
    *,
    gradient: Literal["exact"] | Routed = "exact",
    vocab_order: VocabOrder | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    detach_entropy: bool = False,
    distillation: bool = True,
    any_version: bool = False,
) -> Patch:
    """From here on every model with TRL's fused LM head, trained already or not, computes its log-probs with `linear_logprob`, and
    DistillationTrainer its divergence with `linear_kl`, until the `undo()` of what is returned, or the end of a `with patch_trl(...):`.

    The head is that of DPOTrainer, KTOTrainer, SFTTrainer, GRPOTrainer, RLOOTrainer and of what else calls TRL's `add_fused_lm_head`.
    gradient, vocab_order, max_workspace_mb, backend: as in `linear_logprob`, for every call. detach_entropy: the entropy is a metric only,
    as it is to every trainer but GRPO with an `entropy_coef`; on the CPU a frozen head (LoRA) then takes 2 units of matrix work instead
    of 3. distillation: False leaves the divergence to TRL, as for a device that no backend of `linear_kl` is for, where it raises
    NoBackend. any_version: try it on a TRL that this was not tested with.

    The same as TRL's ChunkedLogProbFunction and ChunkedDivergenceFunction, but:

    - Logits stay in fp32. TRL rounds them to the dtype of the hidden states, so with 16-bit ones the two differ by TRL's rounding.
    - `is_top1` is true where no logit is above the target's; TRL wants that no row before the target's has the same logit either. The two
      differ in the metric `mean_token_accuracy`, where rows of the head are equal, and where TRL's rounding makes 16-bit logits equal.
    - On the CPU only the tokens that have a label are projected, as TRL itself does on a GPU; there it passes all, with label 0 for the
      others. Other devices are as TRL has them.
    - With `Routed` or `detach_entropy`, a loss that takes the entropy's gradient (GRPO's `entropy_coef`) raises NotImplementedError in its
      backward, and with `Routed` a divergence that trains at once. All that TRL reports of one head comes from the one forward.
    - The student's entropy, a metric of DistillationTrainer, is a forward of its head more. Its weight is not rounded to the dtype of the
      hidden states where the two differ.

    Raises ImportError for a version of TRL that was not tested, ValueError where TRL is patched already and for settings that
    `linear_logprob` refuses. At the first forward: NotImplementedError for a head partitioned by DeepSpeed ZeRO-3, of which TRL gathers
    only what it needs at the moment; DTensors (FSDP2) it gathers before.
    """
    check_version("trl", TESTED, any_version)
    import trl.kernels.chunked_logprob
    import trl.trainer.utils

    settings = {"gradient": gradient, "vocab_order": vocab_order}
    settings |= {"max_workspace_mb": max_workspace_mb, "backend": backend}
    check_kernel(**settings)
    head = make_function(detach_entropy, **settings)
    replacements = [
        (trl.kernels, "ChunkedLogProbFunction", head),
        (trl.kernels.chunked_logprob, "ChunkedLogProbFunction", head),
        (trl.trainer.utils, "_ChunkedLogProbFunction", head),
        (trl.trainer.utils, "_use_triton", _compact(trl.trainer.utils._use_triton)),
    ]
    if distillation:
        import trl.kernels.chunked_divergence
        import trl.trainer.distillation_trainer as trainer

        divergence = make_divergence(**settings)
        replacements += [
            (trl.kernels.chunked_divergence, "ChunkedDivergenceFunction", divergence),
            (trainer, "ChunkedDivergenceFunction", divergence),
            (trainer, "_use_triton", _compact(trainer._use_triton)),
        ]
    return Patch(*replacements)


def _compact(use_triton: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Whether TRL projects labelled positions only: where it says so, and on the CPU."""
    return lambda device: device.type == "cpu" or use_triton(device)


def make_function(detach_entropy: bool = False, **settings: object) -> type:
    """A class with the `apply` of TRL's ChunkedLogProbFunction; `settings` go to `linear_logprob`."""
    metrics_only = detach_entropy or settings["gradient"] != "exact"

    class LinearLogProb:
        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,  # of TRL's tiles; ours have their own
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = tuple(STATS),
        ) -> tuple[Tensor | None, ...]:
            _check_partitioned(weight, bias)
            numbers = {"temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
            return _token_outputs(hidden, weight, targets, outputs, metrics_only, bias=bias, **numbers, **settings)

    return LinearLogProb


def make_divergence(gradient: Literal["exact"] | Routed = "exact", **settings: object) -> type:
    """A class with the `apply` of TRL's ChunkedDivergenceFunction; `settings` (vocab_order, max_workspace_mb, backend) go to `linear_kl`
    and, for the entropy, to `linear_logprob_stats`."""

    class LinearDivergence:
        @staticmethod
        def apply(
            student_hidden: Tensor,
            student_weight: Tensor,
            student_bias: Tensor | None,
            teacher_hidden: Tensor,
            teacher_weight: Tensor,
            teacher_bias: Tensor | None,
            beta: float,
            temperature: float = 1.0,
            student_logit_scale: float = 1.0,
            student_final_logit_softcapping: float | None = None,
            teacher_logit_scale: float = 1.0,
            teacher_final_logit_softcapping: float | None = None,
        ) -> tuple[Tensor, Tensor]:
            _check_partitioned(student_weight, student_bias, teacher_weight, teacher_bias)
            if gradient != "exact" and _need_gradient(student_hidden, student_weight, student_bias):
                raise NotImplementedError(
                    "gradient: a divergence has no routed one; expected patch_trl(gradient='exact') for DistillationTrainer"
                )
            student = LMHead(student_weight, student_bias, student_logit_scale, student_final_logit_softcapping)
            teacher = LMHead(teacher_weight, teacher_bias, teacher_logit_scale, teacher_final_logit_softcapping)
            entropy = _entropy(student_hidden, student, temperature, gradient=gradient, **settings)
            direction = {0: "forward", 1: "reverse"}.get(beta, "jsd")
            divergence = linear_kl(
                student_hidden,
                student,
                teacher_hidden,
                teacher,
                direction=direction,
                jsd_weight=beta if direction == "jsd" else None,
                temperature=temperature,
                max_workspace_mb=settings["max_workspace_mb"],
                backend=settings["backend"],
            )
            return divergence.float(), entropy.float()

    return LinearDivergence


@torch.no_grad()
def _entropy(hidden: Tensor, head: LMHead, temperature: float, **settings: object) -> Tensor:
    """Of each token's distribution, [N]; the log-probs that come with it, of row 0, are nobody's."""
    targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    numbers = {"logit_scale": head.logit_scale, "softcap": head.softcap, "temperature": temperature}
    _, stats = linear_logprob_stats(
        hidden, head.weight, targets, stats=("entropy",), detached=("entropy",), bias=head.bias, **numbers, **settings
    )
    return stats.entropy


def _token_outputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, outputs: tuple[str, ...], metrics_only: bool, **options: object
) -> tuple[Tensor | None, ...]:
    """(log-prob, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N], None where not in `outputs`. As with TRL the entropy has a
    gradient, the last three have none; `metrics_only`: the entropy's raises."""
    unknown = sorted(set(outputs) - {"log_probs", *STATS})
    if unknown:
        raise ValueError(f"outputs: expected some of log_probs, {', '.join(STATS)}, got {unknown[0]!r}")
    names = [ours for theirs, ours in STATS.items() if theirs in outputs]
    if not names:
        return linear_logprob(hidden, weight, targets, **options).float(), *[None] * len(STATS)
    detached = [name for name in names if name != "entropy" or metrics_only]
    logprob, stats = linear_logprob_stats(hidden, weight, targets, stats=names, detached=detached, **options)
    found = {name: getattr(stats, name) for name in STATS.values()}
    if metrics_only and found["entropy"] is not None and logprob.requires_grad:
        found["entropy"] = _NoGradient.apply(found["entropy"], logprob)
    return logprob.float(), *map(_as_float, found.values())


class _NoGradient(torch.autograd.Function):
    """A constant that says so when a loss asks for its gradient, where leaving it out would change the loss in silence."""

    @staticmethod
    def forward(ctx, entropy: Tensor, logprob: Tensor) -> Tensor:
        return entropy.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise NotImplementedError(
            "entropy: has no gradient here; expected patch_trl(gradient='exact', detach_entropy=False) for a loss with an entropy term"
        )


def _as_float(value: Tensor | None) -> Tensor | None:
    return value if value is None or value.dtype == torch.bool else value.float()


def _check_partitioned(*parameters: Tensor | None) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise NotImplementedError(
            "weight: DeepSpeed ZeRO-3 partitions it, and the backward would find it gone; expected ZeRO-2, FSDP, or TRL without patch_trl"
        )


def _need_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
