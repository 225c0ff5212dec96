// What the host does before a launch: arguments checked, the matrices described to the tensor memory accelerator, the variant chosen.
#include "linear_logprob_hopper.h"

#include <algorithm>

#include "linear_logprob_hopper_tile.cuh"

namespace isdaa {
namespace hopper {

template <bool kRich>
void launch_forward(const Launched<LinearLogprobForwardHopper>& launched, dim3 grid, cudaStream_t stream);
template <bool kRich>
void launch_backward(const Launched<LinearLogprobBackwardHopper>& launched, dim3 grid, cudaStream_t stream);

namespace {

constexpr int64_t kMostRows = 0x7fffffff - kTileColumns;  // coordinates of tiles are int32

template <class Params>
void expect_operands(const Params& p, const char* name) {
  const auto expect_rows = [&](const void* rows, int64_t stride, const char* argument, const char* stride_argument) {
    expect_pointer(rows, name, argument);
    expect(reinterpret_cast<uintptr_t>(rows) % 16 == 0, name, argument, "an address of a multiple of 16 bytes",
           (int64_t)(reinterpret_cast<uintptr_t>(rows) % 16));
    expect(stride >= p.D && stride % 8 == 0 && stride < 1ll << 38, name, stride_argument, "no less than D, a multiple of 8", stride);
  };
  expect(p.dtype == kFloat16 || p.dtype == kBfloat16, name, "dtype", "1 or 2", p.dtype);
  expect(p.T >= 0 && p.T % kTileTokens == 0 && p.T <= kMostRows, name, "T", "a multiple of 128 below 2^31", p.T);
  expect(p.V >= 1 && p.V <= kMostRows, name, "V", "1 to 2^31", p.V);
  expect(p.D >= 1 && p.D <= kMostRows, name, "D", "1 to 2^31", p.D);
  expect_rows(p.hidden, p.stride_hidden, "hidden", "stride_hidden");
  expect_rows(p.weight, p.stride_weight, "weight", "stride_weight");
  expect(!p.bias || is_dtype(p.bias_dtype), name, "bias_dtype", "0, 1 or 2", p.bias_dtype);
  expect(p.softcap >= 0.0f, name, "softcap", "0 or more", (int64_t)p.softcap);
  expect(p.programs >= 1, name, "programs", "1 or more", p.programs);
  expect_pointer(p.targets, name, "targets");
  expect_pointer(p.count, name, "count");
}

template <class Params>
dim3 grid_of(const Params& p, int64_t columns, const char* name) {
  const int64_t tiles = p.T / kTileTokens * ceil_div(columns, kTileColumns);
  expect(tiles <= 0x7fffffff, name, "T", "no more than 2^31 tiles", p.T);
  return dim3((unsigned)std::min<int64_t>(tiles, p.programs));
}

template <class Params>
Launched<Params> launched_with(const Params& p) {
  return {tensor_map(p.hidden, p.dtype, p.T, p.D, p.stride_hidden, kTileTokens),
          tensor_map(p.weight, p.dtype, p.V, p.D, p.stride_weight, kTileColumns), p,
          {p.logit_scale, p.softcap, p.logit_scale / p.softcap}};
}

}  // namespace
}  // namespace hopper

void linear_logprob_forward_hopper(const LinearLogprobForwardHopper& p, cudaStream_t stream) {
  const char* name = "linear_logprob_forward";
  hopper::expect_operands(p, name);
  expect_pointer(p.inverse_temperature, name, "inverse_temperature");
  expect_pointer(p.partial_max, name, "partial_max");
  expect_pointer(p.partial_sum, name, "partial_sum");
  expect_pointer(p.target_logit, name, "target_logit");
  const dim3 grid = hopper::grid_of(p, p.V, name);
  if (grid.x == 0) return;
  const auto run = p.bias || p.softcap > 0.0f ? hopper::launch_forward<true> : hopper::launch_forward<false>;
  run(hopper::launched_with(p), grid, stream);
}

void linear_logprob_backward_hopper(const LinearLogprobBackwardHopper& p, cudaStream_t stream) {
  const char* name = "linear_logprob_backward";
  hopper::expect_operands(p, name);
  expect(p.begin >= 0 && p.begin <= p.end, name, "begin", "0 to end", p.begin);
  expect(p.end <= p.V, name, "end", "no more than V", p.end);
  expect(p.stride_out >= p.end - p.begin, name, "stride_out", "no less than end - begin", p.stride_out);
  expect_pointer(p.tokens, name, "tokens");
  expect_pointer(p.out, name, "out");
  const dim3 grid = hopper::grid_of(p, p.end - p.begin, name);
  if (grid.x == 0) return;
  const bool rich = p.bias || p.softcap > 0.0f || p.bias_sums;
  const auto run = rich ? hopper::launch_backward<true> : hopper::launch_backward<false>;
  run(hopper::launched_with(p), grid, stream);
}

}  // namespace isdaa
