"""One model's logits, a slab of tokens and a chunk of vocabulary at a time.

T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels.backends.cuda.launch_linear_kl import KlKernels
from isdaa_kernels.backends.cuda.linear_kl_plan import Side
from isdaa_kernels.backends.gpu.library import product
from isdaa_kernels.backends.gpu.slabs import HiddenSlab, LiveTokens
from isdaa_kernels.divergence import Model


class LogitsOf:
    """Hidden states of a slab, and room for their products with `columns` vocabulary rows."""

    def __init__(self, kernels: KlKernels, model: Model, side: Side, live: LiveTokens, T: int, columns: int):
        self.weight_VD, self.dtype, self.T = model.weight_VD, side.dtype, T
        self.hidden = HiddenSlab(kernels, model.hidden_ND, live, T, side.dtype)
        self.buffer = torch.empty(T * columns, dtype=torch.float32, device=model.hidden_ND.device)

    def load(self, first: int, scale_T: Tensor | None = None) -> Tensor:
        self.hidden_TD = self.hidden.load(first, scale_T)
        return self.hidden_TD

    def place(self, span: tuple[int, int], at: int = 0) -> Tensor:
        """[T, C] behind the products of `at` vocabulary rows."""
        width = span[1] - span[0]
        return self.buffer[self.T * at : self.T * (at + width)].view(self.T, width)

    def product(self, begin: int, out_TC: Tensor) -> Tensor:
        """out_TC = the product for the vocabulary rows from `begin` on. Returns them as they were multiplied."""
        weight_CD = self.weight_VD[begin : begin + out_TC.shape[1]].to(self.dtype)
        product(self.hidden_TD, weight_CD.T, out=out_TC)
        return weight_CD
