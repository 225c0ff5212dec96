"""The loss stage on the CPU: csrc/cpu/pair_loss_cpu.cpp."""

from functools import partial

import torch
from torch import Tensor

from isdaa_kernels import pair_loss
from isdaa_kernels.backends.cpu.extension import missing, native


def forward(call: pair_loss.PairLossCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.forward(_kernel("pair_loss_forward"))


def backward(packing: pair_loss.Packing, grad: Tensor, slope: Tensor, like: Tensor) -> Tensor:
    return pair_loss.backward(_kernel("pair_loss_backward"), packing, grad, slope, like)


def _kernel(name: str) -> partial:
    if native is None:
        raise RuntimeError(
            f"the compiled part is missing ({missing}); reinstall isdaa-kernels where a C++17 compiler is"
        )
    return partial(getattr(native, name), threads=torch.get_num_threads())
