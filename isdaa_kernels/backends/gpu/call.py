"""A call: its problem, the kernel set that runs it, and how its products are made."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from isdaa_kernels.backends.gpu.kernels import FusedTile, Kernels, Shapes
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.divergence import Model
from isdaa_kernels.lm_head import Transform


def product_dtype(problem: Problem) -> torch.dtype:
    """Of the products' factors and of the gradient chunk: 16 bits where both factors have the same."""
    same = problem.hidden_dtype == problem.weight_dtype
    return problem.hidden_dtype if same and problem.hidden_dtype.itemsize == 2 else torch.float32


def reference_dtype(problem: Problem) -> torch.dtype:
    """The same of the reference's products, where two heads are compared."""
    hidden, weight = problem.divergence.dtypes()
    return hidden if hidden == weight and hidden.itemsize == 2 else torch.float32


def gradient_parts(problem: Problem) -> tuple[int, int]:
    """How many 16-bit numbers, high and low, an entry of the gradient chunk is in the products for d_hidden and for d_weight.

    Two heads' gradients have no one entry that outweighs the others and could stand outside the chunk, but fp16 rounds by an eighth of
    what rounding bf16 results takes, so that one part is enough for their d_hidden. A row of d_weight may be all of entries that fp16
    does not hold beside a token's largest: the low part, in the dtype of the factors, does, bf16 over the whole range of fp32. Of fp16
    results it keeps what the high part rounds off."""
    if problem.divergence is None or product_dtype(problem) == torch.float32:
        return 1, 1
    return (1, 2) if product_dtype(problem) == torch.bfloat16 else (2, 2)


def fusable(problem: Problem) -> bool:
    """Whether all factors have the same 16-bit dtype."""
    dtypes = {product_dtype(problem)} | (set() if problem.divergence is None else {reference_dtype(problem)})
    return len(dtypes) == 1 and torch.float32 not in dtypes


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (64, 128, 256)  # of routed gradients: what the partial log-sum-exps add up to, which hold 64 columns each


def refusal_of_numbers(problem: Problem) -> str | None:
    """What no kernel set takes, whatever the device."""
    dtypes = [("hidden", problem.hidden_dtype), ("weight", problem.weight_dtype)]
    if problem.divergence is not None:
        dtypes += zip(("the reference's hidden", "the reference's weight"), problem.divergence.dtypes(), strict=True)
    for name, dtype in dtypes:
        if dtype not in DTYPES:
            return f"takes float16, bfloat16 and float32, not {name} in {dtype}"
    if problem.routed is not None and problem.routed.block not in BLOCKS:
        return f"routes blocks of {', '.join(map(str, BLOCKS))} vocabulary rows, not of {problem.routed.block}"
    return None


@dataclass(frozen=True)
class Call:
    """aligned: the rows of the head that are multiplied lie on 16-byte borders. A plan without tensors takes them to be.

    The two products of the backward always go to the library, from a gradient chunk in the factors' dtype: it is as fast as the hardware
    there, and a chunk costs 2 bytes written and 4 read an entry, against 6 D flop. The logits' own go where the kernel set says.
    """

    kernels: Shapes | Kernels
    problem: Problem
    aligned: bool = True

    @classmethod
    def of(cls, kernels: Kernels, problem: Problem, weight_VD: Tensor, transform: Transform) -> "Call":
        """Rows in the order of a routed backward's blocks are gathered into an aligned buffer."""
        return cls(kernels, problem, transform.order_V is not None or rows_aligned(weight_VD))

    @classmethod
    def of_heads(cls, kernels: Kernels, problem: Problem, policy: Model, reference: Model) -> "Call":
        return cls(kernels, problem, rows_aligned(policy.weight_VD) and rows_aligned(reference.weight_VD))

    @cached_property
    def fused(self) -> bool:
        return self.kernels.products(self.problem, self.aligned) == "fused"

    @cached_property
    def dtype(self) -> torch.dtype:
        return product_dtype(self.problem)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the gradient chunk."""
        narrow = self.problem.divergence is not None and self.dtype != torch.float32
        return torch.float16 if narrow else self.dtype

    @cached_property
    def parts(self) -> int:
        """Of the gradient chunk that are made: those of the gradients that are wanted."""
        wanted = zip(gradient_parts(self.problem), (self.problem.need_hidden, self.problem.need_weight), strict=True)
        return max([1, *(parts for parts, need in wanted if need)])

    @property
    def converts_weight(self) -> bool:
        """The gradient chunk's product with the weight takes the weight in fp16."""
        return self.problem.need_hidden and self.gradient_dtype != self.dtype

    @property
    def in_place(self) -> bool:
        """The gradient chunk takes the place of the library's logits."""
        return not self.fused and (self.dtype == torch.float32 or self.kernels.narrows_in_place)

    def tile(self, kernel: str, rich: bool) -> FusedTile:
        return self.kernels.fused_tile(self.problem, kernel, rich, self.aligned)


def rows_aligned(weight_VD: Tensor) -> bool:
    size = weight_VD.element_size()
    apart = weight_VD.stride(0) >= weight_VD.shape[1]  # not one row, expanded
    return (
        apart and weight_VD.stride(1) == 1 and weight_VD.stride(0) * size % 16 == 0 and weight_VD.data_ptr() % 16 == 0
    )
