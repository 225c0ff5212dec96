// fold_logits: a slot of a row lives in the registers of a group of threads. One read, no second look.
#pragma once
#include "any.cuh"
#include "head.cuh"
#include "vocabulary.h"

namespace isdaa {

constexpr int kFoldThreads = 256;

// Sums over a group of kLanes threads, in every one of them: kLanes <= 32 within warps, kFoldThreads the block.
template <int kLanes, int kCount>
__device__ __forceinline__ void group_sums(float (&x)[kCount], float* shared) {
#pragma unroll
  for (int offset = (kLanes < kWarp ? kLanes : kWarp) / 2; offset; offset /= 2)
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] += __shfl_xor_sync(kAllLanes, x[k], offset);
  if constexpr (kLanes > kWarp) {
    if (lane_index() == 0)
      for (int k = 0; k < kCount; ++k) shared[warp_index() * kCount + k] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      x[k] = shared[k];
      for (int w = 1; w < kLanes / kWarp; ++w) x[k] += shared[w * kCount + k];
    }
  }
}

template <int kLanes>
__device__ __forceinline__ float group_max(float x, float* shared) {
#pragma unroll
  for (int offset = (kLanes < kWarp ? kLanes : kWarp) / 2; offset; offset /= 2)
    x = larger(__shfl_xor_sync(kAllLanes, x, offset), x);
  if constexpr (kLanes > kWarp) {
    if (lane_index() == 0) shared[warp_index()] = x;
    __syncthreads();
    x = shared[0];
    for (int w = 1; w < kLanes / kWarp; ++w) x = larger(shared[w], x);
  }
  return x;
}

// kLanes threads a slot, kCount numbers a thread: kVector neighbours, then kVector that lie kLanes * kVector further on, ...
// Grid: (T, slots of the chunk / slots of a block).
template <class T, int kLanes, int kCount, bool kWide, bool kStats>
__global__ void __launch_bounds__(kFoldThreads) fold_logits_kernel(const __grid_constant__ FoldLogits p) {
  constexpr int kVector = 16 / sizeof(T) < kCount ? 16 / sizeof(T) : kCount, kGroups = kFoldThreads / kLanes;
  __shared__ float shared_max[kFoldThreads / kWarp], shared_sums[5 * kFoldThreads / kWarp];
  const int lane = threadIdx.x % kLanes;
  const int64_t columns = p.end - p.begin, row = blockIdx.x, slot = (int64_t)blockIdx.y * kGroups + threadIdx.x / kLanes;
  const int64_t base = slot * (kLanes * kCount);
  const bool live = base < columns && p.first + row < *p.count;
  const int64_t source = live && p.rows ? p.rows[p.first + row] : row;
  const T* logits = static_cast<const T*>(p.logits) + (live ? source * p.stride_n : 0);
  const float inverse_temperature = live ? p.inverse_temperature[row] : 1.0f;
  const int64_t target = live ? p.targets[row] - p.begin - base : -1;

  float z[kCount];
  int column[kCount];  // within the slot
#pragma unroll
  for (int v = 0; v < kCount; v += kVector) {
    const int at = v * kLanes + lane * kVector;
    float x[kVector];
    if (kWide && live && base + at + kVector <= columns) {
      load_wide<kVector>(logits + base + at, x);
    } else {
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        x[k] = live && base + at + k < columns ? widen(logits[(base + at + k) * p.stride_v]) : kLowest;
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      z[v + k] = x[k];
      column[v + k] = at + k;
    }
  }
  const HeadNumbers head{p.logit_scale, p.softcap};
  float total = 0.0f, top = kLowest, slope;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const bool inside = live && base + column[k] < columns;
    const float bias = p.bias && inside ? load_any(p.bias, p.bias_dtype, p.begin + base + column[k]) : 0.0f;
    z[k] = inside ? head(z[k] + bias, inverse_temperature, slope) : kLowest;
    if (kStats && inside) total += z[k];
    top = larger(z[k], top);
    if (column[k] == target) p.target_logit[row] = z[k];
  }
  top = group_max<kLanes>(top, shared_max);
  const float shift = top == kLowest ? 0.0f : top;
  // Terms equal to 1 are counted apart: where the target has nearly all of the probability, 1 - p lives in the small terms, and beside a 1
  // they would lose their digits.
  float sums[kStats ? 5 : 2] = {};
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float d = z[k] - shift, e = expf(d);
    const bool one = d == 0.0f;
    sums[0] += one ? 0.0f : e;
    sums[1] += one ? 1.0f : 0.0f;
    if constexpr (kStats) {
      sums[2] += e * fminf(-d, 1e30f);
      sums[3] += e * e;
    }
  }
  if constexpr (kStats) sums[4] = total;
  group_sums<kLanes>(sums, shared_sums);
  if (!live || lane) return;
  const int64_t place = (p.begin / (kLanes * kCount) + slot) * p.T + row;
  p.partial_max[place] = top;
  p.partial_sum[place] = (double)sums[0] + (double)sums[1];
  if constexpr (kStats) {
    if (p.partial_entropy) p.partial_entropy[place] = sums[2];
    if (p.partial_squares) p.partial_squares[place] = sums[3];
    if (p.partial_total) p.partial_total[place] = sums[4];
  }
}

}  // namespace isdaa
