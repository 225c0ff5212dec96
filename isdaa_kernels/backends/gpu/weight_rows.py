"""Rows of the head in the order of a routed backward's blocks: chunks in one buffer, never a second copy of the head.

C vocabulary rows of a chunk, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import Kernels


class WeightRows:
    """Chunks of the head in the dtype of the products: of the head itself where there is no order."""

    def __init__(self, kernels: Kernels, weight_VD: Tensor, order_V: Tensor | None, C: int, dtype: torch.dtype):
        self.kernels = kernels
        self.weight_VD, self.order_V, self.dtype, self.buffer_CD = weight_VD, order_V, dtype, None
        if order_V is not None:
            V, D = weight_VD.shape
            aligned = -(-D // 8) * 8
            self.buffer_CD = torch.empty(min(C, V), aligned, dtype=dtype, device=weight_VD.device)[:, :D]
            self.count = torch.full((1,), V, dtype=torch.int32, device=weight_VD.device)

    def load(self, begin: int, end: int) -> Tensor:
        """[end - begin, D]: places [begin, end) in the order of the blocks. The next call may overwrite it."""
        if self.buffer_CD is None:
            return self.weight_VD[begin:end].to(self.dtype)
        out_CD = self.buffer_CD[: end - begin]
        self.kernels.gather(
            hidden=self.weight_VD, rows=self.order_V, count=self.count, scale=None, out=out_CD, first=begin
        )
        return out_CD
