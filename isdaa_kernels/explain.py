"""What would run, and at what cost: the plan of a problem, and the word of every backend on it."""

from typing import Literal

import torch

from isdaa_kernels.dispatch import (
    PREFERENCE,
    Problem,
    backend_module,
    device_arch,
    linear_kl_module,
    refusal,
    select_backend,
)
from isdaa_kernels.divergence import Divergence, check_direction
from isdaa_kernels.routing import Routed, check_gradient
from isdaa_kernels.workspace import Plan, check_workspace


def plan(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    weight_dtype: torch.dtype | None = None,
    frozen_head: bool = False,
    frozen_hidden: bool = False,
    max_workspace_mb: float | None = None,
    device: str | torch.device | None = None,
    arch: str | None = None,
    backend: str | None = None,
    gradient: Literal["exact"] | Routed = "exact",
    direction: Literal["forward", "reverse", "jsd"] | None = None,
    reference_D: int | None = None,
) -> Plan:
    """How `linear_logprob` would run forward and backward for N scored tokens, hidden size D and vocabulary V: tiles, bytes beyond
    inputs and gradients, and matrix work in units of one product of 2 N V D flop. Pure arithmetic: allocates nothing. `arch` ("sm_90",
    "gfx942", ...) plans for a GPU that need not be here; without it `device` (default: the CPU) says what is planned for. A frozen
    head counts without what keeps the forward from preparing d_hidden: softcap, entropy, mean_logit or a bias that trains. With
    gradient=Routed(...) the bytes come on top of 4 (Triton 5, fp64 8) a token of the call and block, and the units are the most that it
    can cost. With a direction, how `linear_kl` would run, its reference being like the policy, but for its hidden size reference_D; a unit
    is a product of the policy.

    Raises ValueError where max_workspace_mb (MiB) is too small, with the smallest that is enough.
    """
    for name, value in (("N", N), ("V", V), ("D", D)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    for name, value in (("dtype", dtype), ("weight_dtype", weight_dtype or dtype)):
        if not value.is_floating_point:
            raise ValueError(f"{name}: expected a floating dtype, got {value}")
    check_workspace(max_workspace_mb)
    check_gradient(gradient)
    where = torch.device(device or ("cuda" if arch else "cpu"))
    if arch is not None and where.type != "cuda":
        raise ValueError(f"arch: expected None for device {where}, got {arch!r}")
    divergence = _divergence(direction, reference_D, dtype, weight_dtype or dtype, D, gradient)
    problem = Problem(
        where.type,
        dtype,
        weight_dtype or dtype,
        N,
        D,
        V,
        need_hidden=not frozen_hidden,
        need_weight=not frozen_head,
        keep_logits=not (frozen_head and frozen_hidden),
        max_workspace_mb=max_workspace_mb,
        hidden_in_forward=frozen_head and not frozen_hidden and gradient == "exact" and divergence is None,
        routed=None if gradient == "exact" else gradient,
        arch=arch or device_arch(where),
        divergence=divergence,
    )
    module = select_backend(problem, backend)
    return (module if divergence is None else linear_kl_module(module)).make_plan(problem)


def _divergence(
    direction: str | None,
    reference_D: int | None,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    D: int,
    gradient: Literal["exact"] | Routed,
) -> Divergence | None:
    if direction is None:
        if reference_D is not None:
            raise ValueError(f"reference_D: expected None without a direction, got {reference_D}")
        return None
    if gradient != "exact":
        raise ValueError(f"gradient: expected 'exact' with direction={direction!r}, got {gradient}")
    if reference_D is not None and reference_D < 1:
        raise ValueError(f"reference_D: expected a positive number or None, got {reference_D}")
    return Divergence(direction, check_direction(direction, None), reference_D or D, dtype, weight_dtype)


def explain_backends(problem: Problem | None = None) -> str:
    """One line a backend, in the order of preference: what was built or found, and why it would refuse `problem` (default: a small
    fp32 problem on the CPU)."""
    problem = problem or Problem("cpu", torch.float32, torch.float32, 1, 1, 1)
    lines = []
    for name in PREFERENCE:
        reason = refusal(name, problem)
        verdict = "takes it" if reason is None else f"refuses: {reason}"
        lines.append(f"{name}: {backend_module(name).describe()}; {verdict}")
    return "\n".join(lines)
