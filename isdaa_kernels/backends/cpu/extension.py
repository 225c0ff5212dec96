"""The compiled part of the CPU backend: `native`, None where it is `missing`."""

from collections.abc import Callable

import torch
from torch import Tensor

try:
    from isdaa_kernels import _cpu as native

    missing = ""
except ImportError as error:  # reported by refusal() and describe()
    native, missing = None, str(error)


def kernel(name: str, dtype: torch.dtype) -> Callable:
    """What is compiled for each dtype of the arithmetic."""
    return getattr(native, f"{name}_{str(dtype).removeprefix('torch.')}")


def address(tensor: Tensor | None, row: int = 0) -> int:
    """Of the given row; 0, which the kernels take for absence, where there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()
