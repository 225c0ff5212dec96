"""Drop-ins for Liger's fused linear losses of a student and a teacher (liger-kernel 0.8.2): same constructors, calls, outputs and values.

N tokens, D hidden size (E that of the teacher), V vocabulary.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from isdaa_kernels import KlLogprobs, LMHead, linear_kl, linear_logprob


class LigerFusedLinearJSDLoss(nn.Module):
    """Distillation by the generalised Jensen-Shannon divergence, beside the cross entropy of labels.

    forward(student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias)
    -> loss, or (loss, soft, hard) with return_soft_hard_loss, of which the last two have no gradient

    loss = weight_hard_loss * hard + weight_soft_loss * soft, both means over the tokens whose label is not `ignore_index`: the cross
    entropy of the labels at temperature 1, and `linear_kl` at `temperature`: "forward" (teacher || student) at beta = 0, "reverse" at 1,
    "jsd" with the weight beta of the teacher between. A term with the weight 0 is not computed, unless it is returned. At temperature 1
    both terms come from one pass over both heads.

    student_input [N, D], teacher_input [N, E], true_labels [N] (or more leading dimensions). A teacher with more vocabulary rows than the
    student meets a student whose logits are 0 there, as in Liger; that copies the student's weight. The teacher gets no gradient. The
    backends are those of `linear_kl`. Raises ValueError for a beta outside [0, 1] and a teacher with fewer rows than the student.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature = ignore_index, temperature
        self.compiled, self.chunk_size, self.return_soft_hard_loss = compiled, chunk_size, return_soft_hard_loss
        self.kernel = {"max_workspace_mb": max_workspace_mb, "backend": backend}
        _check_settings("beta", beta, temperature)

    def forward(
        self,
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        true_labels,
        student_bias=None,
        teacher_bias=None,
    ):
        _check_labels("true_labels", true_labels, student_input)
        _check_heads(student_input, student_weight, teacher_input, teacher_weight, more_rows=True)
        student, teacher = LMHead(student_weight, student_bias), LMHead(teacher_weight, teacher_bias)
        options = {"ignore_index": self.ignore_index, **self.kernel}
        settings = (teacher_input, teacher, true_labels, self.beta, self.temperature, options)
        mean = partial(_mean, labels=true_labels, ignore_index=self.ignore_index)
        wants_hard, wants_soft = (
            weight != 0 or self.return_soft_hard_loss for weight in (self.weight_hard_loss, self.weight_soft_loss)
        )
        hard = soft = torch.zeros((), device=student_input.device)
        if wants_hard and wants_soft and self.temperature == 1 and len(teacher.weight) == len(student.weight):
            divergence, logprob, _ = _divergence(student_input, student, *settings, logprobs=True)
            hard, soft = -mean(logprob), mean(divergence)
        else:
            if wants_hard:
                logprob = linear_logprob(student_input, student.weight, true_labels, bias=student.bias, **options)
                hard = -mean(logprob)
            if wants_soft:
                soft = mean(_divergence(student_input, _with_rows_of(teacher, student), *settings))
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


class LigerFusedLinearJSD(nn.Module):
    """The generalised Jensen-Shannon divergence alone: what Liger has in Triton.

    forward(student_input, student_weight, teacher_input, teacher_weight, shift_labels) -> loss

    The soft term of `LigerFusedLinearJSDLoss`, the mean over the tokens whose label is not `ignore_index` (0 where there is none, for which
    Liger has no number); all tokens without shift_labels. Raises ValueError for an accum_dtype other than None and torch.float32, in which
    sums are always made, for a jsd_beta outside [0, 1], and for heads with different vocabularies.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        *,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta, self.ignore_index = jsd_beta, ignore_index
        self.temperature, self.accum_dtype = temperature, accum_dtype
        self.kernel = {"max_workspace_mb": max_workspace_mb, "backend": backend}
        _check_settings("jsd_beta", jsd_beta, temperature)
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"accum_dtype: expected None or torch.float32, got {accum_dtype}")

    def forward(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels):
        if shift_labels is not None:
            _check_labels("shift_labels", shift_labels, student_input)
        _check_heads(student_input, student_weight, teacher_input, teacher_weight, more_rows=False)
        options = {"ignore_index": self.ignore_index, **self.kernel}
        student, teacher = LMHead(student_weight), LMHead(teacher_weight)
        token = _divergence(
            student_input, student, teacher_input, teacher, shift_labels, self.jsd_beta, self.temperature, options
        )
        return _mean(token, shift_labels, self.ignore_index)


def _divergence(
    student_input: Tensor,
    student: LMHead,
    teacher_input: Tensor,
    teacher: LMHead,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    options: dict[str, object],
    logprobs: bool = False,
) -> Tensor | KlLogprobs:
    """The divergence of each token, 0 where it is ignored."""
    direction = {0: "forward", 1: "reverse"}.get(beta, "jsd")
    return linear_kl(
        student_input,
        student,
        teacher_input,
        teacher,
        direction=direction,
        jsd_weight=float(beta) if direction == "jsd" else None,
        targets=labels,
        temperature=float(temperature),
        logprobs=logprobs,
        **options,
    )


def _mean(token: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    count = max(token.numel(), 1) if labels is None else (labels != ignore_index).sum().clamp(min=1)
    return (token.sum(dtype=torch.float64) / count).float()


def _with_rows_of(teacher: LMHead, student: LMHead) -> LMHead:
    """The student's head with rows of zeros where only the teacher has any."""
    more = len(teacher.weight) - len(student.weight)
    if more <= 0:
        return student
    weight, bias = student.weight, student.bias
    return LMHead(
        torch.cat((weight, weight.new_zeros(more, weight.shape[1]))),
        None if bias is None else torch.cat((bias, bias.new_zeros(more))),
    )


def _check_settings(name: str, beta: float, temperature: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")


def _check_labels(name: str, labels: Tensor, hidden: Tensor) -> None:
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: expected {list(hidden.shape[:-1])} as student_input, got {list(labels.shape)}")


def _check_heads(
    student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, more_rows: bool
) -> None:
    """The teacher's tokens are the student's; each head fits its hidden states; `more_rows`: the teacher may have more rows."""
    for name, hidden, weight in (
        ("student", student_input, student_weight),
        ("teacher", teacher_input, teacher_weight),
    ):
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{name}_weight: expected [V, {hidden.shape[-1]}] to fit {name}_input, got {list(weight.shape)}"
            )
    if teacher_input.shape[:-1] != student_input.shape[:-1]:
        tokens = [list(hidden.shape[:-1]) for hidden in (student_input, teacher_input)]
        raise ValueError(f"teacher_input: expected {tokens[0]} tokens as student_input, got {tokens[1]}")
    rows, teacher_rows = len(student_weight), len(teacher_weight)
    if teacher_rows < rows or (teacher_rows > rows and not more_rows):
        expected = f"{rows} rows, the student's vocabulary" + (", or more" if more_rows else "")
        raise ValueError(f"teacher_weight: expected {expected}, got {teacher_rows}")
