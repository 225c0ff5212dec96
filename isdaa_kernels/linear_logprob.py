"""Token log-probs from hidden states and an LM head, without the logits.

N tokens, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from isdaa_kernels import ops
from isdaa_kernels.lm_head import LMHead
from isdaa_kernels.targets import raise_bad_targets
from isdaa_kernels.workspace import check_workspace

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    max_scored: int | None = None,
    max_workspace_mb: float | None = None,
    backend: str | None = None,
    validate: bool = False,
) -> Tensor:
    """Log-probability of each target under the LM head, with exact gradients for hidden, weight and bias. Equal to

        z = (hidden @ weight.T + bias).float() * logit_scale
        z = softcap * (z / softcap).tanh() / temperature           # softcap only where given
        logprob = z.log_softmax(-1).gather(-1, targets[..., None])[..., 0].where(targets != ignore_index, 0)

    Neither the logits [..., V] nor their gradient is ever allocated: they exist one tile at a time, in fp32 (fp64 for fp64 inputs).

    hidden [..., D] and weight [V, D]: fp16, bf16, fp32 or fp64, dtypes may differ, any strides. targets [...]: int64 or int32, the
    label of each hidden state, already shifted (`shift_targets`); an ignored one costs no matrix work on backends that compact.
    bias [V]. temperature: a positive number, or one a token [...]; not differentiable. max_scored: an upper bound on the targets
    that are not ignored, known to a collator; sizes buffers. max_workspace_mb: MiB that the call may allocate beyond inputs, output
    and gradients; more keeps part of the logits for the backward and saves their recomputation (`plan` says what it buys); None
    keeps none. backend: a name, or None for the best one for the device (`explain_backends`). validate: check targets now, even
    where that waits for a device.

    Under autocast hidden and weight are cast to its dtype. Gradients have the dtypes of their inputs, are summed in fp32 and
    rounded once. A second derivative raises RuntimeError.

    Returns fp32 [...] (fp64 for fp64 inputs), 0 where the target is ignored. Raises ValueError for shapes, dtypes, devices and
    values that do not fit (a target outside the vocabulary: at once on the CPU, through `check` on a device), NoBackend where no
    backend takes the problem.
    """
    head = LMHead(weight, bias, logit_scale, softcap)
    _check_tensors(hidden, head, targets, ignore_index)
    shape, D = targets.shape, hidden.shape[-1]
    N = targets.numel()
    if max_scored is not None and not (isinstance(max_scored, int) and 0 <= max_scored <= N):
        raise ValueError(f"max_scored: expected 0 to {N} (the number of targets), got {max_scored}")
    check_workspace(max_workspace_mb)
    constant, per_token = _temperature(temperature, targets)
    hidden, weight = _autocast(hidden, weight)
    targets_N = targets.reshape(N)
    if validate:
        raise_bad_targets(targets_N, weight.shape[0], ignore_index)
    grad = torch.is_grad_enabled()
    logprob_N, _, _ = ops.linear_logprob_forward(
        hidden.reshape(N, D),
        weight,
        targets_N,
        bias,
        per_token,
        constant,
        float(logit_scale),
        None if softcap is None else float(softcap),
        ignore_index,
        N if max_scored is None else max_scored,
        None if max_workspace_mb is None else float(max_workspace_mb),
        [grad and hidden.requires_grad, grad and weight.requires_grad],
        backend,
    )
    return logprob_N.reshape(shape)


def _check_tensors(hidden: Tensor, head: LMHead, targets: Tensor, ignore_index: int) -> None:
    V, D = head.weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != D:
        raise ValueError(f"hidden: expected [..., {D}] to fit weight [{V}, {D}], got {list(hidden.shape)}")
    if D == 0 or V == 0:
        raise ValueError(f"weight: expected at least one row and one column, got [{V}, {D}]")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets: expected {list(hidden.shape[:-1])} to fit hidden, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32, got {targets.dtype}")
    if not torch.iinfo(targets.dtype).min <= ignore_index <= torch.iinfo(targets.dtype).max:
        raise ValueError(f"ignore_index: expected a number that {targets.dtype} targets can hold, got {ignore_index}")
    for name, tensor in (("hidden", hidden), ("weight", head.weight), ("bias", head.bias)):
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != targets.device:
            raise ValueError(f"{name}: expected to be on {targets.device} as targets are, got {tensor.device}")


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if torch.float64 in (hidden.dtype, weight.dtype) or not torch.amp.is_autocast_available(device):
        return hidden, weight
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _temperature(temperature: float | Tensor, targets: Tensor) -> tuple[float, Tensor | None]:
    shape = targets.shape
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        return float(temperature), None
    if temperature.shape not in (shape, torch.Size()):
        raise ValueError(f"temperature: expected a number or {list(shape)}, got {list(temperature.shape)}")
    if temperature.dtype not in _FLOATS or temperature.device != targets.device:
        raise ValueError(
            f"temperature: expected floats on {targets.device}, got {temperature.dtype} on {temperature.device}"
        )
    if temperature.requires_grad:
        raise ValueError("temperature: expected a tensor without gradient, got requires_grad=True")
    if (
        temperature.device.type == "cpu" and not torch.compiler.is_compiling()
    ):  # elsewhere looking would wait for the device
        bad = ~((temperature > 0) & temperature.isfinite())
        if bool(bad.any()):
            raise ValueError(
                f"temperature: expected positive finite numbers, got {temperature[bad].flatten()[0].item()}"
            )
    return 1.0, temperature.expand(shape).reshape(-1)
