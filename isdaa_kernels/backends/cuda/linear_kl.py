"""`linear_kl` by CUDA kernels: products of both heads by the library, chunk by chunk, folded together by one read of each, and turned into
the policy's gradient in their place. Products run on all of `max_scored` tokens."""

from torch import Tensor

from isdaa_kernels.backends.cuda import _kernels
from isdaa_kernels.backends.cuda.shapes import CudaShapes
from isdaa_kernels.backends.gpu import kl_backward_pass, kl_forward_pass, plan
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import Plan


def make_plan(problem: Problem) -> Plan:
    return plan.make_plan(CudaShapes(fused=False), problem)


def forward(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    return kl_forward_pass.forward(_kernels(), *args, **kwargs)


def backward(*args, **kwargs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return kl_backward_pass.backward(_kernels(), *args, **kwargs)
