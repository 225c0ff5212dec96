// What the kernels of linear_kl share: final logits of two heads, their difference, and the terms of a divergence.
// excess(x) = exp(x) - 1 - x is not negative, and sum of b excess(log(o / b)) = KL(b || o), as sum of b = sum of o = 1: summed like that a
// small divergence keeps its digits, where sum of b log(b / o) would cancel. For |x| > 1/2 nothing cancels: b excess(x) = o - b - b x.
#pragma once
#include "any.cuh"
#include "fold_logits.cuh"
#include "head.cuh"
#include "linear_kl.h"

namespace isdaa {

constexpr int kKlThreads = 256, kKlCount = kKlColumns / kKlThreads, kKlVector = 4;
constexpr float kSmallGap = 0.5f;

// 0 below what fp32 holds as a normal number.
__device__ __forceinline__ float exponential(float x) { return x < -87.0f ? 0.0f : expf(x); }

// excess(x) for |x| <= 1/2
__device__ __forceinline__ float small_excess(float x) {
  float y = x * 2.7557319e-6f + 2.4801587e-5f;
  y = y * x + 1.9841270e-4f;
  y = y * x + 1.3888889e-3f;
  y = y * x + 8.3333333e-3f;
  y = y * x + 4.1666667e-2f;
  y = y * x + 1.6666667e-1f;
  y = y * x + 0.5f;
  return y * (x * x);
}

// a - b in two parts, the second of which the first has rounded off: two heads' logits may lie far apart and yet mean the same. A final
// logit ends in a product: where the compiler made a multiply-add of it and this difference, equal logits would differ.
struct Difference {
  float high, low;

  __device__ __forceinline__ Difference(float a, float b) {
    high = __fsub_rn(a, b);
    const float back = __fsub_rn(high, a);
    low = __fsub_rn(__fsub_rn(a, __fsub_rn(high, back)), b + back);
    low = low == low ? low : 0.0f;  // of infinities
  }
};

// A number in two parts, the second of which the first has rounded off.
struct Halves {
  float high, low;

  __device__ __forceinline__ float below(float z) const { return __fsub_rn(z, high) - low; }
  __device__ __forceinline__ float below(const Difference& d) const { return __fsub_rn(d.high, high) + (d.low - low); }
};

// A token's column of `tokens`.
struct KlToken {
  const float* tokens;
  int64_t T, i;

  __device__ __forceinline__ float operator[](int row) const { return tokens[row * T + i]; }
  __device__ __forceinline__ Halves halves(int row) const { return {(*this)[row], (*this)[row + 1]}; }
};

// One of the two heads.
struct KlHead {
  HeadNumbers numbers;
  const void* bias;
  int32_t bias_dtype;

  // z of the product x in the vocabulary row j, and dz / dx
  __device__ __forceinline__ float operator()(float x, int64_t j, float inverse_temperature, float& slope) const {
    return numbers(x + (bias ? load_any(bias, bias_dtype, j) : 0.0f), inverse_temperature, slope);
  }
};

// A slot of a row: kKlVector neighbours of each thread, then kKlVector that lie further on.
__device__ __forceinline__ int kl_column(int k) { return (k / kKlVector * kKlThreads + (int)threadIdx.x) * kKlVector + k % kKlVector; }

// Final logits of the slot whose first column of the chunk is `slot`, -inf behind the chunk's end.
template <bool kWide>
__device__ __forceinline__ void load_slot(const float* row, int64_t slot, int64_t begin, int64_t end, const KlHead& head,
                                          float inverse_temperature, float (&z)[kKlCount]) {
  const int64_t columns = end - begin;
#pragma unroll
  for (int v = 0; v < kKlCount; v += kKlVector) {
    const int64_t at = slot + kl_column(v);
    float x[kKlVector], slope;
    if (kWide && at + kKlVector <= columns) {
      load_wide<kKlVector>(row + at, x);
    } else {
#pragma unroll
      for (int k = 0; k < kKlVector; ++k) x[k] = at + k < columns ? row[at + k] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kKlVector; ++k) z[v + k] = at + k < columns ? head(x[k], begin + at + k, inverse_temperature, slope) : kLowest;
  }
}

// log(m / p) and log(m / q) of the mixture m = (1 - weight) p + weight q, from r = log(p / q): log(m / max(p, q)), of which neither part
// cancels, less what is between them.
struct Mixture {
  float weight, rest;

  __device__ __forceinline__ explicit Mixture(double weight) : weight((float)weight), rest((float)(1 - weight)) {}

  __device__ __forceinline__ void operator()(float r, float& over_p, float& over_q) const {
    const bool up = r >= 0.0f;
    const float size = fabsf(r), lesser = up ? weight : rest, greater = up ? rest : weight;
    const float log_m = size <= kSmallGap ? log1pf(lesser * expm1f(-size)) : logf(greater + lesser * expf(-size));
    over_p = up ? log_m : log_m - r;
    over_q = up ? log_m + r : log_m;
  }
};

// b excess(x), m being b exp(x)
__device__ __forceinline__ float mixture_term(float b, float m, float x) {
  if (b == 0.0f) return m;
  return fabsf(x) <= kSmallGap ? b * small_excess(x) : m - (b + b * x);
}

}  // namespace isdaa
