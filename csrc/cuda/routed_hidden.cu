#include "routed_hidden.cuh"

#include "routed_host.h"

namespace isdaa {
namespace {

const char* kName = "routed_hidden";

template <class T>
void launch_dtype(const RoutedHidden& p, cudaStream_t stream) {
  const int64_t steps = ceil_div(p.T, kListStep), columns = ceil_div(p.D, kTileColumns<T>);
  const dim3 dense(grid_x(columns, kName), grid_y(steps, kName));
  const dim3 listed(grid_x(columns, kName), grid_y(ceil_div(steps, span_length<T>(p)), kName));
  launch(routed_hidden_dense_kernel<T>, kName, dense, kProductThreads, shared_bytes<DenseTile<T>>(), stream, p);
  launch(routed_hidden_listed_kernel<T>, kName, listed, kProductThreads, shared_bytes<ListedTile<T>>(), stream, p);
}

}  // namespace

void routed_hidden(const RoutedHidden& p, cudaStream_t stream) {
  expect_pointer(p.g, kName, "g");
  expect_pointer(p.weight, kName, "weight");
  expect_pointer(p.count, kName, "count");
  expect_pointer(p.lists, kName, "lists");
  expect_pointer(p.places, kName, "places");
  expect_pointer(p.starts, kName, "starts");
  expect_pointer(p.sums, kName, "sums");
  check_chunk(kName, p.block, p.C, p.T);
  expect(p.blocks == ceil_div(p.C, p.block), kName, "blocks", "those of the chunk", p.blocks);
  expect(p.D > 0 && p.D <= 0x7fffffff - 128, kName, "D", "1 to 2^31 - 129", p.D);
  check_stride(kName, "stride_weight_v", p.stride_weight_v);
  check_stride(kName, "stride_weight_d", p.stride_weight_d);
  expect(p.step == kListStep, kName, "step", "128", p.step);
  expect(p.programs > 0, kName, "programs", "at least 1", p.programs);
  with_dtype(p.dtype, kName, "dtype", [&](auto number) { launch_dtype<decltype(number)>(p, stream); });
}

}  // namespace isdaa
