// The contract between bindings, host loops and row kernels of linear_kl on the CPU. No torch header.
// Letters: N rows (tokens) of a tile, V columns (vocabulary rows) of a tile.
#pragma once
#include "../fields.h"
#include "params.h"

namespace isdaa {

enum KlDirection : int32_t { kKlForward = 0, kKlReverse = 1, kKlJsd = 2 };  // as in isdaa_kernels.divergence

// A tile of the policy's logits and the same tile of the reference's. p, q: their probabilities; pointers that a kernel does not read may be
// null. Forward and reverse are KL(base || other): the base is the reference, or the policy.
template <typename T>
struct KlTile {
  T* policy;     // [N, V] the product; kl_fold leaves the final logits there, kl_gradient the gradient of the product
  T* reference;  // [N, V] the product; kl_fold leaves the final logits there
  int64_t policy_stride, reference_stride, rows, columns;
  const T* policy_bias;          // [V] of this tile, or null
  const T* reference_bias;       // [V] of this tile, or null
  const T* inverse_temperature;  // [N], or null: then `constant_inverse_temperature` holds for all
  T constant_inverse_temperature, policy_scale, policy_softcap, reference_scale, reference_softcap;
  int32_t direction;
  double jsd_weight;      // of the reference in the mixture m
  const int64_t* target;  // [N] column of the target within this tile, outside [0, V) elsewhere; null where no log-probs are wanted

  // kl_fold: in and out
  T* policy_max;          // [N]
  double* policy_sum;     // [N] sum of exp(z - policy_max)
  T* reference_max;       // [N]
  double* reference_sum;  // [N]
  // Not of kKlJsd. d = z of other - z of base, b = exp(z of base - its max); center: d where the base is largest.
  double* center;         // [N]
  double* gap_sum;        // [N] sum of b (d - center)
  double* excess_sum;     // [N] sum of b excess(d - center), excess(x) = exp(x) - 1 - x

  // Written where the target lies in this tile, final logits
  T* policy_target;     // [N]
  T* reference_target;  // [N]

  // kl_mixture and kl_gradient
  const double* policy_lse;     // [N]
  const double* reference_lse;  // [N]
  const double* lse_gap;        // [N] policy_lse - reference_lse, which may hold more digits than their difference
  // kl_mixture: in and out
  double* policy_divergence;     // [N] KL(p || m)
  double* reference_divergence;  // [N] KL(q || m)
  double* policy_mean;           // [N] sum of p log(p / m), as it comes: the same number, but where p = 1 it is log(p / m) to the bit
  // kl_gradient
  const double* mean;        // [N] of log(p / q) or log(p / m) under p; not of kKlForward
  const T* coefficient;      // [N] of the divergence
  const T* logprob;          // [N] of the log-prob, or null

  HeadTransform<T> policy_head() const {
    return {policy_bias, inverse_temperature, constant_inverse_temperature, policy_scale, policy_softcap};
  }
  HeadTransform<T> reference_head() const {
    return {reference_bias, inverse_temperature, constant_inverse_temperature, reference_scale, reference_softcap};
  }

  ISDAA_FIELDS(policy, reference, policy_stride, reference_stride, rows, columns, policy_bias, reference_bias, inverse_temperature,
               constant_inverse_temperature, policy_scale, policy_softcap, reference_scale, reference_softcap, direction, jsd_weight,
               target, policy_max, policy_sum, reference_max, reference_sum, center, gap_sum, excess_sum, policy_target,
               reference_target, policy_lse, reference_lse, lse_gap, policy_divergence, reference_divergence, policy_mean, mean,
               coefficient, logprob)
};

}  // namespace isdaa
