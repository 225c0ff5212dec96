// linear_kl: two heads' logits in memory folded together into the divergence of their distributions, and turned into the gradient of the
// policy's. Formulas: isdaa_kernels.linear_kl; why the sums are what they are: csrc/cpu/linear_kl_rows.h.
// N tokens of the call, L live ones at most, T tokens of a slab, C columns of the chunk, V vocabulary, S slots of partial results.
#pragma once
#include "device.h"
#include "fields.h"

namespace isdaa {

constexpr int kKlColumns = 2048;  // of logits that one slot of partial results stands for
constexpr int kKlBiasRows = 16;   // tokens that one row of bias_sums is the sum of

enum KlDirection : int32_t { kKlForward = 0, kKlReverse = 1, kKlJsd = 2 };  // as in isdaa_kernels.divergence

// Rows of `numbers` [4, N], which the forward leaves for the backward.
enum KlNumber { kPolicyLse, kReferenceLse, kLseGap, kKlMean, kKlNumbers };

// Each token's share of both log-sum-exps and, unless center is null, of the divergence, slot by slot. d = z of other - z of base,
// x = d - center, b = exp(z of base - its max in the slot), o likewise; excess(x) = exp(x) - 1 - x.
struct KlFold {
  const float* base;   // [T, C]: the product for the vocabulary rows [begin, end)
  const float* other;  // [T, C]
  const void* base_bias;  // [V], or null
  int32_t base_bias_dtype;
  const void* other_bias;  // [V], or null
  int32_t other_bias_dtype;
  const float* inverse_temperature;  // [T]
  const int32_t* count;              // [1] live tokens of the call
  float* base_max;    // [S, T], as all that follow
  float* other_max;
  double* base_sum;   // of exp(z - max)
  double* other_sum;
  float* center;      // d where the base is largest, 0 where that is no number; or null, as the next four
  float* gap_sum;     // of b x
  float* excess_sum;  // of b excess(x) where |x| <= 1/2
  float* linear_sum;  // of b (1 + x) elsewhere
  float* apart_sum;   // of o elsewhere
  int64_t first, T, begin, end, stride_base, stride_other;
  float base_scale, base_softcap, other_scale, other_softcap;  // softcap 0: none

  ISDAA_FIELDS(base, other, base_bias, base_bias_dtype, other_bias, other_bias_dtype, inverse_temperature, count, base_max, other_max,
               base_sum, other_sum, center, gap_sum, excess_sum, linear_sum, apart_sum, first, T, begin, end, stride_base,
               stride_other, base_scale, base_softcap, other_scale, other_softcap)
};

// The slots of each token in one order, summed in fp64: the divergence and all of `numbers`, or without center the log-sum-exps alone.
struct KlCombine {
  const float* base_max;  // [S, T], as all partial results
  const float* other_max;
  const double* base_sum;
  const double* other_sum;
  const float* center;  // or null, as the next four and `divergence`
  const float* gap_sum;
  const float* excess_sum;
  const float* linear_sum;
  const float* apart_sum;
  const int64_t* rows;   // [L]
  const int32_t* count;  // [1]
  float* divergence;     // [N]
  double* numbers;       // [kKlNumbers, N]
  int64_t first, T, N, S;
  bool policy_is_base;

  ISDAA_FIELDS(base_max, other_max, base_sum, other_sum, center, gap_sum, excess_sum, linear_sum, apart_sum, rows, count, divergence,
               numbers, first, T, N, S, policy_is_base)
};

// Each token's share of both divergences from the mixture m = (1 - jsd_weight) p + jsd_weight q, slot by slot.
struct KlMixture {
  const float* policy;     // [T, C]: the product for the vocabulary rows [begin, end)
  const float* reference;  // [T, C]
  const void* policy_bias;  // [V], or null
  int32_t policy_bias_dtype;
  const void* reference_bias;  // [V], or null
  int32_t reference_bias_dtype;
  const float* inverse_temperature;  // [T]
  const int64_t* rows;               // [L]
  const int32_t* count;              // [1]
  const double* numbers;             // [kKlNumbers, N], of which the mean is not read
  float* policy_part;     // [S, T] of KL(p || m), as the next
  float* reference_part;  // of KL(q || m)
  double* mean_part;      // of sum of p log(p / m): where p is nearly 1 the gradient takes this from the same logarithm
  int64_t first, T, N, begin, end, stride_policy, stride_reference;
  float policy_scale, policy_softcap, reference_scale, reference_softcap;
  double jsd_weight;

  ISDAA_FIELDS(policy, reference, policy_bias, policy_bias_dtype, reference_bias, reference_bias_dtype, inverse_temperature, rows, count,
               numbers, policy_part, reference_part, mean_part, first, T, N, begin, end, stride_policy, stride_reference, policy_scale,
               policy_softcap, reference_scale, reference_softcap, jsd_weight)
};

// The parts of each token in one order, summed in fp64: the divergence, and the mean of `numbers`.
struct KlMixtureSum {
  const float* policy_part;  // [S, T], as the next
  const float* reference_part;
  const double* mean_part;
  const int64_t* rows;   // [L]
  const int32_t* count;  // [1]
  float* divergence;     // [N]
  double* numbers;       // [kKlNumbers, N]
  int64_t first, T, N, S;
  double jsd_weight;

  ISDAA_FIELDS(policy_part, reference_part, mean_part, rows, count, divergence, numbers, first, T, N, S, jsd_weight)
};

// The gradient g of the policy's product, 0 for a token that is not live. fp32: in the place of the policy's logits. 16 bits: g rounded,
// row by row in the place of the policy's logits, and what that rounds off in the place of the reference's; a block reads a stretch of
// both rows before it writes there, and writes no faster than it reads.
struct KlGradient {
  void* policy;     // [T, C]: fp32, the product for the vocabulary rows [begin, end); g
  void* reference;  // [T, C]: fp32, the product; the low half of g where out_dtype is 16-bit
  int32_t out_dtype;
  const void* policy_bias;  // [V], or null
  int32_t policy_bias_dtype;
  const void* reference_bias;  // [V], or null
  int32_t reference_bias_dtype;
  const float* tokens;    // [kTokenRows, T]; the coefficient stands in the row kLogProb
  const int64_t* rows;    // [L]
  const int32_t* count;   // [1]
  const double* numbers;  // [kKlNumbers, N]
  float* bias_sums;       // [ceil(T / kKlBiasRows), C] sums over tokens, or null
  int64_t first, T, N, begin, end, stride_policy, stride_reference;  // strides in numbers of fp32
  float policy_scale, policy_softcap, reference_scale, reference_softcap;
  int32_t direction;
  double jsd_weight;

  ISDAA_FIELDS(policy, reference, out_dtype, policy_bias, policy_bias_dtype, reference_bias, reference_bias_dtype, tokens, rows, count,
               numbers, bias_sums, first, T, N, begin, end, stride_policy, stride_reference, policy_scale, policy_softcap,
               reference_scale, reference_softcap, direction, jsd_weight)
};

void linear_kl_fold(const KlFold& params, cudaStream_t stream);
void linear_kl_combine(const KlCombine& params, cudaStream_t stream);
void linear_kl_mixture(const KlMixture& params, cudaStream_t stream);
void linear_kl_mixture_sum(const KlMixtureSum& params, cudaStream_t stream);
void linear_kl_gradient(const KlGradient& params, cudaStream_t stream);

}  // namespace isdaa
