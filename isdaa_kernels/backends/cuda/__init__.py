"""CUDA C++ kernels, compiled when the package is built: for fixed images, fast starts and CUDA graphs, and for Hopper.

Same passes as the Triton backend (`backends.gpu`), same contracts. On sm_90 the logits' products are fused with what follows them;
elsewhere the library makes them, chunk by chunk, and one read of each turns them into log-sum-exps or into 16-bit gradients in their
place, as it does everywhere for `linear_kl`. Needs `isdaa_kernels._cuda`, which `pip install` builds where it finds nvcc.
"""

from torch import Tensor

from isdaa_kernels.backends.cuda import extension
from isdaa_kernels.backends.cuda.launch import CudaKernels
from isdaa_kernels.backends.cuda.shapes import CudaShapes
from isdaa_kernels.backends.gpu import backward_pass, forward_pass, logits_pass, plan
from isdaa_kernels.backends.gpu.call import refusal_of_numbers
from isdaa_kernels.backends.gpu.library import torch_too_old
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import Plan

__all__ = ["backward", "backward_logits", "describe", "forward", "forward_logits", "make_plan", "refusal"]


def refusal(problem: Problem) -> str | None:
    native = extension.native
    unfit = refusal_of_numbers(problem)
    if unfit is not None:
        return unfit
    if native is None:
        return f"the compiled part is missing ({extension.missing}); reinstall isdaa-kernels where nvcc is"
    if problem.device_type != "cuda":
        return (
            None
            if problem.device_type == "cpu" and native.emulated
            else f"takes tensors on NVIDIA GPUs, not on {problem.device_type}"
        )
    if problem.arch is None:
        return "no GPU is visible to PyTorch"
    if not problem.arch.startswith("sm_") or not extension.runs_on(problem.arch):
        return f"was built for sm_{', sm_'.join(extension.archs())}, not for {problem.arch}"
    return torch_too_old()


def describe() -> str:
    if extension.native is None:
        return f"not built: {extension.missing}"
    return f"CUDA C++ kernels for sm_{', sm_'.join(extension.archs())}"


def make_plan(problem: Problem) -> Plan:
    return plan.make_plan(CudaShapes(extension.has_fused()), problem)


def forward(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward_pass.forward(_kernels(), *args, **kwargs)


def backward(*args, **kwargs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return backward_pass.backward(_kernels(), *args, **kwargs)


def forward_logits(*args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    return logits_pass.forward_logits(_kernels(), *args, **kwargs)


def backward_logits(*args, **kwargs) -> None:
    logits_pass.backward_logits(_kernels(), *args, **kwargs)


def _kernels() -> CudaKernels:
    return CudaKernels(extension.has_fused())
