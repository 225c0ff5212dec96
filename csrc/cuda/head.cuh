// The head's transform between the matrix product x and the final logit z, and the gradient of z. Formulas: isdaa_kernels.linear_logprob.
#pragma once
#include "device.h"

namespace isdaa {

// 1 - 2 / (exp(2|x|) + 1) loses digits near 0; there an odd polynomial, fitted to a relative error of 4e-9, is exact to fp32.
// `reciprocal_of_exp_plus_one(y)` is 1 / (exp(y) + 1).
template <class Function>
__device__ __forceinline__ float hyperbolic_tangent(float x, Function reciprocal_of_exp_plus_one) {
  const float square = x * x, size = fabsf(x);
  const float inner = -5.3739714301e-2f + square * (2.0639084706e-2f - square * 5.7049841591e-3f);
  const float series = x + x * square * (-3.3333281942e-1f + square * (1.3331442189e-1f + square * inner));
  const float tail = copysignf(1.0f - 2.0f * reciprocal_of_exp_plus_one(2.0f * fminf(size, 20.0f)), x);
  const float capped = size < 0.625f ? series : tail;
  return x == x ? capped : x;
}

__device__ __forceinline__ float hyperbolic_tangent(float x) {
  return hyperbolic_tangent(x, [](float y) { return 1.0f / (expf(y) + 1.0f); });
}

struct HeadNumbers {
  float logit_scale;
  float softcap;  // 0: none

  // z of x + bias, and dz / dx
  __device__ __forceinline__ float operator()(float x, float inverse_temperature, float& slope) const {
    slope = logit_scale * inverse_temperature;
    if (softcap > 0.0f) {
      const float t = hyperbolic_tangent(x * (logit_scale / softcap));
      slope *= 1.0f - t * t;
      return t * (softcap * inverse_temperature);
    }
    return x * slope;
  }
};

// Rows of `tokens` [kTokenRows, T], as the kernel `token` writes them.
enum TokenRow {
  kInverseTemperature,
  kUnscale,  // of what the product of scaled hidden states gives
  kLseHigh,
  kLseLow,
  kPlain,  // of p in the gradient of z
  kLogProb,  // of p log p
  kFlat,
  kScale,  // of the hidden state
  kEntry,  // gradient of the product in the target's column
  kExponent,  // of the power of two that d_hidden is multiplied by
  kTokenRows,
};

// The gradient of z outside the target's column: p (plain + log_prob log p) + flat.
struct GradientNumbers {
  float inverse_temperature, unscale, lse_high, lse_low, plain, log_prob, flat;

  __device__ __forceinline__ GradientNumbers(const float* tokens, int64_t T, int64_t i)
      : inverse_temperature(tokens[kInverseTemperature * T + i]),
        unscale(tokens[kUnscale * T + i]),
        lse_high(tokens[kLseHigh * T + i]),
        lse_low(tokens[kLseLow * T + i]),
        plain(tokens[kPlain * T + i]),
        log_prob(tokens[kLogProb * T + i]),
        flat(tokens[kFlat * T + i]) {}

  __device__ __forceinline__ float operator()(float z) const {
    const float log_p = (z - lse_high) - lse_low, p = expf(log_p);
    return p * (plain + log_prob * (p > 0.0f ? log_p : 0.0f)) + flat;
  }
};

}  // namespace isdaa
