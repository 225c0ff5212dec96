"""The operators that PyTorch sees: schema, fake, autograd. The backend is chosen inside, so `fullgraph` compiles around it."""

from isdaa_kernels.ops.linear_kl import linear_kl_backward, linear_kl_forward
from isdaa_kernels.ops.linear_logprob import linear_logprob_backward, linear_logprob_forward
from isdaa_kernels.ops.logprob_from_logits import (
    logprob_from_logits_backward,
    logprob_from_logits_backward_,
    logprob_from_logits_forward,
)
from isdaa_kernels.ops.pair_loss import pair_loss_backend, pair_loss_backward, pair_loss_forward
from isdaa_kernels.ops.segments import segment_spread, segment_sum

__all__ = [
    "linear_kl_backward",
    "linear_kl_forward",
    "linear_logprob_backward",
    "linear_logprob_forward",
    "logprob_from_logits_backward",
    "logprob_from_logits_backward_",
    "logprob_from_logits_forward",
    "pair_loss_backend",
    "pair_loss_backward",
    "pair_loss_forward",
    "segment_spread",
    "segment_sum",
]
