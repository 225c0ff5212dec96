// linear_kl_combine, linear_kl_mixture_sum: the end of the forward, by token.
#pragma once
#include "device.h"
#include "linear_kl.h"

namespace isdaa {

constexpr int kKlTokens = kWarp, kKlParts = 8;  // parts: threads that share the slots of a token

// One row of partial results, slot by slot: of a token.
struct KlSlots {
  const float* partial;
  int64_t T, S, token;

  __device__ __forceinline__ float operator()(int row, int64_t slot) const { return partial[(row * S + slot) * T + token]; }
  // A head's exponentials, the ones apart.
  __device__ __forceinline__ double sum(KlPartial small, int64_t slot) const {
    return (double)(*this)(small, slot) + (double)(*this)(small + 1, slot);
  }
};

// What a thread knows of its part of a token's slots, in units of exp(the token's max); gap and excess are about the token's center.
struct KlSums {
  double base, other, gap, excess;
};

// What moves sums taken at `slot_max` to `top`. Below exp(-87) nothing is left, so that what is infinite there vanishes too.
__device__ __forceinline__ double slot_factor(float slot_max, float top) {
  const double below = (double)slot_max - (double)(top == kLowest ? 0.0f : top);
  return below < -87.0 ? 0.0 : exp(below);
}

// Adds the slot's sums, moved from its own center to one that is `step` further: b excess(x - step) is
// exp(-step) b (exp(x) - 1 - x) + (exp(-step) - 1) b (1 + x) + step b, and where x is large exp(x) stands in the other's own sum.
__device__ __forceinline__ void add_moved(KlSums& sums, double factor, double step, double base, double gap, double excess, double linear) {
  const double shrink = expm1(-step);
  sums.gap += factor * (gap - step * base);
  sums.excess += factor * (excess + shrink * (excess + base + gap - linear) + step * base - linear);
}

// Grid: (ceil(T / kKlTokens)). A warp reads neighbouring tokens of one slot.
template <bool kDivergence>
__global__ void __launch_bounds__(kKlTokens* kKlParts) linear_kl_combine_kernel(const __grid_constant__ KlCombine p) {
  __shared__ float shared_base[kKlParts][kKlTokens], shared_other[kKlParts][kKlTokens];
  __shared__ int64_t shared_slot[kKlParts][kKlTokens];
  __shared__ KlSums shared_sums[kKlParts][kKlTokens];
  const int lane = lane_index(), part = warp_index();
  const int64_t i = (int64_t)blockIdx.x * kKlTokens + lane;
  const bool live = i < p.T && p.first + i < *p.count;
  const KlSlots slots{p.partial, p.T, p.S, i};
  float base_top = kLowest, other_top = kLowest;
  int64_t largest = 0;  // slot of the base's
  if (live) {
    for (int64_t s = part; s < p.S; s += kKlParts) {
      const float base_max = slots(kBaseMax, s);
      if (base_max > base_top) {
        base_top = base_max;
        largest = s;
      }
      other_top = larger(slots(kOtherMax, s), other_top);
    }
  }
  shared_base[part][lane] = base_top;
  shared_other[part][lane] = other_top;
  shared_slot[part][lane] = largest;
  __syncthreads();
  for (int q = 0; q < kKlParts; ++q) {
    const float base_max = shared_base[q][lane];
    const int64_t slot = shared_slot[q][lane];
    if (base_max > base_top || (base_max == base_top && slot < largest)) {
      base_top = base_max;
      largest = slot;
    }
    other_top = larger(shared_other[q][lane], other_top);
  }
  const double base_shift = base_top == kLowest ? 0.0 : (double)base_top, other_shift = other_top == kLowest ? 0.0 : (double)other_top;
  const double center = kDivergence && live ? (double)slots(kCenter, largest) : 0.0;
  KlSums sums{};
  if (live) {
    for (int64_t s = part; s < p.S; s += kKlParts) {
      const float base_max = slots(kBaseMax, s), other_max = slots(kOtherMax, s);
      const double base_factor = slot_factor(base_max, base_top), other_factor = slot_factor(other_max, other_top);
      const double base_sum = slots.sum(kBaseSum, s);
      if (base_factor != 0.0) sums.base += base_factor * base_sum;
      if (other_factor != 0.0) sums.other += other_factor * slots.sum(kOtherSum, s);
      if constexpr (kDivergence) {
        if (base_factor != 0.0)
          add_moved(sums, base_factor, center - (double)slots(kCenter, s), base_sum, (double)slots(kGapSum, s),
                    (double)slots(kExcessSum, s), (double)slots(kLinearSum, s));
        const double apart = (double)slots(kApartSum, s);
        if (apart != 0.0) sums.excess += apart * exp((double)other_max - base_shift - center);
      }
    }
  }
  shared_sums[part][lane] = sums;
  __syncthreads();
  if (!live || part) return;
  for (int q = 1; q < kKlParts; ++q) {
    sums.base += shared_sums[q][lane].base;
    sums.other += shared_sums[q][lane].other;
    sums.gap += shared_sums[q][lane].gap;
    sums.excess += shared_sums[q][lane].excess;
  }
  const double log_base = log(sums.base), log_other = log(sums.other);
  double above = (other_shift - base_shift) + (log_other - log_base);  // the other's log-sum-exp minus the base's
  const int64_t n = p.rows[p.first + i];
  double* numbers = p.numbers + n;
  if constexpr (kDivergence) {
    // With E the mean under the base, KL = log E[exp(x)] - E[x], where E[exp(x)] - 1 is E[excess(x)] + E[x]: a small divergence is made of
    // small numbers. Where it is larger, or the center far from the difference of the log-sum-exps, the plain formula cancels nothing.
    const double mean = sums.gap / sums.base, far = above - center, near = log1p(sums.excess / sums.base + mean);
    const bool small = far - mean < 0.25 && fabs(far) < 4.0 && fabs(near) < (double)-kLowest;
    double value = (small ? near : far) - mean;
    value = value < 0.0 ? 0.0 : value;
    if (small) above = center + near;
    p.divergence[n] = (float)value;
    numbers[kKlMean * p.N] = value;
  }
  if (p.targets && p.targets[i] >= 0) {
    p.base_logprob[n] = (float)(((double)p.base_target[i] - base_shift) - log_base);
    p.other_logprob[n] = (float)(((double)p.other_target[i] - other_shift) - log_other);
  }
  const double base_lse = base_shift + log_base, other_lse = other_shift + log_other;
  numbers[kPolicyLse * p.N] = p.policy_is_base ? base_lse : other_lse;
  numbers[kReferenceLse * p.N] = p.policy_is_base ? other_lse : base_lse;
  numbers[kLseGap * p.N] = p.policy_is_base ? -above : above;
}

// Grid: (ceil(T / kKlTokens))
__global__ void __launch_bounds__(kKlTokens) linear_kl_mixture_sum_kernel(const __grid_constant__ KlMixtureSum p) {
  const int64_t i = (int64_t)blockIdx.x * kKlTokens + threadIdx.x;
  if (i >= p.T || p.first + i >= *p.count) return;
  const KlSlots slots{p.partial, p.T, p.S, i};
  double policy = 0.0, reference = 0.0, mean = 0.0;
  for (int64_t s = 0; s < p.S; ++s) {
    policy += (double)slots(kPolicyPart, s);
    reference += (double)slots(kReferencePart, s);
    mean += (double)slots(kMeanHigh, s) + (double)slots(kMeanLow, s);
  }
  const int64_t n = p.rows[p.first + i];
  p.divergence[n] = (float)((1.0 - p.jsd_weight) * policy + p.jsd_weight * reference);
  p.numbers[kKlMean * p.N + n] = mean;
}

}  // namespace isdaa
