"""Rows of the head in the order of a routed backward's blocks: chunks in one buffer, never a second copy of the head.

C vocabulary rows of a chunk, D hidden size, V vocabulary.
"""

import torch
import triton
from torch import Tensor

from isdaa_kernels.backends.triton.kernels.tokens import gather_kernel
from isdaa_kernels.backends.triton.slabs import OPTIONS

_ROWS, _COLUMNS = 16, 256  # of a program


class WeightRows:
    """Chunks of the head in the dtype of the products: of the head itself where there is no order."""

    def __init__(self, weight_VD: Tensor, order_V: Tensor | None, C: int, dtype: torch.dtype):
        self.weight_VD, self.order_V, self.dtype, self.buffer_CD = weight_VD, order_V, dtype, None
        if order_V is not None:
            V, D = weight_VD.shape
            aligned = -(-D // 8) * 8
            self.buffer_CD = torch.empty(min(C, V), aligned, dtype=dtype, device=weight_VD.device)[:, :D]
            self.count = torch.full((1,), V, dtype=torch.int32, device=weight_VD.device)

    def like(self) -> Tensor:
        """A matrix whose rows lie in memory as those of the chunks do."""
        return self.weight_VD if self.buffer_CD is None else self.buffer_CD

    def load(self, begin: int, end: int) -> Tensor:
        """[end - begin, D]: places [begin, end) in the order of the blocks. The next call may overwrite it."""
        if self.buffer_CD is None:
            return self.weight_VD[begin:end].to(self.dtype)
        out_CD, D = self.buffer_CD[: end - begin], self.weight_VD.shape[1]
        gather_kernel[(triton.cdiv(end - begin, _ROWS), triton.cdiv(D, _COLUMNS))](
            self.weight_VD, self.order_V, self.count, None, out_CD, begin, end - begin, D, *self.weight_VD.stride(),
            out_CD.stride(0), SCALED=False, M=_ROWS, K=_COLUMNS, **OPTIONS,
        )  # fmt: skip
        return out_CD
