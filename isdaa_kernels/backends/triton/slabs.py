"""What forward and backward share on the host: the live tokens found on the device, and one slab of them at a time in fixed buffers.

N tokens of the call, M that may be live (max_scored), T tokens of a slab, D hidden size, V vocabulary.
"""

from contextlib import nullcontext
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from isdaa_kernels.backends.triton.kernels.tokens import gather_kernel
from isdaa_kernels.backends.triton.plan import arch_of
from isdaa_kernels.backends.triton.tile_config import TileConfig, choose_tile_config
from isdaa_kernels.dispatch import Problem
from isdaa_kernels.lm_head import Transform

_GATHER_ROWS, _GATHER_COLUMNS = 16, 256  # of a program
OPTIONS = {"enable_fp_fusion": True}  # said outright: versions of Triton differ in their default


def on(device: torch.device):
    """Kernels are launched on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class LiveTokens:
    """Indices of the tokens of `mask_N` in their order, the first `capacity` of them, and their number, all on the device: no sync."""

    def __init__(self, mask_N: Tensor, capacity: int):
        position_N = mask_N.cumsum(0) - 1
        self.slot_N = torch.where(mask_N & (position_N < capacity), position_N, capacity)
        token_N = torch.arange(len(mask_N), device=mask_N.device)
        rows = torch.zeros(capacity + 1, dtype=torch.int64, device=mask_N.device)
        self.rows_M = rows.scatter_(0, self.slot_N, token_N)[:capacity]
        self.count = mask_N.sum().clamp(max=capacity).to(torch.int32).reshape(1)
        self.capacity = capacity

    def slabs(self, T: int) -> list[int]:
        return list(range(0, self.capacity, T))

    def spread(self, values_M: Tensor, others_N: Tensor) -> Tensor:
        """[N]: each live token's value, and what `others_N` says of the rest."""
        if self.capacity == 0:
            return others_N
        found_N = values_M.index_select(0, self.slot_N.clamp(max=self.capacity - 1))
        return torch.where(self.slot_N < self.capacity, found_N, others_N)


def clean_targets(targets_N: Tensor, V: int) -> Tensor:
    """int32 [N], -1 for whatever is no vocabulary row."""
    return torch.where((targets_N >= 0) & (targets_N < V), targets_N, -1).to(torch.int32)


class HiddenSlab:
    """Rows of hidden gathered into one aligned buffer, zeros past the last live token."""

    def __init__(self, hidden_ND: Tensor, live: LiveTokens, T: int, dtype: torch.dtype):
        self.hidden_ND, self.live = hidden_ND, live
        D = hidden_ND.shape[1]
        aligned = -(-D // 8) * 8
        self.buffer_TD = torch.empty(T, aligned, dtype=dtype, device=hidden_ND.device)[:, :D]

    def load(self, first: int, scale_T: Tensor | None = None) -> Tensor:
        T, D = self.buffer_TD.shape
        gather_kernel[(triton.cdiv(T, _GATHER_ROWS), triton.cdiv(D, _GATHER_COLUMNS))](
            self.hidden_ND, self.live.rows_M, self.live.count, scale_T, self.buffer_TD, first, T, D,
            *self.hidden_ND.stride(), self.buffer_TD.stride(0), SCALED=scale_T is not None, M=_GATHER_ROWS, K=_GATHER_COLUMNS,
            **OPTIONS,
        )  # fmt: skip
        return self.buffer_TD


class Head:
    """The head's transform as kernel arguments, and its per-token parts for a slab."""

    def __init__(self, transform: Transform):
        self.bias_V = None if transform.bias_V is None else transform.bias_V.contiguous()
        self.transform = transform
        self.scalars = {"logit_scale": float(transform.logit_scale), "softcap": float(transform.softcap or 1.0)}
        self.flags = {"HAS_BIAS": self.bias_V is not None, "HAS_SOFTCAP": transform.softcap is not None}

    def tile(self, problem: Problem, weight_VD: Tensor, kernel: str) -> TileConfig:
        kind = "rich" if any(self.flags.values()) else "plain"
        return choose_tile_config(problem, arch_of(problem), kernel, kind if rows_aligned(weight_VD) else "unaligned")

    def inverse_temperature(self, rows_T: Tensor) -> Tensor:
        inverse = self.transform.inverse_temperature(rows_T, torch.float32)
        if isinstance(inverse, float):
            return torch.full((len(rows_T),), inverse, dtype=torch.float32, device=rows_T.device)
        return inverse


def padded_rows(live: LiveTokens, first: int, T: int) -> Tensor:
    """Token indices [T] of a slab; past the end of the call some valid index stands."""
    rows_T = live.rows_M[first : first + T]
    return rows_T if len(rows_T) == T else torch.nn.functional.pad(rows_T, (0, T - len(rows_T)))


def rows_aligned(weight_VD: Tensor) -> bool:
    size = weight_VD.element_size()
    return weight_VD.stride(1) == 1 and weight_VD.stride(0) * size % 16 == 0 and weight_VD.data_ptr() % 16 == 0


def fused_arguments(tile: TileConfig, hidden_TD: Tensor, weight_VD: Tensor) -> dict:
    """Operands of a fused kernel, as descriptors where the tile wants them, and the tile's constants."""
    D = hidden_TD.shape[1]
    hidden, weight = hidden_TD, weight_VD
    if tile.tma:
        hidden = TensorDescriptor.from_tensor(hidden_TD, [tile.M, tile.K])
        weight = TensorDescriptor.from_tensor(weight_VD, [tile.N, tile.K])
    return {
        "hidden": hidden, "weight": weight, "D": D, "V": weight_VD.shape[0], "stride_hidden": hidden_TD.stride(0),
        "stride_weight_v": weight_VD.stride(0), "stride_weight_d": weight_VD.stride(1), "TMA": tile.tma,
        "EVEN_D": D % tile.K == 0, "EVEN_V": weight_VD.shape[0] % tile.N == 0, "PRECISION": "ieee",
        "M": tile.M, "N": tile.N, "K": tile.K, "GROUP": tile.group, "PIECES": tile.pieces, "FLATTEN": tile.flatten,
        "SPECIALIZE": tile.specialize, "num_warps": tile.num_warps, "num_stages": tile.num_stages, **OPTIONS,
    }  # fmt: skip


def programs(tile: TileConfig, tiles: int, device: torch.device) -> tuple[int]:
    return (max(1, min(tiles, multiprocessors(device) * tile.programs)),)
