#include "routed_gradient.cuh"

#include "routed_host.h"

namespace isdaa {
namespace {

const char* kName = "routed_gradient";

template <class T, int kColumns>
void launch_tile(const RoutedGradient& p, cudaStream_t stream) {
  const int64_t tiles = p.blocks * ceil_div(p.T, kGradientRows) * (p.block / kColumns);
  const dim3 grid(grid_x(tiles < p.programs ? tiles : p.programs, kName));
  launch(routed_gradient_kernel<T, kColumns>, kName, grid, kProductThreads, gradient_shared_bytes<T, kColumns>(), stream, p);
}

template <class T>
void launch_dtype(const RoutedGradient& p, cudaStream_t stream) {
  if (sizeof(T) == 4 || p.block == 64) launch_tile<T, 64>(p, stream);
  else launch_tile<T, sizeof(T) == 4 ? 64 : 128>(p, stream);
}

}  // namespace

void routed_gradient(const RoutedGradient& p, cudaStream_t stream) {
  expect_pointer(p.hidden, kName, "hidden");
  expect_pointer(p.weight, kName, "weight");
  expect_pointer(p.targets, kName, "targets");
  expect_pointer(p.tokens, kName, "tokens");
  expect_pointer(p.log_mass, kName, "log_mass");
  expect_pointer(p.rows, kName, "rows");
  expect_pointer(p.lists, kName, "lists");
  expect_pointer(p.counts, kName, "counts");
  expect_pointer(p.ends, kName, "ends");
  expect_pointer(p.out, kName, "out");
  expect_pointer(p.mean_sums, kName, "mean_sums");
  expect(!p.bias || is_dtype(p.bias_dtype), kName, "bias_dtype", "0, 1 or 2", p.bias_dtype);
  check_chunk(kName, p.block, p.C, p.T);
  expect(p.D > 0 && p.D <= 0x7fffffff - 128, kName, "D", "1 to 2^31 - 129", p.D);
  expect(p.blocks == ceil_div(p.C, p.block), kName, "blocks", "those of the chunk", p.blocks);
  expect(p.begin >= 0 && p.begin % p.block == 0 && p.begin <= 0x7fffffff, kName, "begin", "the beginning of a block", p.begin);
  check_stride(kName, "stride_hidden", p.stride_hidden);
  check_stride(kName, "stride_weight_v", p.stride_weight_v);
  check_stride(kName, "stride_weight_d", p.stride_weight_d);
  expect(p.programs > 0, kName, "programs", "at least 1", p.programs);
  with_dtype(p.dtype, kName, "dtype", [&](auto number) { launch_dtype<decltype(number)>(p, stream); });
}

}  // namespace isdaa
