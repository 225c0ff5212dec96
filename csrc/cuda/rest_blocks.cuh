// Each block's mean distribution, and the mean of its rows under it.
#pragma once
#include "rest.h"

namespace isdaa {

constexpr int kMeanThreads = 128;

// A thread a row of the vocabulary. Grid: (blocks).
template <int kBlock>
__global__ void __launch_bounds__(kBlock) block_sums_kernel(const __grid_constant__ BlockSums p) {
  __shared__ float shared_sums[kBlock / kWarp];
  const int64_t b = blockIdx.x, c = b * kBlock + threadIdx.x;
  const bool inside = c < p.C;
  const int64_t tiles = (p.counts[b] + p.rows - 1) / p.rows;
  float mean = inside && !p.is_first ? p.mean[c] : 0.0f, bias = inside && p.bias && !p.is_first ? p.bias[c] : 0.0f;
  if (inside) {
#pragma unroll 4
    for (int64_t r = 0; r < tiles; ++r) mean += p.mean_sums[r * p.C + c];
    if (p.bias) {
#pragma unroll 4
      for (int64_t r = 0; r < tiles; ++r) bias += p.bias_sums[r * p.C + c];
    }
  }
  if (p.is_last) {
    const float total = block_sum<kBlock>(mean, shared_sums);
    const int64_t columns = p.C - b * kBlock < kBlock ? p.C - b * kBlock : kBlock;
    mean = total > 0.0f ? mean / total : 1.0f / (float)columns;
  }
  if (!inside) return;
  p.mean[c] = mean;
  if (p.bias) p.bias[c] = bias;
}

// kCount neighbouring columns a thread, or one with any stride. Grid: (blocks, stretches of D).
template <class T, int kCount>
__global__ void __launch_bounds__(kMeanThreads) block_mean_kernel(const __grid_constant__ BlockMean p) {
  const int64_t b = blockIdx.x, d = ((int64_t)blockIdx.y * kMeanThreads + threadIdx.x) * kCount;
  if (d >= p.D) return;
  const int64_t end = (b + 1) * p.block < p.C ? (b + 1) * p.block : p.C;
  const T* const weight = static_cast<const T*>(p.weight) + d * p.stride_weight_d;
  float sums[kCount] = {};
#pragma unroll 4
  for (int64_t c = b * p.block; c < end; ++c) {
    float row[kCount];
    load_wide<kCount>(weight + c * p.stride_weight_v, row);
    const float mean = p.mean[c];
#pragma unroll
    for (int e = 0; e < kCount; ++e) sums[e] += row[e] * mean;
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) p.out[b * p.D + d + e] = sums[e];
}

}  // namespace isdaa
