#include "routed_weight.cuh"

#include "routed_host.h"

namespace isdaa {
namespace {

const char* kName = "routed_weight";

template <class T, int kRows>
void launch_tile(const RoutedWeight& p, cudaStream_t stream) {
  using Tile = WeightTile<T, kRows>;
  const dim3 grid(grid_x(ceil_div(p.D, Tile::N), kName), grid_y(ceil_div(p.R, p.block) * (p.block / kRows), kName));
  launch(routed_weight_kernel<T, kRows>, kName, grid, kProductThreads, shared_bytes<Tile>(), stream, p);
}

template <class T>
void launch_dtype(const RoutedWeight& p, cudaStream_t stream) {
  if (sizeof(T) == 4 || p.block == 64) launch_tile<T, 64>(p, stream);
  else launch_tile<T, sizeof(T) == 4 ? 64 : 128>(p, stream);
}

}  // namespace

void routed_weight(const RoutedWeight& p, cudaStream_t stream) {
  expect_pointer(p.g, kName, "g");
  expect_pointer(p.hidden, kName, "hidden");
  expect_pointer(p.lists, kName, "lists");
  expect_pointer(p.counts, kName, "counts");
  expect_pointer(p.sums, kName, "sums");
  check_chunk(kName, p.block, p.C, p.T);
  expect(p.skip >= 0 && p.skip * p.block < p.C, kName, "skip", "a block of the chunk", p.skip);
  expect(p.R > 0 && p.skip * p.block + p.R <= p.C, kName, "R", "1 up to the chunk's rows from block skip on", p.R);
  expect(p.D > 0 && p.D <= 0x7fffffff - 128, kName, "D", "1 to 2^31 - 129", p.D);
  check_stride(kName, "stride_hidden", p.stride_hidden);
  with_dtype(p.dtype, kName, "dtype", [&](auto number) { launch_dtype<decltype(number)>(p, stream); });
}

}  // namespace isdaa
