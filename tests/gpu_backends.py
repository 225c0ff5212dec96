"""What the tests of GPU backends run on: the backends that take the GPU, or without one Triton's kernels in its interpreter and CUDA's in
the emulator. CUDA's run in both of their ways wherever they can: with products left to the library ("cuda library") and, for 16-bit
factors, with the kernels for Hopper ("cuda fused")."""

from types import ModuleType

import pytest
import torch
from emulated_cuda import emulated_module

from isdaa_kernels.backends.cuda import extension, shapes
from isdaa_kernels.backends.gpu import plan as plans
from isdaa_kernels.dispatch import Problem, backend_module, refusal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class UnderTest:
    """The backend of the test that runs; Triton's for those that ask it alone."""

    name = "triton"
    fused = True  # 16-bit products are made by its own kernels

    @property
    def module(self) -> ModuleType:
        return backend_module(self.name)

    @property
    def kernels(self):
        return self.module._kernels()

    @property
    def step(self) -> int:
        """Slabs of tokens are multiples of it."""
        return self.kernels.slab_step(Problem.of(*[torch.empty(1, 1, device=DEVICE)] * 2, 1))


under = UnderTest()


def use_small_slabs(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Several slabs of tokens, chunks of vocabulary and pieces of d_weight in a small problem; sizes: other names of `plan`."""
    step = under.step
    sizes = {
        "SLAB_TOKENS": (2 * step, step),
        "CHUNK_COLUMNS": (128,),
        "WEIGHT_ROWS": 48,
        "_FORWARD_TOKENS": step,
        **sizes,
    }
    for name, size in sizes.items():
        monkeypatch.setattr(plans, name, size)


def names() -> list[str]:
    if DEVICE == "cpu":
        return ["triton", "cuda library", "cuda fused"]
    tensor = torch.empty(1, 1, dtype=torch.bfloat16, device=DEVICE)
    here = [name for name in ("triton", "cuda") if refusal(name, Problem.of(tensor, tensor, 1)) is None]
    fused = ["cuda fused"] if "cuda" in here and Problem.of(tensor, tensor, 1).arch in shapes.FUSED_ARCHS else []
    return [name.replace("cuda", "cuda library") for name in here] + fused


@pytest.fixture(autouse=True, params=names())
def _under_test(request, monkeypatch):
    under.name, _, way = request.param.partition(" ")
    under.fused = way != "library"
    if under.name == "cuda":
        monkeypatch.setattr(shapes, "FUSED_ARCHS", (*shapes.FUSED_ARCHS, None) if under.fused else ())
        if DEVICE == "cpu":
            monkeypatch.setattr(extension, "native", emulated_module())
