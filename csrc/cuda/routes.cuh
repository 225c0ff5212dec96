// Kernels of the routing plan.
#pragma once
#include "routed_count.cuh"
#include "routes.h"

namespace isdaa {

constexpr int kMassThreads = 256, kRouteThreads = 512, kListThreads = 512;
constexpr int kKeptTokens = 12288;  // whose shares of a block a rule's block keeps in shared memory

// A thread a token. Grid: (ceil(T / kMassThreads), B).
__global__ void __launch_bounds__(kMassThreads) block_mass_kernel(const __grid_constant__ BlockMass p) {
  const int64_t i = (int64_t)blockIdx.x * kMassThreads + threadIdx.x, b = blockIdx.y;
  if (i >= p.T || p.first + i >= *p.count) return;
  const int64_t begin = b * p.slots, end = begin + p.slots < p.S ? begin + p.slots : p.S;
  float top = kLowest;
  for (int64_t slot = begin; slot < end; ++slot) top = larger(p.partial_max[slot * p.T + i], top);
  const float shift = top == kLowest ? 0.0f : top;
  double sum = 0.0;
  for (int64_t slot = begin; slot < end; ++slot) {
    const float below = p.partial_max[slot * p.T + i] - shift;
    sum += (double)(below == 0.0f ? 1.0f : expf(below)) * p.partial_sum[slot * p.T + i];
  }
  const int64_t n = p.rows[p.first + i];
  p.log_mass[b * p.N + n] = (float)(((double)shift - p.lse[n]) + (sum > 0.0 ? log(sum) : (double)kLowest));
}

// |coefficient| * mass of each live token in one block, 0 where the coefficient is 0.
struct Shares {
  const float *log_mass, *size;
  const int64_t* rows;
  float* kept;  // of the first kKeptTokens, by the thread that asks for them
  int live;

  __device__ __forceinline__ float make(int m) const {
    const float size_m = size[m];
    return size_m > 0.0f ? expf(log_mass[rows[m]]) * size_m : 0.0f;
  }
  __device__ __forceinline__ float operator()(int m) const { return m < kKeptTokens ? kept[m] : make(m); }
};

// The share of tokens whose number is above `threshold`, in every thread.
__device__ __forceinline__ double sum_above(const Shares& shares, float threshold, double* shared) {
  double sum = 0.0;
  for (int m = threadIdx.x; m < shares.live; m += kRouteThreads) {
    const float x = shares(m);
    sum += x > threshold ? (double)x : 0.0;
  }
  return block_sum<kRouteThreads>(sum, shared);
}

// The rules, one block of the vocabulary each. Sums are fp64, in one order. Grid: (B).
__global__ void __launch_bounds__(kRouteThreads) route_kernel(const __grid_constant__ Route p) {
  ISDAA_DYNAMIC_SHARED(kept);
  __shared__ double shared_sums[kRouteThreads / kWarp];
  __shared__ float shared_max[kRouteThreads / kWarp];
  const int64_t b = blockIdx.x;
  const Shares shares = {p.log_mass + b * p.N, p.size, p.rows, reinterpret_cast<float*>(kept), *p.count};
  for (int m = threadIdx.x; m < shares.live && m < kKeptTokens; m += kRouteThreads) shares.kept[m] = shares.make(m);

  float threshold = -kLowest;
  if (p.by_row) {
    float top = 0.0f;
    for (int m = threadIdx.x; m < shares.live; m += kRouteThreads) top = larger(shares(m), top);
    float high = block_max<kRouteThreads>(top, shared_max);
    const double wanted = p.rules[1] * sum_above(shares, kLowest, shared_sums);
    threshold = 0.0f;
    for (int step = 0; step < p.bisections; ++step) {
      const float middle = (threshold + high) * 0.5f;
      if (sum_above(shares, middle, shared_sums) >= wanted) threshold = middle;
      else high = middle;
    }
  }
  const float least = (float)p.rules[0];
  for (int64_t m = threadIdx.x; m < p.L; m += kRouteThreads) {
    const bool live = m < shares.live;
    const float x = live ? shares((int)m) : 0.0f;
    const bool target = live && p.target_block[m] == b;
    p.route[b * p.L + m] = x > least || target ? 2 : x > threshold ? 1 : 0;
  }
}

// One block of the vocabulary each. Grid: (blocks).
__global__ void __launch_bounds__(kListThreads) list_tokens_kernel(const __grid_constant__ ListTokens p) {
  __shared__ int shared[kListThreads / kWarp];
  const int64_t c = blockIdx.x, steps = (p.T + kListStep - 1) / kListStep;
  const uint8_t* route = p.route + (p.begin + c) * p.L + p.first;
  const int64_t here = p.T < p.L - p.first ? p.T : p.L - p.first;
  int32_t *list = p.lists + c * p.T, *places = p.places + c * p.T, *starts = p.starts + c * (steps + 1);

  int in_both = 0;
  for (int64_t i = threadIdx.x; i < here; i += kListThreads) in_both += route[i] == 2;
  in_both = block_sum<kListThreads>(in_both, shared);

  int place_both = 0, place_one = in_both;
  for (int64_t begin = 0; begin < p.T; begin += kListThreads) {
    const int64_t i = begin + threadIdx.x;
    const int kind = i < here ? route[i] : 0;
    int all_both, all_one;
    const int both = place_both + count_before<kListThreads>(kind == 2, shared, all_both);
    const int one = place_one + count_before<kListThreads>(kind == 1, shared, all_one);
    if (kind == 2) list[both] = (int32_t)i;
    if (kind == 1) list[one] = (int32_t)i;
    if (i < p.T) places[i] = kind == 2 ? both : -1;
    if (i < p.T && i % kListStep == 0) starts[i / kListStep] = both;
    place_both += all_both;
    place_one += all_one;
  }
  if (threadIdx.x == 0) {
    starts[steps] = place_both;
    p.counts[c] = place_one;
  }
}

}  // namespace isdaa
