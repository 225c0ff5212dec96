"""The calls into the C++ row kernels of `linear_kl`, and what the forward knows of each token so far.

T tokens of a tile, C columns (vocabulary rows) of a tile.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu.extension import address, kernel
from isdaa_kernels.backends.cpu.tiles import RowKernels
from isdaa_kernels.divergence import DIRECTIONS, Divergence, KlGradient

_FOLDED = ("policy_max", "policy_sum", "reference_max", "reference_sum", "center", "gap_sum", "excess_sum")
_NORMALIZED = ("policy_lse", "reference_lse", "lse_gap")
_MIXED = ("policy_divergence", "reference_divergence", "policy_mean")
_AT_TARGET = ("policy_target", "reference_target")
_POINTERS = (*_FOLDED, *_AT_TARGET, *_NORMALIZED, *_MIXED, "mean", "coefficient", "logprob", "target")
_NOTHING = dict.fromkeys(_POINTERS, 0)
# Where the divergence is larger, or the center far from the difference of the log-sum-exps, the plain formula cancels nothing.
_SMALL_DIVERGENCE, _NEAR_CENTER = 0.25, 4.0


class KlKernels:
    """The row kernels with the arguments that stay the same over a call. Tensors are [T, C], contiguous, and one number a token [N]."""

    def __init__(self, policy: RowKernels, reference: RowKernels, divergence: Divergence):
        self.policy, self.reference, self.logprobs = policy, reference, divergence.logprobs
        self.same = {
            "inverse_temperature": 0,
            "direction": DIRECTIONS.index(divergence.direction),
            "jsd_weight": divergence.jsd_weight,
        }

    def fold(self, policy_TC: Tensor, reference_TC: Tensor, token: int, column: int, state: "KlState") -> None:
        """The products become the final logits and join the state of their tokens."""
        numbers = {name: getattr(state, name) for name in (*_FOLDED, *(_AT_TARGET if self.logprobs else ()))}
        self._call("fold", policy_TC, reference_TC, token, column, numbers, self._heads(token, column))

    def mixture(self, policy_TC: Tensor, reference_TC: Tensor, token: int, column: int, state: "KlState") -> None:
        """The products join both divergences from the mixture."""
        numbers = self._mixture_numbers(state)
        self._call("mixture", policy_TC, reference_TC, token, column, numbers, self._heads(token, column))

    def mixture_of_logits(self, policy_TC: Tensor, reference_TC: Tensor, token: int, state: "KlState") -> None:
        """The same of final logits."""
        self._call("mixture", policy_TC, reference_TC, token, 0, self._mixture_numbers(state), _IDENTITY)

    def gradient(
        self,
        policy_TC: Tensor,
        reference_TC: Tensor,
        token: int,
        column: int,
        numbers_4N: Tensor,
        grad: KlGradient,
    ) -> None:
        """The policy's product becomes its gradient."""
        names = (*_NORMALIZED, "mean")
        numbers = dict(zip(names, numbers_4N, strict=True)) | {"coefficient": grad.divergence_N}
        numbers |= {} if grad.logprob_N is None else {"logprob": grad.logprob_N}
        self._call("gradient", policy_TC, reference_TC, token, column, numbers, self._heads(token, column))

    def _mixture_numbers(self, state: "KlState") -> dict:
        return {name: getattr(state, name) for name in (*_NORMALIZED, *_MIXED)}

    def _heads(self, token: int, column: int) -> dict:
        policy, reference = self.policy, self.reference
        inverse = policy.inverse_N
        return {
            "policy_bias": _bias(policy, column),
            "reference_bias": _bias(reference, column),
            "inverse_temperature": 0 if inverse is None else inverse.data_ptr() + token * policy.size,
            "constant_inverse_temperature": policy.head["constant_inverse_temperature"],
            "policy_scale": policy.head["logit_scale"],
            "policy_softcap": policy.head["softcap"],
            "reference_scale": reference.head["logit_scale"],
            "reference_softcap": reference.head["softcap"],
        }

    def _call(
        self,
        name: str,
        policy_TC: Tensor,
        reference_TC: Tensor,
        token: int,
        column: int,
        numbers: dict[str, Tensor],
        heads: dict,
    ) -> None:
        addresses = {key: address(x, token) for key, x in numbers.items()}
        target_T = self.policy.targets_N[token : token + len(policy_TC)] - column if self.logprobs else None
        kernel(f"kl_{name}_tile", self.policy.dtype)(
            policy=policy_TC.data_ptr(),
            policy_stride=policy_TC.stride(0),
            reference=reference_TC.data_ptr(),
            reference_stride=reference_TC.stride(0),
            rows=policy_TC.shape[0],
            columns=policy_TC.shape[1],
            threads=self.policy.threads,
            **{**_NOTHING, **self.same, **addresses, "target": address(target_T), **heads},
        )


_IDENTITY = {
    "policy_bias": 0,
    "reference_bias": 0,
    "constant_inverse_temperature": 1.0,
    "policy_scale": 1.0,
    "policy_softcap": 0.0,
    "reference_scale": 1.0,
    "reference_softcap": 0.0,
}


def _bias(kernels: RowKernels, column: int) -> int:
    return 0 if kernels.bias_V is None else kernels.bias_V.data_ptr() + column * kernels.size


class KlState:
    """Of each token: both online log-sum-exps and the sums of the divergence; csrc/cpu/linear_kl_params.h says what they are."""

    def __init__(self, N: int, dtype: torch.dtype, divergence: Divergence):
        self.divergence = divergence
        self.policy_max, self.reference_max = (torch.full((N,), float("-inf"), dtype=dtype) for _ in range(2))
        for name in set(_FOLDED) - {"policy_max", "reference_max"}:
            setattr(self, name, torch.zeros(N, dtype=torch.float64))
        if divergence.logprobs:
            self.policy_target, self.reference_target = torch.zeros(2, N, dtype=dtype)

    def logprobs(self, numbers_4N: Tensor) -> Tensor:
        """[2, N] of policy and reference, or [0, N]."""
        if not self.divergence.logprobs:
            return numbers_4N[:0]
        return torch.stack([self.policy_target, self.reference_target]) - numbers_4N[:2]

    def normalize(self, token: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """(policy_lse, reference_lse, their difference), of jsd also kept for `mixture`."""
        tops = [top[token].double() for top in (self.policy_max, self.reference_max)]
        log_sums = [total[token].log() for total in (self.policy_sum, self.reference_sum)]
        gap = (tops[0] - tops[1]) + (log_sums[0] - log_sums[1])
        return tops[0] + log_sums[0], tops[1] + log_sums[1], gap

    def start_mixture(self) -> None:
        for name in (*_NORMALIZED, *_MIXED):
            setattr(self, name, torch.zeros_like(self.policy_sum))

    def normalize_for_mixture(self, token: slice) -> None:
        for name, number in zip(_NORMALIZED, self.normalize(token), strict=True):
            getattr(self, name)[token] = number

    def finish_mixture(self) -> tuple[Tensor, Tensor]:
        """(divergence, numbers [4, N])."""
        jsd_weight = self.divergence.jsd_weight
        value = (1 - jsd_weight) * self.policy_divergence + jsd_weight * self.reference_divergence
        return value, torch.stack([self.policy_lse, self.reference_lse, self.lse_gap, self.policy_mean])

    def finish(self) -> tuple[Tensor, Tensor]:
        """(divergence, numbers [4, N]). With E the mean under the base and x = d - center, KL = log E[exp(x)] - E[x], where E[exp(x)] - 1
        is E[excess(x)] + E[x]: a small divergence is made of small numbers."""
        policy_lse, reference_lse, gap = self.normalize()
        forward = self.divergence.direction == "forward"
        sign, base_sum = (1, self.reference_sum) if forward else (-1, self.policy_sum)
        mean = self.gap_sum / base_sum
        far = sign * gap - self.center  # log E[exp(x)]
        near = (self.excess_sum / base_sum + mean).log1p()
        small = (far - mean < _SMALL_DIVERGENCE) & (far.abs() < _NEAR_CENTER) & near.isfinite()
        log_mean = torch.where(small, near, far)
        value = log_mean - mean
        value = torch.where(value < 0, 0, value)
        gap = torch.where(small, sign * (self.center + near), gap)
        return value, torch.stack([policy_lse, reference_lse, gap, value])
