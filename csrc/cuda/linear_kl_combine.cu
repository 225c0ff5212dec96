#include "linear_kl_combine.cuh"

#include "host.h"

namespace isdaa {

void linear_kl_combine(const KlCombine& p, cudaStream_t stream) {
  const char* name = "linear_kl_combine";
  if (p.T) {
    expect_pointer(p.partial, name, "partial");
    expect_pointer(p.rows, name, "rows");
    expect_pointer(p.count, name, "count");
    expect_pointer(p.numbers, name, "numbers");
  }
  const bool all = p.base_target && p.other_target && p.base_logprob && p.other_logprob;
  expect(!p.targets || all, name, "targets", "none, or some beside base_target, other_target, base_logprob and other_logprob", 1);
  auto kernel = p.divergence ? linear_kl_combine_kernel<true> : linear_kl_combine_kernel<false>;
  launch(kernel, name, dim3(grid_x(ceil_div(p.T, kKlTokens), name)), kKlTokens * kKlParts, 0, stream, p);
}

void linear_kl_mixture_sum(const KlMixtureSum& p, cudaStream_t stream) {
  const char* name = "linear_kl_mixture_sum";
  if (p.T) {
    expect_pointer(p.partial, name, "partial");
    expect_pointer(p.rows, name, "rows");
    expect_pointer(p.count, name, "count");
    expect_pointer(p.divergence, name, "divergence");
    expect_pointer(p.numbers, name, "numbers");
  }
  launch(linear_kl_mixture_sum_kernel, name, dim3(grid_x(ceil_div(p.T, kKlTokens), name)), kKlTokens, 0, stream, p);
}

}  // namespace isdaa
