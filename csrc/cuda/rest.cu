#include "rest.cuh"

#include "rest_blocks.cuh"
#include "routed_host.h"

namespace isdaa {
namespace {

constexpr int kNarrowColumns = 8;

template <class Params>
void check_rest(const char* name, const Params& p) {
  expect_pointer(p.route, name, "route");
  expect_pointer(p.log_mass, name, "log_mass");
  expect_pointer(p.rows, name, "rows");
  expect_pointer(p.count, name, "count");
  expect_pointer(p.tokens, name, "tokens");
  expect_pointer(p.sums, name, "sums");
  expect(p.T > 0 && p.T <= 0x7fffffff - kRestRows, name, "T", "1 to 2^31 - 65", p.T);
  expect(p.D > 0 && p.D <= 0x7fffffff - 128, name, "D", "1 to 2^31 - 129", p.D);
}

template <class T>
void launch_mean(const BlockMean& p, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const char* name = "block_mean";
  const bool wide = p.stride_weight_d == 1 && p.stride_weight_v % kWide == 0 && p.D % kWide == 0 &&
                    reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  const dim3 grid(grid_x(ceil_div(p.C, p.block), name), grid_y(ceil_div(p.D, kMeanThreads * (wide ? kWide : 1)), name));
  launch(wide ? block_mean_kernel<T, kWide> : block_mean_kernel<T, 1>, name, grid, kMeanThreads, 0, stream, p);
}

}  // namespace

void rest_weight(const RestWeight& p, cudaStream_t stream) {
  const char* name = "rest_weight";
  check_rest(name, p);
  expect_pointer(p.hidden, name, "hidden");
  expect_pointer(p.poison, name, "poison");
  check_stride(name, "stride_hidden", p.stride_hidden);
  if (p.hidden_dtype == kFloat32 && p.D <= kNarrowColumns) {
    const dim3 grid(grid_x(p.B, name), (unsigned)p.D);
    return launch(rest_weight_narrow_kernel, name, grid, kProductThreads, 0, stream, p);
  }
  with_dtype(p.hidden_dtype, name, "hidden_dtype", [&](auto number) {
    using T = decltype(number);
    using Tile = RestWeightTile<T>;
    const dim3 grid(grid_x(ceil_div(p.D, Tile::N), name), grid_y(ceil_div(p.B, kRestRows), name));
    launch(rest_weight_kernel<T>, name, grid, kProductThreads, shared_bytes<Tile>(kHalves<T>, 1), stream, p);
  });
}

void rest_hidden(const RestHidden& p, cudaStream_t stream) {
  const char* name = "rest_hidden";
  check_rest(name, p);
  expect_pointer(p.mean, name, "mean");
  with_dtype(p.dtype, name, "dtype", [&](auto number) {
    using T = decltype(number);
    using Tile = RestHiddenTile<T>;
    const dim3 grid(grid_x(ceil_div(p.D, Tile::N), name), grid_y(ceil_div(p.T, kRestRows), name));
    launch(rest_hidden_kernel<T>, name, grid, kProductThreads, shared_bytes<Tile>(kHalves<T>, kHalves<T>), stream, p);
  });
}

void block_sums(const BlockSums& p, cudaStream_t stream) {
  const char* name = "block_sums";
  expect_pointer(p.mean_sums, name, "mean_sums");
  expect_pointer(p.counts, name, "counts");
  expect_pointer(p.mean, name, "mean");
  if (p.bias) expect_pointer(p.bias_sums, name, "bias_sums");
  check_block(name, p.block);
  expect(p.rows > 0, name, "rows", "at least 1", p.rows);
  const auto kernel = p.block == 64 ? block_sums_kernel<64> : p.block == 128 ? block_sums_kernel<128> : block_sums_kernel<256>;
  launch(kernel, name, dim3(grid_x(ceil_div(p.C, p.block), name)), (int)p.block, 0, stream, p);
}

void block_mean(const BlockMean& p, cudaStream_t stream) {
  const char* name = "block_mean";
  expect_pointer(p.weight, name, "weight");
  expect_pointer(p.mean, name, "mean");
  expect_pointer(p.out, name, "out");
  check_block(name, p.block);
  with_dtype(p.weight_dtype, name, "weight_dtype", [&](auto number) { launch_mean<decltype(number)>(p, stream); });
}

}  // namespace isdaa
