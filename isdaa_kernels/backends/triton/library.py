"""Matrix products left to the library, with fp32 sums whatever the factors' dtype.

A, B factors in fp16, bf16 or fp32; TF32 is used for fp32 factors only where the user's own torch setting allows it.
"""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (fp32) = a @ b, summed in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # no such operator there: interpretation only
        return torch.mm(a.float(), b.float(), out=out)
    return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def accumulate(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (fp32) += a @ b, summed in fp32."""
    if a.dtype == torch.float32:
        return torch.addmm(out, a, b, out=out)
    if a.device.type == "cpu":
        return torch.addmm(out, a.float(), b.float(), out=out)
    return torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
