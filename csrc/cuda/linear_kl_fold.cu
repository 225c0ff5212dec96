#include "linear_kl_fold.cuh"

#include "host.h"

namespace isdaa {
namespace {

void check_chunk(const char* kernel, int64_t begin, int64_t end) {
  expect(begin % kKlColumns == 0, kernel, "begin", "the beginning of a slot", begin);
  expect(end >= begin, kernel, "end", "no less than begin", end);
}

void check_bias(const char* kernel, const char* argument, const void* bias, int32_t dtype) {
  expect(!bias || is_dtype(dtype), kernel, argument, "0, 1 or 2", dtype);
}

dim3 slot_grid(const char* kernel, int64_t T, int64_t begin, int64_t end) {
  return dim3(grid_x(T, kernel), grid_y(ceil_div(end - begin, kKlColumns), kernel));
}

bool wide(const void* a, int64_t stride_a, const void* b, int64_t stride_b) {
  return rows_aligned(a, stride_a, 1, sizeof(float)) && rows_aligned(b, stride_b, 1, sizeof(float));
}

}  // namespace

void linear_kl_fold(const KlFold& p, cudaStream_t stream) {
  const char* name = "linear_kl_fold";
  check_chunk(name, p.begin, p.end);
  check_bias(name, "base_bias_dtype", p.base_bias, p.base_bias_dtype);
  check_bias(name, "other_bias_dtype", p.other_bias, p.other_bias_dtype);
  if (p.T) {
    expect_pointer(p.base, name, "base");
    expect_pointer(p.other, name, "other");
    expect_pointer(p.inverse_temperature, name, "inverse_temperature");
    expect_pointer(p.count, name, "count");
    expect_pointer(p.partial, name, "partial");
  }
  expect(!p.targets || (p.base_target && p.other_target), name, "targets", "none, or some beside base_target and other_target", 1);
  auto kernel = wide(p.base, p.stride_base, p.other, p.stride_other)
                    ? (p.divergence ? linear_kl_fold_kernel<true, true> : linear_kl_fold_kernel<true, false>)
                    : (p.divergence ? linear_kl_fold_kernel<false, true> : linear_kl_fold_kernel<false, false>);
  launch(kernel, name, slot_grid(name, p.T, p.begin, p.end), kKlThreads, 0, stream, p);
}

void linear_kl_mixture(const KlMixture& p, cudaStream_t stream) {
  const char* name = "linear_kl_mixture";
  check_chunk(name, p.begin, p.end);
  check_bias(name, "policy_bias_dtype", p.policy_bias, p.policy_bias_dtype);
  check_bias(name, "reference_bias_dtype", p.reference_bias, p.reference_bias_dtype);
  if (p.T) {
    expect_pointer(p.policy, name, "policy");
    expect_pointer(p.reference, name, "reference");
    expect_pointer(p.tokens, name, "tokens");
    expect_pointer(p.count, name, "count");
    expect_pointer(p.partial, name, "partial");
  }
  auto kernel = wide(p.policy, p.stride_policy, p.reference, p.stride_reference) ? linear_kl_mixture_kernel<true> : linear_kl_mixture_kernel<false>;
  launch(kernel, name, slot_grid(name, p.T, p.begin, p.end), kKlThreads, 0, stream, p);
}

}  // namespace isdaa
