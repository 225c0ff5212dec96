"""`linear_kl` by Triton kernels: a tile of each head's logits stays in registers, where they are folded together or turned into the
policy's gradient; fp32 and mixed factors go to the library, chunk by chunk."""

from torch import Tensor

from isdaa_kernels.backends.gpu import kl_backward_pass, kl_forward_pass, plan
from isdaa_kernels.backends.triton import _kernels
from isdaa_kernels.backends.triton.shapes import TritonShapes
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import Plan


def make_plan(problem: Problem) -> Plan:
    return plan.make_plan(TritonShapes(), problem)


def forward(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    return kl_forward_pass.forward(_kernels(), *args, **kwargs)


def backward(*args, **kwargs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return kl_backward_pass.backward(_kernels(), *args, **kwargs)
