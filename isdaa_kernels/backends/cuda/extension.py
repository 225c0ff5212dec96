"""The compiled module `isdaa_kernels._cuda`: whether it is here, what it was built for, and how one of its kernels is called."""

from functools import cache

import torch
from torch import Tensor

try:
    from isdaa_kernels import _cuda as native

    missing = ""
except ImportError as error:  # reported by refusal() and describe()
    native, missing = None, str(error)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def archs() -> tuple[str, ...]:
    """What the kernels were compiled for, as nvcc names it: ("80", "90a", ...)."""
    return tuple(filter(None, native.archs.split(","))) if native is not None else ()


def has_fused() -> bool:
    """Whether the kernels for Hopper, which are for sm_90a alone, were built."""
    return native is not None and (native.emulated or "90a" in archs())


def runs_on(arch: str) -> bool:
    """Whether the GPU `arch`, "sm_90" say, can run what was built: code for sm_XY runs on sm_XZ for Z >= Y, that for sm_XYa on no other."""
    major, minor = int(arch.removeprefix("sm_")[:-1]), int(arch[-1])
    for built in archs():
        number = built.rstrip("a")
        same = (int(number[:-1]), int(number[-1])) == (major, minor)
        if same or (number == built and int(number[:-1]) == major and int(number[-1]) <= minor):
            return True
    return False


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def stream_of(device: torch.device) -> int:
    """The current stream of the device; 0 in the emulator."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def launch(kernel: str, device: torch.device, **arguments) -> None:
    """Tensors go in as addresses (None as 0), dtypes as numbers. The kernel runs on the current stream of `device`."""
    getattr(native, kernel)(stream_of(device), **{name: _number(value) for name, value in arguments.items()})


def _number(value):
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, torch.dtype):
        return _DTYPES[value]
    return 0 if value is None else value
