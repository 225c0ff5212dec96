"""The loss stage on NVIDIA GPUs: csrc/cuda/pair_loss.cuh."""

from functools import partial

import torch
from torch import Tensor

from isdaa_kernels import pair_loss
from isdaa_kernels.backends.cuda import extension


def forward(call: pair_loss.PairLossCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.forward(_kernel("pair_loss_forward", call.policy.device), call.packing.pieces())


def backward(packing: pair_loss.Packing, grad: Tensor, slope: Tensor, like: Tensor) -> Tensor:
    return pair_loss.backward(_kernel("pair_loss_backward", like.device), packing, grad, slope, like, packing.pieces())


def _kernel(name: str, device: torch.device) -> partial:
    return partial(getattr(extension.native, name), extension.stream_of(device))
