#include "linear_kl_gradient.cuh"

#include "host.h"

namespace isdaa {
namespace {

const char* kName = "linear_kl_gradient";

template <class Out>
void launch_out(const KlGradient& p, cudaStream_t stream) {
  const bool wide = rows_aligned(p.policy, p.stride_policy, 1, sizeof(float)) && rows_aligned(p.reference, p.stride_reference, 1, sizeof(float));
  const dim3 grid(grid_x(p.bias_sums ? ceil_div(p.T, kKlBiasRows) : p.T, kName));
  auto kernel = wide ? (p.bias_sums ? linear_kl_gradient_kernel<Out, true, true> : linear_kl_gradient_kernel<Out, true, false>)
                     : (p.bias_sums ? linear_kl_gradient_kernel<Out, false, true> : linear_kl_gradient_kernel<Out, false, false>);
  launch(kernel, kName, grid, kGradientThreads, 0, stream, p);
}

}  // namespace

void linear_kl_gradient(const KlGradient& p, cudaStream_t stream) {
  expect(p.end >= p.begin, kName, "end", "no less than begin", p.end);
  expect(!p.policy_bias || is_dtype(p.policy_bias_dtype), kName, "policy_bias_dtype", "0, 1 or 2", p.policy_bias_dtype);
  expect(!p.reference_bias || is_dtype(p.reference_bias_dtype), kName, "reference_bias_dtype", "0, 1 or 2", p.reference_bias_dtype);
  expect(p.direction == kKlForward || p.direction == kKlReverse || p.direction == kKlJsd, kName, "direction", "0, 1 or 2", p.direction);
  if (p.T) {
    expect_pointer(p.policy, kName, "policy");
    expect_pointer(p.reference, kName, "reference");
    expect_pointer(p.tokens, kName, "tokens");
    expect_pointer(p.rows, kName, "rows");
    expect_pointer(p.count, kName, "count");
    expect_pointer(p.numbers, kName, "numbers");
  }
  switch (p.out_dtype) {
    case kFloat32: return launch_out<float>(p, stream);
    case kFloat16: return launch_out<half>(p, stream);
    case kBfloat16: return launch_out<bf16>(p, stream);
    default: expect(false, kName, "out_dtype", "0, 1 or 2", p.out_dtype);
  }
}

}  // namespace isdaa
