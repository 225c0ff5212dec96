"""Matrix products left to the library, with fp32 sums whatever the factors' dtype.

A, B factors in fp16, bf16 or fp32; TF32 is used for fp32 factors only where the user's own torch setting allows it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import LOW_SCALE

LEAST_TORCH = (2, 10)  # products of 16-bit factors that add to fp32 sums


def torch_too_old() -> str | None:
    """A sentence where it is."""
    if release(torch.__version__) >= LEAST_TORCH:
        return None
    return f"torch {torch.__version__} is too old; it takes {'.'.join(map(str, LEAST_TORCH))} or newer"


def release(version: str) -> tuple[int, int]:
    """(major, minor) of "2.10.0+cu128"."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (fp32) = a @ b, summed in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # no such operator there: interpretation only
        return torch.mm(a.float(), b.float(), out=out)
    return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def accumulate(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """out (fp32) += scale * a @ b, summed in fp32."""
    if a.dtype == torch.float32:
        return torch.addmm(out, a, b, alpha=scale, out=out)
    if a.device.type == "cpu":
        return torch.addmm(out, a.float(), b.float(), alpha=scale, out=out)
    return torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, alpha=scale, out=out)


def add_parts(parts: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor, is_first: bool) -> None:
    """out (fp32) = or += the sum of the products of a gradient chunk's parts (`call.gradient_parts`), each with the factor of its dtype."""
    (product if is_first else accumulate)(parts[0], factors[0], out)
    for low, factor in zip(parts[1:], factors[1:], strict=False):
        accumulate(low, factor, out, LOW_SCALE)
