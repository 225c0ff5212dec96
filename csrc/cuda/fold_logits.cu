#include "fold_logits.cuh"

#include "host.h"

namespace isdaa {
namespace {

const char* kName = "fold_logits";

template <class T, int kLanes, int kCount>
void launch_slots(const FoldLogits& p, cudaStream_t stream) {
  const int64_t slots = ceil_div(p.end - p.begin, kLanes * kCount);
  const dim3 grid(grid_x(p.T, kName), grid_y(ceil_div(slots, kFoldThreads / kLanes), kName));
  const bool wide = rows_aligned(p.logits, p.stride_n, p.stride_v, sizeof(T));
  const bool stats = p.partial_entropy || p.partial_total || p.partial_squares;
  auto kernel = wide ? (stats ? fold_logits_kernel<T, kLanes, kCount, true, true> : fold_logits_kernel<T, kLanes, kCount, true, false>)
                     : (stats ? fold_logits_kernel<T, kLanes, kCount, false, true> : fold_logits_kernel<T, kLanes, kCount, false, false>);
  launch(kernel, kName, grid, kFoldThreads, 0, stream, p);
}

template <class T>
void launch_dtype(const FoldLogits& p, cudaStream_t stream) {
  if (p.slot_columns == kSlotColumns) launch_slots<T, kFoldThreads, kSlotColumns / kFoldThreads>(p, stream);
  else launch_slots<T, 16, kFineSlotColumns / 16>(p, stream);
}

}  // namespace

void fold_logits(const FoldLogits& p, cudaStream_t stream) {
  expect(p.slot_columns == kSlotColumns || p.slot_columns == kFineSlotColumns, kName, "slot_columns", "2048 or 64", p.slot_columns);
  expect(p.begin % p.slot_columns == 0, kName, "begin", "the beginning of a slot", p.begin);
  expect(p.end >= p.begin, kName, "end", "no less than begin", p.end);
  expect(!p.bias || is_dtype(p.bias_dtype), kName, "bias_dtype", "0, 1 or 2", p.bias_dtype);
  expect_pointer(p.count, kName, "count");
  expect_pointer(p.targets, kName, "targets");
  expect_pointer(p.inverse_temperature, kName, "inverse_temperature");
  expect_pointer(p.partial_max, kName, "partial_max");
  expect_pointer(p.partial_sum, kName, "partial_sum");
  expect_pointer(p.target_logit, kName, "target_logit");
  switch (p.logits_dtype) {
    case kFloat32: return launch_dtype<float>(p, stream);
    case kFloat16: return launch_dtype<half>(p, stream);
    case kBfloat16: return launch_dtype<bf16>(p, stream);
    default: expect(false, kName, "logits_dtype", "0, 1 or 2", p.logits_dtype);
  }
}

}  // namespace isdaa
