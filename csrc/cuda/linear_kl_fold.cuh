// linear_kl_fold, linear_kl_mixture: a slot of both heads' rows lives in the registers of a block. One read, no second look.
#pragma once
#include "linear_kl_rows.cuh"

namespace isdaa {

// Grid of both: (T, slots of the chunk)
template <bool kWide, bool kDivergence>
__global__ void __launch_bounds__(kKlThreads) linear_kl_fold_kernel(const __grid_constant__ KlFold p) {
  constexpr int kSums = kDivergence ? 8 : 4;
  __shared__ float shared_max[kKlThreads / kWarp], shared_sums[kSums * kKlThreads / kWarp], shared_center;
  const int64_t row = blockIdx.x, slot = (int64_t)blockIdx.y * kKlColumns;
  if (p.first + row >= *p.count) return;
  const float inverse_temperature = p.inverse_temperature[row];
  float base[kKlCount], other[kKlCount];
  load_slot<kWide>(p.base + row * p.stride_base, slot, p.begin, p.end, KlHead{{p.base_scale, p.base_softcap}, p.base_bias, p.base_bias_dtype},
                   inverse_temperature, base);
  load_slot<kWide>(p.other + row * p.stride_other, slot, p.begin, p.end,
                   KlHead{{p.other_scale, p.other_softcap}, p.other_bias, p.other_bias_dtype}, inverse_temperature, other);
  if (p.targets) {
    const int64_t target = (int64_t)p.targets[row] - p.begin - slot;
#pragma unroll
    for (int k = 0; k < kKlCount; ++k) {
      if (kl_column(k) != target) continue;
      p.base_target[row] = base[k];
      p.other_target[row] = other[k];
    }
  }
  float base_top = kLowest, other_top = kLowest;
#pragma unroll
  for (int k = 0; k < kKlCount; ++k) {
    base_top = larger(base[k], base_top);
    other_top = larger(other[k], other_top);
  }
  base_top = block_max<kKlThreads>(base_top, shared_max);
  other_top = block_max<kKlThreads>(other_top, shared_max);
  float center = 0.0f;
  if constexpr (kDivergence) {
    float first = kLowest;  // minus the first column where the base is largest
#pragma unroll
    for (int k = 0; k < kKlCount; ++k)
      if (base[k] == base_top) first = larger(first, -(float)kl_column(k));
    if (threadIdx.x == 0) shared_center = 0.0f;
    first = block_max<kKlThreads>(first, shared_max);
#pragma unroll
    for (int k = 0; k < kKlCount; ++k) {
      const float gap = __fsub_rn(other[k], base[k]);
      if (first == -(float)kl_column(k) && fabsf(gap) < -kLowest) shared_center = gap;
    }
    __syncthreads();
    center = shared_center;
  }
  const float base_shift = base_top == kLowest ? 0.0f : base_top, other_shift = other_top == kLowest ? 0.0f : other_top;
  // Terms equal to 1 are counted apart: beside a 1 the small terms would lose their digits.
  float sums[kSums] = {};
#pragma unroll
  for (int k = 0; k < kKlCount; ++k) {
    const float base_below = __fsub_rn(base[k], base_shift), other_below = __fsub_rn(other[k], other_shift);
    const float b = exponential(base_below), o = exponential(other_below);
    const bool base_one = base_below == 0.0f, other_one = other_below == 0.0f;
    sums[0] += base_one ? 0.0f : b;
    sums[1] += base_one ? 1.0f : 0.0f;
    sums[2] += other_one ? 0.0f : o;
    sums[3] += other_one ? 1.0f : 0.0f;
    if constexpr (kDivergence) {
      const Difference gap(other[k], base[k]);
      const float x = __fsub_rn(gap.high, center) + gap.low;
      const bool small = fabsf(x) <= kSmallGap, none = b == 0.0f;
      sums[4] += none ? 0.0f : b * x;
      sums[5] += small ? b * small_excess(x) : 0.0f;
      sums[6] += small || none ? 0.0f : b + b * x;
      sums[7] += small ? 0.0f : o;
    }
  }
  group_sums<kKlThreads>(sums, shared_sums);
  if (threadIdx.x) return;
  float* const place = p.partial + (p.begin / kKlColumns + blockIdx.y) * p.T + row;
  const int64_t apart = p.S * p.T;
  place[kBaseMax * apart] = base_top;
  place[kBaseSum * apart] = sums[0];
  place[kBaseOnes * apart] = sums[1];
  place[kOtherMax * apart] = other_top;
  place[kOtherSum * apart] = sums[2];
  place[kOtherOnes * apart] = sums[3];
  if constexpr (kDivergence) {
    place[kCenter * apart] = center;
    place[kGapSum * apart] = sums[4];
    place[kExcessSum * apart] = sums[5];
    place[kLinearSum * apart] = sums[6];
    place[kApartSum * apart] = sums[7];
  }
}

template <bool kWide>
__global__ void __launch_bounds__(kKlThreads, 4) linear_kl_mixture_kernel(const __grid_constant__ KlMixture p) {
  __shared__ float shared_sums[2 * kKlThreads / kWarp];
  __shared__ double shared_mean[kKlThreads / kWarp];
  const int64_t row = blockIdx.x, slot = (int64_t)blockIdx.y * kKlColumns;
  if (p.first + row >= *p.count) return;
  const KlToken token{p.tokens, p.T, row};
  const float inverse_temperature = token[kKlInverseTemperature];
  float policy[kKlCount], reference[kKlCount];
  load_slot<kWide>(p.policy + row * p.stride_policy, slot, p.begin, p.end,
                   KlHead{{p.policy_scale, p.policy_softcap}, p.policy_bias, p.policy_bias_dtype}, inverse_temperature, policy);
  load_slot<kWide>(p.reference + row * p.stride_reference, slot, p.begin, p.end,
                   KlHead{{p.reference_scale, p.reference_softcap}, p.reference_bias, p.reference_bias_dtype}, inverse_temperature, reference);
  const Halves policy_lse = token.halves(kKlPolicyLse), reference_lse = token.halves(kKlReferenceLse), lse_gap = token.halves(kKlLess);
  const Mixture mixture(p.jsd_weight);
  float sums[2] = {};
  double mean = 0.0;
#pragma unroll
  for (int k = 0; k < kKlCount; ++k) {
    float over_p, over_q;
    mixture(lse_gap.below(Difference(policy[k], reference[k])), over_p, over_q);
    const float pj = exponential(policy_lse.below(policy[k])), qj = exponential(reference_lse.below(reference[k]));
    const float m = mixture.rest * pj + mixture.weight * qj;
    sums[0] += mixture_term(pj, m, over_p);
    sums[1] += mixture_term(qj, m, over_q);
    mean -= pj == 0.0f ? 0.0 : (double)(pj * over_p);
  }
  group_sums<kKlThreads>(sums, shared_sums);
  mean = block_sum<kKlThreads>(mean, shared_mean);
  if (threadIdx.x) return;
  float* const place = p.partial + (p.begin / kKlColumns + blockIdx.y) * p.T + row;
  const int64_t apart = p.S * p.T;
  place[kPolicyPart * apart] = sums[0];
  place[kReferencePart * apart] = sums[1];
  place[kMeanHigh * apart] = (float)mean;
  place[kMeanLow * apart] = (float)(mean - (double)(float)mean);
}

}  // namespace isdaa
