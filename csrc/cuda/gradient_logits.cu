#include "gradient_logits.cuh"

#include "host.h"

namespace isdaa {
namespace {

const char* kName = "gradient_logits";

template <class In, class Out>
void launch_types(const GradientLogits& p, cudaStream_t stream) {
  const bool wide = rows_aligned(p.logits, p.stride_n, p.stride_v, sizeof(In)) &&
                    rows_aligned(p.out, p.stride_out_n, p.stride_out_v, sizeof(Out));
  const dim3 grid(grid_x(p.bias_sums ? ceil_div(p.T, kBiasRows) : p.T, kName));
  auto kernel = wide ? (p.bias_sums ? gradient_logits_kernel<In, Out, true, true> : gradient_logits_kernel<In, Out, true, false>)
                     : (p.bias_sums ? gradient_logits_kernel<In, Out, false, true> : gradient_logits_kernel<In, Out, false, false>);
  launch(kernel, kName, grid, kGradientThreads, 0, stream, p);
}

}  // namespace

void gradient_logits(const GradientLogits& p, cudaStream_t stream) {
  expect(p.end >= p.begin, kName, "end", "no less than begin", p.end);
  expect(!p.bias || is_dtype(p.bias_dtype), kName, "bias_dtype", "0, 1 or 2", p.bias_dtype);
  expect_pointer(p.targets, kName, "targets");
  expect_pointer(p.tokens, kName, "tokens");
  expect_pointer(p.live, kName, "live");
  expect(is_dtype(p.logits_dtype), kName, "logits_dtype", "0, 1 or 2", p.logits_dtype);
  expect(is_dtype(p.out_dtype), kName, "out_dtype", "0, 1 or 2", p.out_dtype);
  expect(p.logits_dtype == kFloat32 || p.out_dtype == p.logits_dtype, kName, "out_dtype", "that of 16-bit logits", p.out_dtype);
  if (p.logits_dtype == kFloat16) return launch_types<half, half>(p, stream);
  if (p.logits_dtype == kBfloat16) return launch_types<bf16, bf16>(p, stream);
  if (p.out_dtype == kFloat16) return launch_types<float, half>(p, stream);
  if (p.out_dtype == kBfloat16) return launch_types<float, bf16>(p, stream);
  launch_types<float, float>(p, stream);
}

}  // namespace isdaa
