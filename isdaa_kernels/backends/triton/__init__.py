"""Triton kernels for NVIDIA (from sm_80 on) and AMD (CDNA) GPUs: `pip install` is all they need.

A tile of logits stays in registers: the forward folds it into partial log-sum-exps, the backward turns it into a chunk of gradients
whose two products go to the library; where gradients are routed, grouped products follow lists that the device itself writes. Tokens
without a target are compacted on the device; the host never waits for it. No atomics, no locks: every sum has one order. With
TRITON_INTERPRET=1 (Triton's own switch) the kernels run on CPU tensors, slowly, for tests.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from isdaa_kernels.backends.gpu import backward_pass, forward_pass, logits_pass, plan
from isdaa_kernels.backends.gpu.call import refusal_of_numbers
from isdaa_kernels.backends.gpu.library import release, torch_too_old
from isdaa_kernels.backends.triton.shapes import TritonShapes
from isdaa_kernels.backends.triton.tile_config import family, known_archs
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.workspace import Plan

__all__ = ["backward", "backward_logits", "describe", "forward", "forward_logits", "make_plan", "refusal"]

LEAST_TRITON = (3, 4)


def triton_version() -> str | None:
    """Of the package that `import triton` would find; None where it would find none."""
    if find_spec("triton") is None:
        return None
    for package in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return import_module("triton").__version__


def _missing() -> str | None:
    found = triton_version()
    wanted = ".".join(map(str, LEAST_TRITON))
    if found is None:
        return f"triton is not installed; it takes triton {wanted} or newer"
    if release(found) < LEAST_TRITON:
        return f"triton {found} is too old; it takes {wanted} or newer"
    return torch_too_old()


def interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def refusal(problem: Problem) -> str | None:
    unfit = refusal_of_numbers(problem)
    if unfit is not None:
        return unfit
    if problem.device_type != "cuda":
        missing = _missing()
        if problem.device_type == "cpu" and missing is None and interpreting():
            return None
        return f"takes tensors on NVIDIA and AMD GPUs, not on {problem.device_type}"
    if problem.arch is None:
        return "no GPU is visible to PyTorch"
    if family(problem.arch) is None:
        return f"takes GPUs of {', '.join(known_archs())}, not of {problem.arch}"
    return _missing()


def describe() -> str:
    return _missing() or f"triton {triton_version()}"


def make_plan(problem: Problem) -> Plan:
    return plan.make_plan(TritonShapes(), problem)


def forward(*args, **kwargs):
    return forward_pass.forward(_kernels(), *args, **kwargs)


def backward(*args, **kwargs):
    return backward_pass.backward(_kernels(), *args, **kwargs)


def forward_logits(*args, **kwargs):
    return logits_pass.forward_logits(_kernels(), *args, **kwargs)


def backward_logits(*args, **kwargs):
    return logits_pass.backward_logits(_kernels(), *args, **kwargs)


def _kernels():
    """The kernel set; only what launches needs triton."""
    from isdaa_kernels.backends.triton.launch import KERNELS

    return KERNELS
