#include "linear_kl_combine.cuh"

#include "host.h"

namespace isdaa {

void linear_kl_combine(const KlCombine& p, cudaStream_t stream) {
  const char* name = "linear_kl_combine";
  if (p.T) {
    expect_pointer(p.base_max, name, "base_max");
    expect_pointer(p.other_max, name, "other_max");
    expect_pointer(p.base_sum, name, "base_sum");
    expect_pointer(p.other_sum, name, "other_sum");
    expect_pointer(p.rows, name, "rows");
    expect_pointer(p.count, name, "count");
    expect_pointer(p.numbers, name, "numbers");
  }
  const bool all = p.gap_sum && p.excess_sum && p.linear_sum && p.apart_sum && p.divergence;
  expect(!p.center || all, name, "center", "none, or one beside gap_sum, excess_sum, linear_sum, apart_sum and divergence", 1);
  auto kernel = p.center ? linear_kl_combine_kernel<true> : linear_kl_combine_kernel<false>;
  launch(kernel, name, dim3(grid_x(ceil_div(p.T, kKlTokens), name)), kKlTokens * kKlParts, 0, stream, p);
}

void linear_kl_mixture_sum(const KlMixtureSum& p, cudaStream_t stream) {
  const char* name = "linear_kl_mixture_sum";
  if (p.T) {
    expect_pointer(p.policy_part, name, "policy_part");
    expect_pointer(p.reference_part, name, "reference_part");
    expect_pointer(p.mean_part, name, "mean_part");
    expect_pointer(p.rows, name, "rows");
    expect_pointer(p.count, name, "count");
    expect_pointer(p.divergence, name, "divergence");
    expect_pointer(p.numbers, name, "numbers");
  }
  launch(linear_kl_mixture_sum_kernel, name, dim3(grid_x(ceil_div(p.T, kKlTokens), name)), kKlTokens, 0, stream, p);
}

}  // namespace isdaa
