"""What a plan needs to know of the CUDA kernels: pure functions, no device, no compiled part. Sizes match csrc/cuda."""

from dataclasses import dataclass

import torch

from isdaa_kernels.backends.gpu.kernels import RoutedSizes
from isdaa_kernels.dispatch import Problem

FUSED_ARCHS = ("sm_90",)  # with tensor memory accelerator and wgmma
SLOT_COLUMNS, FINE_SLOT_COLUMNS = 2048, 64


@dataclass(frozen=True)
class FusedTile:
    """Two groups of four warps, 64 tokens each."""

    M: int = 128
    N: int = 256
    pieces: int = 4


class CudaShapes:
    """fused: whether the fused kernels were built."""

    name = "cuda"
    narrows_in_place = True
    gradient_rows = 16
    kl_gradient_rows = 16

    def __init__(self, fused: bool):
        self.fused = fused

    def products(self, problem: Problem, aligned: bool) -> str:
        """The fused kernels multiply 16-bit factors of one dtype, of one head; elsewhere tensor cores are left to the library."""
        if problem.divergence is not None:
            return "library"
        sixteen = problem.hidden_dtype == problem.weight_dtype and problem.hidden_dtype in (
            torch.float16,
            torch.bfloat16,
        )
        return "fused" if self.fused and sixteen and aligned and problem.arch in FUSED_ARCHS else "library"

    def slab_step(self, problem: Problem) -> int:
        return 128 if problem.arch is None else 256

    def fused_tile(self, problem: Problem, kernel: str, rich: bool, aligned: bool) -> FusedTile:
        return FusedTile()

    def fold_columns(self, problem: Problem) -> int:
        return SLOT_COLUMNS if problem.routed is None else FINE_SLOT_COLUMNS

    def kl_partial_rows(self, direction: str) -> int:
        return 6 if direction == "jsd" else 11

    def routed_sizes(self, problem: Problem) -> RoutedSizes:
        return RoutedSizes(gradient_rows=128, step=128)
