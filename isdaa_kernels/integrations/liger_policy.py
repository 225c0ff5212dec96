"""A drop-in for Liger's fused linear GRPO loss (liger-kernel 0.8.2): same constructor, call, outputs and values.

B completions of T tokens, D hidden size, V vocabulary; rho = policy / old of a token, A the advantage of its completion.
"""

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isdaa_kernels import Objective, Routed, SamplerCorrection, VocabOrder, linear_logprob, policy_loss

# loss_type -> how the losses of tokens become one number
CLIPPED = {
    "grpo": "sequence_mean",
    "bnpo": "batch_token_mean",
    "dr_grpo": "max_length",
    "dapo": "token_mean",
    "luspo": "sequence_sum",
}
REDUCTIONS = {**CLIPPED, "cispo": "token_mean", "sapo": "sequence_mean", "vespo": "token_mean"}
LEVELS = ("token", "sequence")
LEAST_RATE = 1e-4  # of VESPO, in Liger
MAX_EXPONENT = 80.0  # of the divergence in the metrics, as in the loss


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO and its relatives.

    forward(_input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps, old_per_token_logps, ref_input,
    ref_weight, ref_bias, vllm_is_ratio, num_items_in_batch) -> (loss, metrics)

    The loss of a token is that of the objective of `policy_loss` with Liger's name (cispo, sapo, vespo), or -min(min(rho, delta) A,
    clip(rho) A) with the ratio of the token ("token") or the geometric mean over its completion ("sequence"); times vllm_is_ratio; plus
    beta times the k3 estimate of the divergence from the reference, times the ratio with use_bias_correction_kl. Means: over the tokens
    of a completion, then over completions (grpo, sapo); over tokens (bnpo); over B max_completion_length (dr_grpo); over
    num_items_in_batch by the number of processes, or the mean number of tokens of a process (dapo, cispo, vespo); the sum over a
    completion, then the mean over completions (luspo). metrics: the mean of the divergence (where beta is not 0), and the share of
    tokens whose ratio is clipped; fp32 and detached.

    _input [B, T, D], selected_token_ids [B, T], attention_mask [B, T] of 0 and 1, advantages [B], ref_per_token_logps and
    old_per_token_logps [B, T] or None, vllm_is_ratio [B], [B, 1] or [B, T]. With use_ref_model one of ref_per_token_logps and ref_input;
    without, the policy is its own reference: the divergence is 0. Where attention_mask is 0 nothing is read, no matrix work is done,
    and the gradient is 0.

    Raises ValueError for what Liger would ignore (delta with cispo, sapo or vespo, use_bias_correction_kl without a divergence, a
    reference without use_ref_model), for a negative beta, for a ref_weight of another vocabulary, and for what makes Liger's luspo a mean
    over padding too: importance_sampling_level="token", a beta, a vllm_is_ratio a token. A mask that holds other numbers than 0 and 1
    raises on the CPU; elsewhere it makes the loss NaN.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        gradient: Literal["exact"] | Routed = "exact",
        vocab_order: VocabOrder | None = None,
        max_workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length, self.importance_sampling_level = max_completion_length, importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self.kernel = {"gradient": gradient, "vocab_order": vocab_order}
        self.kernel |= {"max_workspace_mb": max_workspace_mb, "backend": backend}
        self._check_settings()

    def forward(
        self,
        _input,
        lin_weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        _check_shapes(_input, selected_token_ids, attention_mask, advantages)
        B, T = selected_token_ids.shape
        for name, value in (("ref_per_token_logps", ref_per_token_logps), ("old_per_token_logps", old_per_token_logps)):
            _check_shape(name, value, [(B, T)])
        _check_shape("vllm_is_ratio", vllm_is_ratio, [(B,), (B, 1), (B, T)])
        self._check_reference(ref_per_token_logps, ref_input, ref_weight, lin_weight)
        self._check_luspo(vllm_is_ratio)
        scored_BT, bad = _scored(attention_mask)
        targets_BT = torch.where(scored_BT, selected_token_ids, -100)
        policy_BT = self._logprob(_input, lin_weight, bias, targets_BT)
        reference_BT = ref_per_token_logps if self._has_kl else None
        if self._has_kl and reference_BT is None:
            with torch.no_grad():
                reference_BT = self._logprob(ref_input, ref_weight, ref_bias, targets_BT)
        old_BT = policy_BT.detach() if old_per_token_logps is None else old_per_token_logps
        loss, _ = policy_loss(
            policy_BT.reshape(-1),
            torch.arange(0, B * T + 1, T, device=_input.device),
            mask=scored_BT.reshape(-1),
            advantages=advantages[:, None].expand(B, T).reshape(1, -1),
            old_logprob=old_BT.reshape(-1),
            reference_logprob=None if reference_BT is None else reference_BT.reshape(-1),
            denominator=_tokens_of_the_step(scored_BT, num_items_in_batch) if self._over_the_step else None,
            max_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
            reduction=REDUCTIONS[self.loss_type],
            kl_weight=self.beta if self._has_kl else 0.0,
            kl_corrected=self.use_bias_correction_kl,
            **self._correction(vllm_is_ratio, old_BT, scored_BT),
            **self._objective(),
        )
        metrics = self._metrics(policy_BT, old_BT, reference_BT, advantages, scored_BT)
        return loss if bad is None else loss + torch.where(bad, torch.nan, 0.0), metrics

    @property
    def _has_kl(self) -> bool:
        return self.beta != 0 and self.use_ref_model

    @property
    def _over_the_step(self) -> bool:
        return REDUCTIONS[self.loss_type] == "token_mean"

    def _logprob(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets_BT: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, targets_BT, bias=bias, temperature=self.temperature, **self.kernel)

    def _objective(self) -> dict[str, object]:
        if self.loss_type in CLIPPED:
            name: str | Objective = "grpo" if self.importance_sampling_level == "token" else "gspo"
            # a ratio is never below 0: beyond 1 is as far
            clip = {"clip_low": min(self.epsilon_low, 1.0), "clip_high": self.epsilon_high, "ratio_cap": self.delta}
            return {"objective": name, **clip}
        if self.loss_type == "cispo":
            return {"objective": "cispo", "ratio_cap": self.epsilon_high}
        if self.loss_type == "sapo":
            temperatures = (self.sapo_temperature_pos, self.sapo_temperature_neg)
            return {
                "objective": "sapo", "positive_temperature": temperatures[0], "negative_temperature": temperatures[1],
            }  # fmt: skip
        return {
            "objective": "vespo",
            "positive_power": self.vespo_k_pos,
            "positive_rate": max(self.vespo_lambda_pos, LEAST_RATE),
            "negative_power": self.vespo_k_neg,
            "negative_rate": max(self.vespo_lambda_neg, LEAST_RATE),
        }

    def _correction(self, ratio: Tensor | None, old_BT: Tensor, scored_BT: Tensor) -> dict[str, object]:
        """A factor on the loss of each token; for vespo a sampler, whose ratio to `old` over a completion is the product of the row."""
        if ratio is None:
            return {}
        ratio = ratio.detach().reshape(len(ratio), -1)
        if self.loss_type != "vespo":
            return {"token_weight": ratio.expand_as(old_BT).reshape(-1)}
        log_ratio_BT = ratio.double().log().expand_as(old_BT)
        if ratio.shape[1] == 1:  # the ratio of a completion: once, at its first scored token
            first_BT = scored_BT & (scored_BT.cumsum(1) == 1)
            log_ratio_BT = torch.where(first_BT, log_ratio_BT, 0)
        sampler_BT = old_BT.detach().double() - log_ratio_BT
        return {
            "sampler_logprob": sampler_BT.reshape(-1),
            "correction": SamplerCorrection(level="token", mode="truncate", largest=None),
        }

    @torch.no_grad()
    def _metrics(
        self, policy_BT: Tensor, old_BT: Tensor, reference_BT: Tensor | None, advantages: Tensor, scored_BT: Tensor
    ) -> tuple[Tensor, ...]:
        policy_BT, count = policy_BT.double(), scored_BT.sum().clamp(min=1)
        log_ratio_BT = torch.where(scored_BT, policy_BT - old_BT, 0)
        if self.importance_sampling_level == "sequence":
            mean_B1 = log_ratio_BT.sum(1, keepdim=True) / scored_BT.sum(1, keepdim=True).clamp(min=1)
            log_ratio_BT = mean_B1.expand_as(log_ratio_BT)
        ratio_BT, sign_B1 = log_ratio_BT.exp(), advantages[:, None]
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        if self.loss_type == "cispo":
            low, high = -torch.inf, self.epsilon_high
        elif self.loss_type not in CLIPPED:
            low, high = -torch.inf, torch.inf
        clipped_BT = ((ratio_BT < low) & (sign_B1 < 0)) | ((ratio_BT > high) & (sign_B1 > 0))
        clip_share = (clipped_BT & scored_BT).sum() / count
        if self.beta == 0:
            return (clip_share.float(),)
        if reference_BT is None:
            return torch.zeros_like(clip_share, dtype=torch.float32), clip_share.float()
        gap_BT = (reference_BT - policy_BT).clamp(max=MAX_EXPONENT)
        kl_BT = torch.where(scored_BT, gap_BT.expm1() - gap_BT, 0)
        if self.use_bias_correction_kl:  # the product is held as in the loss
            kl_BT = kl_BT * torch.minimum(log_ratio_BT, MAX_EXPONENT - kl_BT.clamp(min=1).log()).exp()
        return (kl_BT.sum() / count).float(), clip_share.float()

    def _check_settings(self) -> None:
        _check(self.loss_type in REDUCTIONS, "loss_type", f"one of {', '.join(REDUCTIONS)}", self.loss_type)
        level, clipped = self.importance_sampling_level, self.loss_type in CLIPPED
        _check(level in LEVELS, "importance_sampling_level", f"one of {', '.join(LEVELS)}", level)
        allowed = "token" if not clipped else "sequence" if self.loss_type == "luspo" else level
        _check(level == allowed, "importance_sampling_level", f"{allowed!r} with loss_type={self.loss_type!r}", level)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
            value = getattr(self, name)
            _check(0 < value < math.inf, name, "a number above 0", value)
        for name in (
            "beta",
            "epsilon_low",
            "epsilon_high",
            "vespo_k_pos",
            "vespo_lambda_pos",
            "vespo_k_neg",
            "vespo_lambda_neg",
        ):
            value = getattr(self, name)
            _check(0 <= value < math.inf, name, "a number of at least 0", value)
        _check(
            self.loss_type != "cispo" or self.epsilon_high > 0,
            "epsilon_high",
            "a number above 0 for loss_type='cispo'",
            0,
        )
        _check(self.delta is None or (clipped and self.delta > 0), "delta", self._expected_delta(clipped), self.delta)
        has_kl = self._has_kl or not self.use_bias_correction_kl
        _check(has_kl, "use_bias_correction_kl", "False without a reference and a beta", True)
        length = self.max_completion_length
        length_known = self.loss_type != "dr_grpo" or (isinstance(length, int) and length > 0)
        _check(length_known, "max_completion_length", "a whole number above 0 for loss_type='dr_grpo'", length)

    def _expected_delta(self, clipped: bool) -> str:
        return "a number above 0, or None" if clipped else f"None, as loss_type={self.loss_type!r} would ignore it"

    def _check_reference(
        self, logprob: Tensor | None, hidden: Tensor | None, weight: Tensor | None, policy_weight: Tensor
    ) -> None:
        names = "ref_per_token_logps, ref_input"
        given = [value is not None for value in (logprob, hidden)]
        if not self.use_ref_model:
            _check(not any(given), names, "None with use_ref_model=False", "one")
            return
        _check(sum(given) == 1, names, "one of the two with use_ref_model=True", "both" if all(given) else None)
        if hidden is None:
            return
        _check(weight is not None, "ref_weight", "the head of ref_input", None)
        rows = f"{len(policy_weight)} rows, the vocabulary of lin_weight"
        _check(len(weight) == len(policy_weight), "ref_weight", rows, len(weight))

    def _check_luspo(self, ratio: Tensor | None) -> None:
        if self.loss_type == "luspo":
            padding = "with loss_type='luspo', whose mean would be over padding too"
            _check(self.beta == 0, "beta", f"0 {padding}", self.beta)
            shape = [] if ratio is None else list(ratio.shape)
            _check(len(shape) < 2 or shape[1] == 1, "vllm_is_ratio", f"[B] or [B, 1] {padding}", shape)


def _scored(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """(bool [B, T], whether the mask holds other numbers than 0 and 1: raised at once on the CPU, a word on a device)."""
    if mask.dtype == torch.bool:
        return mask, None
    bad = ((mask != 0) & (mask != 1)).any()
    if mask.device.type == "cpu":
        _check(not bad, "attention_mask", "0 and 1", "other numbers")
        return mask != 0, None
    return mask != 0, bad


def _tokens_of_the_step(scored_BT: Tensor, given: float | Tensor | None) -> float | Tensor:
    """What the mean over the tokens of a step divides by on this process: their number by that of processes, at least 1."""
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if given is None:
        given = scored_BT.sum()
        if processes > 1:
            dist.all_reduce(given)
    if isinstance(given, Tensor):
        return (given.to(scored_BT.device) / processes).clamp(min=1)
    return max(given / processes, 1.0)


def _check_shapes(hidden: Tensor, token_ids: Tensor, mask: Tensor, advantages: Tensor) -> None:
    if hidden.ndim != 3 or token_ids.shape != hidden.shape[:2]:
        raise ValueError(
            "_input, selected_token_ids: expected [B, T, D] and [B, T], "
            f"got {list(hidden.shape)} and {list(token_ids.shape)}"
        )
    _check_shape("attention_mask", mask, [tuple(token_ids.shape)])
    _check_shape("advantages", advantages, [(len(token_ids),)])


def _check_shape(name: str, value: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    if value is not None and tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected {expected}, got {list(value.shape)}")


def _check(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
