// gradient_logits: a block walks its rows from left to right, so that a narrower gradient may be written over the logits it came from.
#pragma once
#include "any.cuh"
#include "head.cuh"
#include "vocabulary.h"

namespace isdaa {

constexpr int kGradientThreads = 256, kGradientCount = 8, kGradientStep = kGradientThreads * kGradientCount;

// kCount numbers of a row from column `begin` on, `outside` behind its end.
template <bool kWide, int kCount, class T>
__device__ __forceinline__ void load_row(const T* row, int64_t begin, int64_t end, int64_t stride, float outside, float (&x)[kCount]) {
  constexpr int kVector = 16 / sizeof(T) < kCount ? 16 / sizeof(T) : kCount;
  if (kWide && begin + kCount <= end) {
#pragma unroll
    for (int v = 0; v < kCount; v += kVector) load_wide<kVector>(row + begin + v, *reinterpret_cast<float(*)[kVector]>(x + v));
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = begin + k < end ? widen(row[(begin + k) * stride]) : outside;
}

template <bool kWide, int kCount, class T>
__device__ __forceinline__ void store_row(T* row, int64_t begin, int64_t end, int64_t stride, const float (&x)[kCount]) {
  constexpr int kVector = 16 / sizeof(T) < kCount ? 16 / sizeof(T) : kCount;
  if (kWide && begin + kCount <= end) {
#pragma unroll
    for (int v = 0; v < kCount; v += kVector) store_wide(row + begin + v, *reinterpret_cast<const float(*)[kVector]>(x + v));
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (begin + k < end) row[(begin + k) * stride] = narrow<T>(x[k]);
}

// Grid: a block for each row, or for each kBiasRows rows where their sums over tokens are wanted.
template <class In, class Out, bool kWide, bool kBiasSums>
__global__ void __launch_bounds__(kGradientThreads, 3) gradient_logits_kernel(const __grid_constant__ GradientLogits p) {
  constexpr int kRows = kBiasSums ? kBiasRows : 1;
  const int64_t columns = p.end - p.begin;
  const HeadNumbers head{p.logit_scale, p.softcap};
  for (int64_t step = 0; step < columns; step += kGradientStep) {
    const int64_t begin = step + threadIdx.x * kGradientCount;
    float bias_sum[kGradientCount] = {};
#pragma unroll 1
    for (int64_t row = (int64_t)blockIdx.x * kRows; row < p.T && row < ((int64_t)blockIdx.x + 1) * kRows; ++row) {
      const bool live = p.live[row];
      const GradientNumbers gradient(p.tokens, p.T, row);
      float x[kGradientCount], slope;
      if (live) load_row<kWide>(static_cast<const In*>(p.logits) + row * p.stride_n, begin, columns, p.stride_v, 0.0f, x);
      const int64_t target = p.targets[row] - p.begin - begin;
#pragma unroll
      for (int k = 0; k < kGradientCount; ++k) {
        const float bias = p.bias && begin + k < columns ? load_any(p.bias, p.bias_dtype, p.begin + begin + k) : 0.0f;
        const float z = live ? head(x[k] * gradient.unscale + bias, gradient.inverse_temperature, slope) : 0.0f;
        x[k] = live ? gradient(z) * slope : 0.0f;
        if (live && k == target) x[k] = p.target_entry ? p.tokens[kEntry * p.T + row] : 0.0f;
        if constexpr (kBiasSums) bias_sum[k] += x[k] * p.tokens[kScale * p.T + row];
      }
      __syncthreads();  // nobody writes where another still reads
      store_row<kWide>(static_cast<Out*>(p.out) + row * p.stride_out_n, begin, columns, p.stride_out_v, x);
    }
    if constexpr (kBiasSums) store_row<false>(p.bias_sums + blockIdx.x * columns, begin, columns, 1, bias_sum);
  }
}

}  // namespace isdaa
