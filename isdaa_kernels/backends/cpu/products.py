"""Matrix products of the CPU backend, on the C++ kernels of csrc/cpu/product_kernels.h. The right factor is copied once into panels and
then multiplied many times; rows of the left factor and of the result stand where index vectors say: nothing is gathered or scattered.

An element of a result is summed in the same order whatever stands beside it and however many threads work: the log-prob of a token does
not depend on its batch, and a logit that is computed again has the same bits.
R rows, J columns of a result, K the inner dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isdaa_kernels.backends.cpu.extension import address, kernel

WIDEST_PANEL = 64  # of all instruction sets, in columns


@dataclass(frozen=True)
class Panels:
    """[K, J] in panels."""

    numbers: Tensor
    width: int
    K: int
    J: int

    def used(self) -> Tensor:
        """Without the room behind the last panel."""
        return self.numbers[: -(-self.J // self.width) * self.width * self.K]


class PanelBuffer:
    """Room for a right factor of up to [K, J]. The panels made last are the only ones that are valid."""

    def __init__(self, K: int, J: int, dtype: torch.dtype):
        self.width = kernel("panel_width", dtype)()
        self.numbers = torch.empty(-(-J // self.width) * self.width * K, dtype=dtype)

    def of_rows(self, matrix: Tensor, rows_K: Tensor | None = None, scale_K: Tensor | None = None) -> Panels:
        """matrix[rows] * scale, [K, J]."""
        return self._pack(matrix, rows_K, scale_K, transposed=False)

    def of_columns(self, matrix: Tensor, rows_J: Tensor | None = None) -> Panels:
        """matrix[rows].T, [K, J]."""
        return self._pack(matrix, rows_J, None, transposed=True)

    def _pack(self, matrix: Tensor, rows: Tensor | None, scale: Tensor | None, transposed: bool) -> Panels:
        _check_rows(rows)
        count, columns = len(matrix) if rows is None else len(rows), matrix.shape[1]
        kernel("pack_panels", self.numbers.dtype)(
            threads=torch.get_num_threads(),
            values=matrix.data_ptr(),
            row=address(rows),
            stride=matrix.stride(0),
            rows=count,
            columns=columns,
            scale=address(scale),
            transposed=transposed,
            panels=self.numbers.data_ptr(),
        )
        return Panels(self.numbers, self.width, *((columns, count) if transposed else (count, columns)))


def multiply(
    left: Tensor,
    panels: Panels,
    out: Tensor,
    *,
    add: bool = False,
    left_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
    left_transposed: bool = False,
) -> Tensor:
    """out[out_rows] (+)= left[left_rows] @ panels, or left.T @ panels. Columns of left and out stand side by side; no row comes twice in
    out_rows."""
    _check_rows(left_rows)
    _check_rows(out_rows)
    rows = left.shape[1] if left_transposed else len(left) if left_rows is None else len(left_rows)
    kernel("multiply_panels", left.dtype)(
        threads=torch.get_num_threads(),
        left=left.data_ptr(),
        left_row=address(left_rows),
        left_stride=left.stride(0),
        left_transposed=left_transposed,
        panels=panels.numbers.data_ptr(),
        rows=rows,
        inner=panels.K,
        columns=panels.J,
        out=out.data_ptr(),
        out_row=address(out_rows),
        out_stride=out.stride(0),
        add=add,
    )
    return out


def _check_rows(rows: Tensor | None) -> None:
    assert rows is None or (rows.dtype == torch.int64 and rows.is_contiguous())


def panel_numbers(K: int, J: int) -> int:
    """The most that a `PanelBuffer` holds, whatever the instruction set."""
    return -(-J // WIDEST_PANEL) * WIDEST_PANEL * K
