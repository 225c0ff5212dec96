"""The kernels of `linear_kl`: csrc/cuda/linear_kl.h on tensors.

T tokens of a slab, C vocabulary rows of a chunk, V vocabulary, N tokens of the call, S slots of partial results. Logits are fp32 chunks
[T, C] of neighbouring numbers, products for the vocabulary rows from `begin` on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.backends.cuda.extension import dtype_of, launch
from isdaa_kernels.backends.cuda.launch import CudaKernels
from isdaa_kernels.backends.gpu.slabs import Head, LiveTokens
from isdaa_kernels.divergence import DIRECTIONS, Divergence
from isdaa_kernels.workspace import ceil_div

SLOT_COLUMNS, BIAS_ROWS = 2048, 16  # as in csrc/cuda/linear_kl.h
SLOT_BYTES = 44  # of partial results: a token and slot
_SUMS = ("center", "gap_sum", "excess_sum", "linear_sum", "apart_sum")
_NO_SUMS = dict.fromkeys(_SUMS)


@dataclass(frozen=True)
class Heads:
    policy: Head
    reference: Head

    def arguments(self, policy: str = "policy", reference: str = "reference") -> dict:
        """By the names that a kernel has for the two."""
        found = {}
        for name, head in ((policy, self.policy), (reference, self.reference)):
            numbers = {
                "bias": head.bias_V,
                "bias_dtype": dtype_of(head.bias_V),
                "scale": head.scalars["logit_scale"],
                "softcap": head.scalars["softcap"] or 0.0,
            }
            found |= {f"{name}_{key}": value for key, value in numbers.items()}
        return found


class KlKernels(CudaKernels):
    """The set that leaves products to the library, and what `linear_kl` adds. Launches of a call share its heads and direction."""

    def __init__(self, heads: Heads, divergence: Divergence):
        super().__init__(fused=False)
        self.heads, self.divergence = heads, divergence
        self.policy_is_base = divergence.direction != "forward"

    def fold(self, policy_TC: Tensor, reference_TC: Tensor, begin: int, token: dict, partials: dict) -> None:
        """Both heads' partial log-sum-exps of the live tokens and, where `partials` has them, the sums of the divergence."""
        names = ("base", "other") if self.policy_is_base else ("other", "base")
        logits = dict(zip(names, (policy_TC, reference_TC), strict=True))
        launch(
            "linear_kl_fold", policy_TC.device, **logits, **self.heads.arguments(*names), stride_base=logits["base"].stride(0),
            stride_other=logits["other"].stride(0), T=len(policy_TC), begin=begin, end=begin + policy_TC.shape[1], **token, **partials,
        )  # fmt: skip

    def combine_slots(
        self, live: LiveTokens, first: int, partials: dict, divergence_N: Tensor, numbers_4N: Tensor
    ) -> None:
        """All of numbers_4N and divergence_N of the slab's live tokens; of jsd the log-sum-exps and their difference."""
        S, T = partials["base_max"].shape
        launch(
            "linear_kl_combine", numbers_4N.device, rows=live.rows_M, count=live.count, divergence=divergence_N, numbers=numbers_4N,
            first=first, T=T, S=S, N=numbers_4N.shape[1], policy_is_base=self.policy_is_base, **partials,
        )  # fmt: skip

    def mixture(
        self,
        policy_TC: Tensor,
        reference_TC: Tensor,
        begin: int,
        live: LiveTokens,
        token: dict,
        numbers_4N: Tensor,
        parts: dict,
    ) -> None:
        """Each slot's share of both divergences from the mixture."""
        launch(
            "linear_kl_mixture", policy_TC.device, policy=policy_TC, reference=reference_TC, stride_policy=policy_TC.stride(0),
            stride_reference=reference_TC.stride(0), T=len(policy_TC), begin=begin, end=begin + policy_TC.shape[1], rows=live.rows_M,
            numbers=numbers_4N, N=numbers_4N.shape[1], jsd_weight=self.divergence.jsd_weight, **self.heads.arguments(), **token, **parts,
        )  # fmt: skip

    def mixture_sum(self, live: LiveTokens, first: int, parts: dict, divergence_N: Tensor, numbers_4N: Tensor) -> None:
        """divergence_N and the mean of numbers_4N of the slab's live tokens."""
        S, T = parts["policy_part"].shape
        launch(
            "linear_kl_mixture_sum", numbers_4N.device, rows=live.rows_M, count=live.count, divergence=divergence_N, numbers=numbers_4N,
            first=first, T=T, S=S, N=numbers_4N.shape[1], jsd_weight=self.divergence.jsd_weight, **parts,
        )  # fmt: skip

    def gradient(
        self, policy_TC: Tensor, reference_TC: Tensor, begin: int, live: LiveTokens, first: int, tokens: Tensor, numbers_4N: Tensor,
        bias_sums: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """The policy's logits become the gradient of their product in `dtype`, 0 for tokens that are not live; of 16 bits the
        reference's become what the rounding leaves, each row at the address of its fp32 row. tokens fp32 [10, T] as `Kernels.token`
        writes them, coefficients in the row log_prob; bias_sums fp32 [ceil(T / BIAS_ROWS), C]."""
        launch(
            "linear_kl_gradient", policy_TC.device, policy=policy_TC, reference=reference_TC, out_dtype=dtype, tokens=tokens,
            rows=live.rows_M, count=live.count, numbers=numbers_4N, bias_sums=bias_sums, first=first, T=len(policy_TC),
            N=numbers_4N.shape[1], begin=begin, end=begin + policy_TC.shape[1], stride_policy=policy_TC.stride(0),
            stride_reference=reference_TC.stride(0), direction=DIRECTIONS.index(self.divergence.direction),
            jsd_weight=self.divergence.jsd_weight, **self.heads.arguments(),
        )  # fmt: skip


def fold_buffers(T: int, V: int, jsd: bool, device: torch.device) -> dict[str, Tensor | None]:
    """Partial results [S, T] of `fold`; for jsd of the log-sum-exps alone."""
    S = ceil_div(V, SLOT_COLUMNS)
    empty = lambda dtype: torch.empty(S, T, dtype=dtype, device=device)  # noqa: E731
    tops = {name: empty(torch.float32) for name in ("base_max", "other_max")}
    sums = {name: empty(torch.float64) for name in ("base_sum", "other_sum")}
    return tops | sums | (_NO_SUMS if jsd else {name: empty(torch.float32) for name in _SUMS})


def mixture_buffers(T: int, V: int, device: torch.device) -> dict[str, Tensor]:
    """Those of `mixture`."""
    S = ceil_div(V, SLOT_COLUMNS)
    dtypes = {"policy_part": torch.float32, "reference_part": torch.float32, "mean_part": torch.float64}
    return {name: torch.empty(S, T, dtype=dtype, device=device) for name, dtype in dtypes.items()}
