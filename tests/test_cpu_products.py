"""Matrix products of the CPU backend against fp64, on each instruction set of the processor."""

import pytest
import torch

from isdaa_kernels.backends.cpu import extension
from isdaa_kernels.backends.cpu.products import PanelBuffer, multiply, panel_numbers

SHAPES = [(1, 1, 1), (7, 33, 19), (13, 700, 130), (100, 1500, 70), (6, 96, 64)]  # R, K, J


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    best = extension.native.instruction_set()
    try:
        extension.native.use_instruction_set(request.param)
    except ValueError as error:
        assert f"got {request.param}" in str(error)  # noqa: PT017 - this processor has none: its best stands in for it
    yield
    extension.native.use_instruction_set(best)


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """With more columns in memory than are meant."""
    return torch.randn(shape[0], shape[1] + 3, dtype=torch.float64)[:, : shape[1]].to(dtype)


def _tolerance(inner: int, dtype: torch.dtype) -> float:
    return (inner + 8) * torch.finfo(dtype).eps


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("R", "K", "J"), SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_rows_that_stand_anywhere(R, K, J, dtype, add):
    torch.manual_seed(R)
    left, right, out = _random(R + 5, K, dtype=dtype), _random(J + 4, K, dtype=dtype), _random(R + 2, J, dtype=dtype)
    left_rows, right_rows, out_rows = (torch.randperm(n)[:m] for n, m in ((R + 5, R), (J + 4, J), (R + 2, R)))
    want = out.double()
    want[out_rows] = want[out_rows] * add + left.double()[left_rows] @ right.double()[right_rows].T
    panels = PanelBuffer(K, J, dtype).of_columns(right, right_rows)
    multiply(left, panels, out, add=add, left_rows=left_rows, out_rows=out_rows)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=_tolerance(K, dtype))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("R", "K", "J"), SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_a_left_factor_that_comes_by_columns(R, K, J, dtype, add):
    torch.manual_seed(K)
    left, right, out = _random(K, R, dtype=dtype), _random(K + 5, J, dtype=dtype), _random(R, J, dtype=dtype)
    rows, scale = torch.randperm(K + 5)[:K], torch.rand(K, dtype=dtype)
    want = out.double() * add + left.double().T @ (right.double()[rows] * scale.double()[:, None])
    panels = PanelBuffer(K, J, dtype).of_rows(right, rows, scale)
    multiply(left, panels, out, add=add, left_transposed=True)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=_tolerance(K, dtype))


def test_bits_depend_on_neither_neighbours_nor_threads():
    torch.manual_seed(0)
    left, right = torch.randn(200, 700), torch.randn(300, 700)
    panels = PanelBuffer(700, 300, torch.float32).of_columns(right)
    whole = multiply(left, panels, torch.empty(200, 300))
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for start, stop in ((0, 1), (17, 36), (5, 200)):
            part = multiply(left[start:stop], panels, torch.empty(stop - start, 300))
            assert torch.equal(part, whole[start:stop])
    torch.set_num_threads(threads)


def test_not_a_number_stays_in_its_row_and_column():
    left, right = torch.randn(9, 40), torch.randn(20, 40)
    left[4, 3], right[11, 5] = float("nan"), float("inf")
    out = multiply(left, PanelBuffer(40, 20, torch.float32).of_columns(right), torch.empty(9, 20))
    bad = torch.zeros(9, 20, dtype=torch.bool)
    bad[4], bad[:, 11] = True, True
    assert torch.equal(~out.isfinite(), bad)


def test_an_empty_inner_dimension_gives_zeros():
    panels = PanelBuffer(0, 5, torch.float32).of_rows(torch.empty(0, 5))
    out = multiply(torch.empty(0, 7), panels, torch.full((7, 5), float("nan")), left_transposed=True)
    assert torch.equal(out, torch.zeros(7, 5))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("K", "J"), [(1, 1), (576, 128), (10, 65)])
def test_the_room_that_the_planner_counts(K, J):
    assert K * J <= PanelBuffer(K, J, torch.float32).numbers.numel() <= panel_numbers(K, J)
