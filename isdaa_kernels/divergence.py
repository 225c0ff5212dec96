"""What `linear_kl` asks a backend for: which divergence, and of which two heads.

N tokens, D hidden size (E that of the reference), V vocabulary. p, q: the probabilities of policy and reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isdaa_kernels.lm_head import Transform

DIRECTIONS = ("forward", "reverse", "jsd")  # numbered as in csrc/cpu/linear_kl_params.h


@dataclass(frozen=True)
class Divergence:
    """Of a `Problem`, whose hidden_dtype, weight_dtype and D are the policy's; no tensor data.

    forward KL(q || p), reverse KL(p || q), jsd (1 - w) KL(p || m) + w KL(q || m) with m = (1 - w) p + w q and w = jsd_weight.
    logprobs: log p and log q of the targets are wanted too, the policy's with a gradient.
    """

    direction: str
    jsd_weight: float
    reference_D: int
    reference_hidden_dtype: torch.dtype
    reference_weight_dtype: torch.dtype
    logprobs: bool = False

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.reference_hidden_dtype, self.reference_weight_dtype


class Model(NamedTuple):
    """Hidden states and the head over them."""

    hidden_ND: Tensor
    weight_VD: Tensor
    transform: Transform


class KlGradient(NamedTuple):
    """The upstream gradients [N] of the divergence and of the policy's log-prob, None where there are no log-probs:

    d loss / d z[n, j] = divergence[n] * (d divergence / d z[n, j]) + logprob[n] * (onehot[n, j] - p[n, j])
    """

    divergence_N: Tensor
    logprob_N: Tensor | None = None

    def terms(self) -> tuple[Tensor, ...]:
        return tuple(term_N for term_N in self if term_N is not None)

    def active(self) -> Tensor:
        """bool [N]: any coefficient other than 0 (NaN counts)."""
        active_N = self.divergence_N != 0
        return active_N if self.logprob_N is None else active_N | (self.logprob_N != 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> "KlGradient":
        """`function` of every term that is there."""
        return KlGradient(*(None if term_N is None else function(term_N) for term_N in self))


def check_direction(direction: str, jsd_weight: float | None) -> float:
    """The weight of the reference in the mixture; ValueError for an unknown direction or a weight that does not fit."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if direction != "jsd":
        if jsd_weight is not None:
            raise ValueError(f"jsd_weight: expected None with direction={direction!r}, got {jsd_weight}")
        return 0.5
    if jsd_weight is None:
        return 0.5
    if isinstance(jsd_weight, Tensor) or not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight: expected a number between 0 and 1, both excluded, got {jsd_weight}")
    return float(jsd_weight)
