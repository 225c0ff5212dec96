#include "linear_kl_gradient.cuh"

#include "host.h"

namespace isdaa {
namespace {

const char* kName = "linear_kl_gradient";

template <class Out, bool kLow, class Low = half>
void launch_out(const KlGradient& p, cudaStream_t stream) {
  const bool wide = rows_aligned(p.policy, p.stride_policy, 1, sizeof(float)) &&
                    rows_aligned(p.reference, p.stride_reference, 1, sizeof(float)) &&
                    rows_aligned(p.out, p.stride_out, 1, sizeof(Out)) && (!kLow || rows_aligned(p.low, p.stride_out, 1, sizeof(Low)));
  const dim3 grid(grid_x(p.bias_sums ? ceil_div(p.T, kKlBiasRows) : p.T, kName));
  auto kernel =
      wide ? (p.bias_sums ? linear_kl_gradient_kernel<Out, Low, kLow, true, true> : linear_kl_gradient_kernel<Out, Low, kLow, true, false>)
           : (p.bias_sums ? linear_kl_gradient_kernel<Out, Low, kLow, false, true> : linear_kl_gradient_kernel<Out, Low, kLow, false, false>);
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
    expect_pointer(p.live, kName, "live");
    expect_pointer(p.out, kName, "out");
  }
  expect(!p.low || p.out_dtype == kFloat16, kName, "low", "none beside a gradient that is not fp16", 1);
  if (p.out_dtype == kFloat32) return launch_out<float, false>(p, stream);
  expect(p.out_dtype == kFloat16, kName, "out_dtype", "0 or 1", p.out_dtype);
  if (!p.low) return launch_out<half, false>(p, stream);
  expect(p.low_dtype == kFloat16 || p.low_dtype == kBfloat16, kName, "low_dtype", "1 or 2", p.low_dtype);
  return p.low_dtype == kFloat16 ? launch_out<half, true>(p, stream) : launch_out<half, true, bf16>(p, stream);
}

}  // namespace isdaa
