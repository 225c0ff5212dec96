"""Which backend runs a problem. A backend is a folder under `backends/` with the functions named in `backends/__init__.py`."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from isdaa_kernels.divergence import Divergence
from isdaa_kernels.routing import Routed

PREFERENCE = ("cuda", "triton", "cpu", "reference")
# device type -> the backends made for it; `reference` never stands in for them in silence
ACCELERATED = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
# Where CUDA's kernels are fused with the product, as Triton's are everywhere; elsewhere Triton comes first.
COMPILED_FIRST = ("sm_90",)


@dataclass(frozen=True)
class Problem:
    """All that the choice of a backend, a tile and a workspace may depend on; no tensor data."""

    device_type: str
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    N: int  # tokens that may be scored (max_scored)
    D: int
    V: int
    need_hidden: bool = True
    need_weight: bool = True
    keep_logits: bool = False  # a backward will follow
    max_workspace_mb: float | None = None
    routed: Routed | None = None  # None: exact gradients
    hidden_in_forward: bool = (
        False  # only d_hidden is wanted, linear in the tokens' coefficients: a forward may prepare it
    )
    arch: str | None = None  # of a GPU: "sm_90", "gfx942", ...
    divergence: Divergence | None = None  # of two heads; the numbers above are the policy's then

    @property
    def compute_dtype(self) -> torch.dtype:
        reference = () if self.divergence is None else self.divergence.dtypes()
        double = torch.float64 in (self.hidden_dtype, self.weight_dtype, *reference)
        return torch.float64 if double else torch.float32

    @classmethod
    def of(cls, hidden_ND: Tensor, weight_VD: Tensor, max_scored: int, **flags) -> "Problem":
        V, D = weight_VD.shape
        arch = device_arch(hidden_ND.device)
        return cls(hidden_ND.device.type, hidden_ND.dtype, weight_VD.dtype, max_scored, D, V, arch=arch, **flags)


@cache
def device_arch(device: torch.device) -> str | None:
    """ "sm_90", "gfx942", ... of a GPU that is here; None of any other device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on(device: torch.device):
    """Kernels are launched on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class NoBackend(RuntimeError):
    """No backend takes the problem; the message holds the sentence of each."""


def backend_module(name: str) -> ModuleType:
    if name not in PREFERENCE:
        raise ValueError(f"backend: expected one of {', '.join(PREFERENCE)} or None, got {name!r}")
    return import_module(f"isdaa_kernels.backends.{name}")


def linear_kl_module(module: ModuleType) -> ModuleType:
    """The part of a backend that has the functions of `linear_kl`."""
    return import_module(f"{module.__name__}.linear_kl")


def refusal(name: str, problem: Problem) -> str | None:
    return backend_module(name).refusal(problem)


def select_backend(problem: Problem, name: str | None = None) -> ModuleType:
    """The backend asked for, or the first that takes the problem of those made for its device. Raises NoBackend with every refusal."""
    if name is not None:
        reason = refusal(name, problem)
        if reason is not None:
            raise NoBackend(f"backend {name!r} refuses: {reason}")
        return backend_module(name)
    made_for_it = ACCELERATED.get(problem.device_type)
    if made_for_it and problem.arch not in COMPILED_FIRST:
        made_for_it = sorted(made_for_it, key=lambda candidate: candidate == "cuda")
    reasons = []
    for candidate in made_for_it or ("reference",):
        reason = refusal(candidate, problem)
        if reason is None:
            return backend_module(candidate)
        reasons.append(f"{candidate}: {reason}")
    hint = "; backend='reference' runs it in plain PyTorch" if made_for_it else ""
    raise NoBackend(f"no backend takes {problem}: {'; '.join(reasons)}{hint}")
