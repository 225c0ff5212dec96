// linear_kl_gradient: a block walks its rows from left to right, so that narrower numbers may be written over the logits they came from.
#pragma once
#include "gradient_logits.cuh"
#include "linear_kl_rows.cuh"

namespace isdaa {

// The gradient of a token's z:  forward p - q;  reverse p (log(p / q) - its mean);  jsd (1 - weight) p (log(p / m) - its mean), each times
// the coefficient of the divergence; and (onehot - p) times that of the log-prob.
struct KlEntry {
  int32_t direction;
  Mixture mixture;
  Halves policy_lse, reference_lse, less, mean;
  float coefficient, log_prob, at_target;

  __device__ __forceinline__ KlEntry(const KlGradient& p, const KlToken& token)
      : direction(p.direction),
        mixture(p.jsd_weight),
        policy_lse(token.halves(kKlPolicyLse)),
        reference_lse(token.halves(kKlReferenceLse)),
        less(token.halves(kKlLess)),
        mean(token.halves(kKlMixtureMean)),
        coefficient(token[kKlCoefficient]),
        log_prob(token[kKlLogProb]),
        at_target(token[kKlAtTarget]) {}

  __device__ __forceinline__ float operator()(float policy, float reference, bool is_target) const {
    const float pj = exponential(policy_lse.below(policy));
    if (coefficient == 0.0f) return is_target ? at_target : -log_prob * pj;  // of a divergence that may be infinite
    return coefficient * of_divergence(pj, policy, reference) + (is_target ? at_target : -log_prob * pj);
  }

  __device__ __forceinline__ float of_divergence(float pj, float policy, float reference) const {
    const float r = less.below(Difference(policy, reference));
    if (direction == kKlForward) {
      const float qj = exponential(reference_lse.below(reference));
      return fabsf(r) <= kSmallGap ? qj * (r + small_excess(r)) : pj - qj;  // q (exp(r) - 1)
    }
    if (pj == 0.0f) return 0.0f;
    if (direction == kKlReverse) return pj * r;
    float over_p, over_q;
    mixture(r, over_p, over_q);
    return mixture.rest * pj * mean.below(-over_p);
  }
};

// Grid: a block for each row, or for each kKlBiasRows rows where their sums over tokens are wanted.
template <class Out, class Low, bool kLow, bool kWide, bool kBiasSums>
__global__ void __launch_bounds__(kGradientThreads, 2) linear_kl_gradient_kernel(const __grid_constant__ KlGradient p) {
  constexpr int kRows = kBiasSums ? kKlBiasRows : 1;
  const int64_t columns = p.end - p.begin;
  const KlHead policy_head{{p.policy_scale, p.policy_softcap}, p.policy_bias, p.policy_bias_dtype};
  const KlHead reference_head{{p.reference_scale, p.reference_softcap}, p.reference_bias, p.reference_bias_dtype};
  for (int64_t step = 0; step < columns; step += kGradientStep) {
    const int64_t begin = step + threadIdx.x * kGradientCount;
    float bias_sum[kGradientCount] = {};
#pragma unroll 1
    for (int64_t row = (int64_t)blockIdx.x * kRows; row < p.T && row < ((int64_t)blockIdx.x + 1) * kRows; ++row) {
      float g[kGradientCount] = {}, y[kGradientCount];
      if (p.live[row]) {
        load_row<kWide>(p.policy + row * p.stride_policy, begin, columns, 1, 0.0f, g);
        load_row<kWide>(p.reference + row * p.stride_reference, begin, columns, 1, 0.0f, y);
        const KlToken token{p.tokens, p.T, row};
        const KlEntry entry(p, token);
        const float inverse_temperature = token[kKlInverseTemperature], unscale = token[kKlUnscale], scale = token[kKlBiasScale];
        const int64_t target = p.targets ? p.targets[row] - p.begin - begin : -1;
#pragma unroll
        for (int k = 0; k < kGradientCount; ++k) {
          if (begin + k >= columns) continue;
          float slope, unused;
          const float policy = policy_head(g[k] * unscale, p.begin + begin + k, inverse_temperature, slope);
          const float reference = reference_head(y[k], p.begin + begin + k, inverse_temperature, unused);
          g[k] = entry(policy, reference, k == target) * slope;
          if constexpr (kBiasSums) bias_sum[k] += g[k] * scale;
        }
      }
      __syncthreads();  // nobody writes where another still reads
      if constexpr (kLow) {
        float low[kGradientCount];
#pragma unroll
        for (int k = 0; k < kGradientCount; ++k) low[k] = (g[k] - widen(narrow<Out>(g[k]))) * p.low_factor;
        store_row<kWide>(static_cast<Low*>(p.low) + row * p.stride_out, begin, columns, 1, low);
      }
      store_row<kWide>(static_cast<Out*>(p.out) + row * p.stride_out, begin, columns, 1, g);
    }
    if constexpr (kBiasSums) store_row<false>(p.bias_sums + blockIdx.x * columns, begin, columns, 1, bias_sum);
  }
}

}  // namespace isdaa
