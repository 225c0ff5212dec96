"""Checks and conversions of arguments that several public functions take."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_targets(targets: Tensor, leading: torch.Size, name: str, ignore_index: int) -> None:
    """`leading`: the shape that the tensor called `name` leaves for the targets."""
    if targets.shape != leading:
        raise ValueError(f"targets: expected {list(leading)} to fit {name}, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32, got {targets.dtype}")
    if not torch.iinfo(targets.dtype).min <= ignore_index <= torch.iinfo(targets.dtype).max:
        raise ValueError(f"ignore_index: expected a number that {targets.dtype} targets can hold, got {ignore_index}")


def check_floats(name: str, tensor: Tensor | None, like: Tensor, so: str = "targets are") -> None:
    """`like` is where it should be, as `so` says."""
    if tensor is None:
        return
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected to be on {like.device} as {so}, got {tensor.device}")


def split_temperature(temperature: float | Tensor, targets: Tensor) -> tuple[float, Tensor | None]:
    """(constant, one value a token [N] or None)."""
    shape = targets.shape
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        return float(temperature), None
    if temperature.shape not in (shape, torch.Size()):
        raise ValueError(f"temperature: expected a number or {list(shape)}, got {list(temperature.shape)}")
    if temperature.dtype not in FLOATS or temperature.device != targets.device:
        raise ValueError(
            f"temperature: expected floats on {targets.device}, got {temperature.dtype} on {temperature.device}"
        )
    if temperature.requires_grad:
        raise ValueError("temperature: expected a tensor without gradient, got requires_grad=True")
    # Elsewhere looking at values would wait for the device; a compiled graph cannot branch on them.
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((temperature > 0) & temperature.isfinite())
        if bool(bad.any()):
            raise ValueError(
                f"temperature: expected positive finite numbers, got {temperature[bad].flatten()[0].item()}"
            )
    return 1.0, temperature.expand(shape).reshape(-1)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Hidden states and weights of one call as autocast, where it is enabled, would have them; fp64 stays."""
    device = tensors[0].device.type
    if any(tensor.dtype == torch.float64 for tensor in tensors) or not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)
