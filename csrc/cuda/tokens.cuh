#pragma once
#include "any.cuh"
#include "head.cuh"
#include "tokens.h"

namespace isdaa {

constexpr int kRowThreads = 256, kRowCount = 4;  // numbers of a row that a thread has under way at once
constexpr int kTokenThreads = 128;
constexpr int kCombineTokens = kWarp, kCombineParts = 8;  // parts: threads that share the slots of a token

// 2^exponent for -1022 <= exponent <= 1023, exact
__device__ __forceinline__ double power_of_two(int exponent) { return __longlong_as_double((long long)(exponent + 1023) << 52); }

// x * 2^exponent in two steps: the power itself may be no fp32 number.
__device__ __forceinline__ float scale_by_power(float x, int exponent) {
  const int half = exponent >> 1;
  return x * (float)power_of_two(half) * (float)power_of_two(exponent - half);
}

// floor(log2 x) of positive finite numbers; of 0 it is -150.
__device__ __forceinline__ int exponent_of(float x) {
  if (x == 0.0f) return -150;
  const int raised = x < 1.0f ? 32 : 0;  // no number stays subnormal
  return ((__float_as_int(x * (raised ? 4294967296.0f : 1.0f)) >> 23) & 0xff) - 127 - raised;
}

// Grid: (T, columns of D)
__global__ void __launch_bounds__(kRowThreads) gather_kernel(const __grid_constant__ Gather p) {
  const int64_t i = blockIdx.x;
  const bool live = p.first + i < *p.count;
  const int64_t source = live ? p.rows[p.first + i] * p.stride_n : 0;
  const float scale = live && p.scale ? p.scale[i] : 1.0f;
  const int64_t begin = (int64_t)blockIdx.y * kRowThreads * kRowCount + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kRowCount; ++k) {
    const int64_t d = begin + k * kRowThreads;
    if (d < p.D) store_any(p.out, p.out_dtype, i * p.stride_out + d,
                           live ? load_any(p.source, p.source_dtype, source + d * p.stride_d) * scale : 0.0f);
  }
}

// What a thread knows of its part of a token's slots.
struct CombineSums {
  double exponentials, entropy, total, squares;
};

// Grid: (ceil(T / kCombineTokens)). A warp reads neighbouring tokens of one slot.
__global__ void __launch_bounds__(kCombineTokens* kCombineParts) combine_kernel(const __grid_constant__ Combine p) {
  __shared__ float shared_max[kCombineParts][kCombineTokens];
  __shared__ CombineSums shared_sums[kCombineParts][kCombineTokens];
  const int lane = lane_index(), part = warp_index();
  const int64_t i = (int64_t)blockIdx.x * kCombineTokens + lane;
  const bool live = i < p.T && p.first + i < *p.count;
  float top = kLowest;
  if (live)
    for (int64_t s = part; s < p.S; s += kCombineParts) top = larger(p.partial_max[s * p.T + i], top);
  shared_max[part][lane] = top;
  __syncthreads();
  for (int q = 0; q < kCombineParts; ++q) top = larger(shared_max[q][lane], top);
  const float shift = top == kLowest ? 0.0f : top;
  CombineSums sums{};
  if (live) {
    for (int64_t s = part; s < p.S; s += kCombineParts) {
      const int64_t at = s * p.T + i;
      const float below = p.partial_max[at] - shift;
      const double factor = below == 0.0f ? 1.0 : (double)expf(below), sum = p.partial_sum[at];
      sums.exponentials += factor * sum;
      if (p.partial_entropy)
        sums.entropy += factor * ((double)p.partial_entropy[at] + (below == kLowest ? 0.0 : -(double)below) * sum);
      if (p.partial_total) sums.total += (double)p.partial_total[at];
      if (p.partial_squares) sums.squares += factor * factor * (double)p.partial_squares[at];
    }
  }
  shared_sums[part][lane] = sums;
  __syncthreads();
  if (!live || part) return;
  for (int q = 1; q < kCombineParts; ++q) {
    sums.exponentials += shared_sums[q][lane].exponentials;
    sums.entropy += shared_sums[q][lane].entropy;
    sums.total += shared_sums[q][lane].total;
    sums.squares += shared_sums[q][lane].squares;
  }
  const int32_t target = p.targets[i];
  const double invalid = target >= 0 && target < p.V ? 0.0 : (double)__builtin_nanf("");
  const double log_sum = log(sums.exponentials) + invalid, lse = (double)shift + log_sum;
  const float target_logit = p.target_logit[i];
  const int64_t n = p.rows[p.first + i];
  p.logprob[n] = (float)(((double)target_logit - (double)shift) - log_sum);
  p.lse[n] = lse;
  if (p.entropy) p.entropy[n] = (float)(log_sum + sums.entropy / sums.exponentials);
  if (p.lse_stat) p.lse_stat[n] = (float)lse;
  if (p.mean_logit) p.mean_logit[n] = (float)(sums.total / (double)p.V + invalid);
  if (p.log_sum_sq) p.log_sum_sq[n] = (float)(log(sums.squares) - 2.0 * log_sum);
  if (p.is_top1) p.is_top1[n] = target_logit >= top && log_sum == log_sum ? 1.0f : 0.0f;
}

// Grid: (ceil(T / kTokenThreads))
__global__ void __launch_bounds__(kTokenThreads) token_kernel(const __grid_constant__ TokenNumbers p) {
  const int64_t i = (int64_t)blockIdx.x * kTokenThreads + threadIdx.x;
  if (i >= p.T) return;
  const bool live = p.first + i < *p.count;
  const int64_t n = live ? p.rows[p.first + i] : 0;
  const auto of = [&](const float* values) { return live && values ? values[n] : 0.0f; };
  const float g = of(p.logprob_gradient), prob = of(p.prob_gradient), log_prob = of(p.log_prob_gradient), flat = of(p.flat_gradient);
  const float inverse_temperature = live ? p.inverse_temperature[i] : 1.0f, infinity = -kLowest;
  const float largest = larger(larger(fabsf(g), fabsf(prob)), larger(fabsf(log_prob), fabsf(flat))) * fabsf(p.logit_scale) * inverse_temperature;
  const int top = *p.top;
  const bool finite = fabsf(g + prob + log_prob + flat) < infinity && largest < infinity;
  int e = finite ? exponent_of(largest) : top;
  e = e < top ? e : top;
  int r = e - top > p.least ? e - top : p.least;
  double scale = power_of_two(p.shift - top - r);  // q + shift - e
  if (!p.scaled) {
    r = 0;
    scale = 1.0;
  }
  const double logprob = live ? (double)p.logprob[n] : 0.0, lse = live ? p.lse[n] : 0.0, probability = exp(logprob);
  const double rest = logprob > -1e-4 ? -logprob * (1.0 + logprob * (0.5 + logprob / 6.0)) : 1.0 - probability;
  double entry = (double)g * rest + probability * (double)prob + (double)flat;
  if (p.log_prob_gradient && probability > 0.0) entry += probability * (double)log_prob * logprob;
  entry *= (double)(p.logit_scale * inverse_temperature);
  if (p.softcap > 0.0f) {
    const double t = (logprob + lse) / (double)(p.softcap * inverse_temperature);
    entry *= 1.0 - t * t;
  }
  if (!live) entry = 0.0;
  if (p.weight_entry) p.weight_entry[i] = (float)(entry * power_of_two(p.shift - top));
  if (!p.out) return;
  const float high = (float)lse;
  const auto put = [&](TokenRow row, double x) { p.out[row * p.T + i] = (float)x; };
  put(kInverseTemperature, inverse_temperature);
  put(kUnscale, power_of_two(-r));
  put(kLseHigh, high);
  put(kLseLow, lse - (double)high);
  put(kPlain, ((double)prob - (double)g) * scale);
  put(kLogProb, (double)log_prob * scale);
  put(kFlat, (double)flat * scale);
  put(kScale, power_of_two(r));
  put(kEntry, entry * scale);
  put(kExponent, top + r - p.shift);
}

// Grid: (T, columns of D)
__global__ void __launch_bounds__(kRowThreads) finish_hidden_kernel(const __grid_constant__ FinishHidden p) {
  const int64_t i = blockIdx.x;
  if (p.first + i >= *p.count) return;
  const int32_t target = p.targets[i];
  const int64_t row = target >= 0 && target < p.V ? target : 0, n = p.rows[p.first + i];
  const float entry = p.tokens[kEntry * p.T + i];
  const int exponent = (int)p.tokens[kExponent * p.T + i];
  const int64_t begin = (int64_t)blockIdx.y * kRowThreads * kRowCount + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kRowCount; ++k) {
    const int64_t d = begin + k * kRowThreads;
    if (d >= p.D) break;
    const float w = load_any(p.weight, p.weight_dtype, row * p.stride_weight_v + d * p.stride_weight_d);
    store_any(p.d_hidden, p.d_hidden_dtype, n * p.D + d, scale_by_power(p.sums[i * p.stride_sums + d] + entry * w, exponent));
  }
}

// Grid: (C, columns of D). The tokens of a row are added in their order.
__global__ void __launch_bounds__(kRowThreads, 4) finish_weight_kernel(const __grid_constant__ FinishWeight p) {
  const int64_t c = blockIdx.x, place = p.begin + c;
  const int64_t begin = (int64_t)blockIdx.y * kRowThreads * kRowCount + threadIdx.x;
  const int first = p.starts[place], last = p.starts[place + 1];
  float x[kRowCount];
#pragma unroll
  for (int k = 0; k < kRowCount; ++k) {
    const int64_t d = begin + k * kRowThreads;
    x[k] = d < p.D ? p.sums[c * p.stride_sums + d] : 0.0f;
  }
  for (int at = first; at < last; ++at) {
    const int64_t i = p.order[at], n = p.rows[i];
    const float entry = p.weight_entry[i];
#pragma unroll
    for (int k = 0; k < kRowCount; ++k) {
      const int64_t d = begin + k * kRowThreads;
      if (d < p.D) x[k] += entry * load_any(p.hidden, p.hidden_dtype, n * p.stride_n + d * p.stride_d);
    }
  }
  const float mean = p.mean ? p.mean[place] : 0.0f;
  const int64_t row = p.vocab_order ? p.vocab_order[place] : place;
  const int exponent = *p.top - p.shift;
#pragma unroll
  for (int k = 0; k < kRowCount; ++k) {
    const int64_t d = begin + k * kRowThreads;
    if (d >= p.D) break;
    if (p.mean) x[k] += mean * p.rest[place / p.block * p.D + d];
    store_any(p.d_weight, p.d_weight_dtype, row * p.D + d, scale_by_power(x[k], exponent));
  }
}

}  // namespace isdaa
