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

// Rows of `tokens` [kKlTokenRows, T], as isdaa_kernels/backends/gpu/kl_tokens.py makes them.
enum KlTokenRow {
  kKlInverseTemperature,
  kKlUnscale,  // of what the product of scaled hidden states gives
  kKlPolicyLse,  // in two parts, as the reference's, less and mean
  kKlCoefficient = kKlPolicyLse + 2,
  kKlReferenceLse,
  kKlBiasScale = kKlReferenceLse + 2,
  kKlLess = kKlBiasScale + 3,  // of log(p / q) + the difference of the log-sum-exps
  kKlMixtureMean = kKlLess + 2,
  kKlLogProb = kKlMixtureMean + 2,  // coefficient of the target's log-prob
  kKlAtTarget,                      // and times 1 - p of the target
};

// Rows of `partial` [., S, T]. d = z of other - z of base, x = d - center, b = exp(z of base - its max in the slot), o likewise;
// excess(x) = exp(x) - 1 - x. The last five are not of jsd.
enum KlPartial {
  kBaseMax,
  kBaseSum,  // of exp(z - max) where that is below 1
  kBaseOnes,
  kOtherMax,
  kOtherSum,
  kOtherOnes,
  kCenter,  // d where the base is largest, 0 where that is no number
  kGapSum,     // of b x
  kExcessSum,  // of b excess(x) where |x| <= 1/2
  kLinearSum,  // of b (1 + x) elsewhere
  kApartSum,   // of o elsewhere
};

// Of jsd's second pass, in their place.
enum KlMixturePartial {
  kPolicyPart,     // of KL(p || m)
  kReferencePart,  // of KL(q || m)
  kMeanHigh,       // of sum of p log(p / m), in two parts: where p is nearly 1 the gradient takes this from the same logarithm
  kMeanLow,
};

// Each token's share of both log-sum-exps and, with `divergence`, of the divergence, slot by slot.
struct KlFold {
  const float* base;   // [T, C]: the product for the vocabulary rows [begin, end)
  const float* other;  // [T, C]
  const void* base_bias;  // [V], or null
  int32_t base_bias_dtype;
  const void* other_bias;  // [V], or null
  int32_t other_bias_dtype;
  const float* inverse_temperature;  // [T]
  const int32_t* targets;            // [T], or null, as the next two
  float* base_target;                // [T] final logits of the targets among these rows
  float* other_target;               // [T]
  const int32_t* count;              // [1] live tokens of the call
  float* partial;                    // [., S, T]
  int64_t first, T, S, begin, end, stride_base, stride_other;
  float base_scale, base_softcap, other_scale, other_softcap;  // softcap 0: none
  bool divergence;

  ISDAA_FIELDS(base, other, base_bias, base_bias_dtype, other_bias, other_bias_dtype, inverse_temperature, targets, base_target,
               other_target, count, partial, first, T, S, begin, end, stride_base, stride_other, base_scale, base_softcap, other_scale,
               other_softcap, divergence)
};

// The slots of each token in one order, summed in fp64: the divergence and all of `numbers`, or without `divergence` the log-sum-exps alone;
// with targets the log-probs of those that are vocabulary rows.
struct KlCombine {
  const float* partial;       // [., S, T]
  const int64_t* rows;        // [L]
  const int32_t* count;       // [1]
  const int32_t* targets;     // [T], or null, as the next four
  const float* base_target;   // [T]
  const float* other_target;  // [T]
  float* base_logprob;        // [N]
  float* other_logprob;       // [N]
  float* divergence;          // [N], or null
  double* numbers;            // [kKlNumbers, N]
  int64_t first, T, N, S;
  bool policy_is_base;

  ISDAA_FIELDS(partial, rows, count, targets, base_target, other_target, base_logprob, other_logprob, divergence, numbers, first, T, N, S,
               policy_is_base)
};

// Each token's share of both divergences from the mixture m = (1 - jsd_weight) p + jsd_weight q, slot by slot.
struct KlMixture {
  const float* policy;     // [T, C]: the product for the vocabulary rows [begin, end)
  const float* reference;  // [T, C]
  const void* policy_bias;  // [V], or null
  int32_t policy_bias_dtype;
  const void* reference_bias;  // [V], or null
  int32_t reference_bias_dtype;
  const float* tokens;   // [., T]
  const int32_t* count;  // [1]
  float* partial;        // [., S, T]
  int64_t first, T, S, begin, end, stride_policy, stride_reference;
  float policy_scale, policy_softcap, reference_scale, reference_softcap;
  double jsd_weight;

  ISDAA_FIELDS(policy, reference, policy_bias, policy_bias_dtype, reference_bias, reference_bias_dtype, tokens, count, partial, first, T,
               S, begin, end, stride_policy, stride_reference, policy_scale, policy_softcap, reference_scale, reference_softcap,
               jsd_weight)
};

// The parts of each token in one order, summed in fp64: the divergence, and the mean of `numbers`.
struct KlMixtureSum {
  const float* partial;   // [., S, T]
  const int64_t* rows;   // [L]
  const int32_t* count;  // [1]
  float* divergence;     // [N]
  double* numbers;       // [kKlNumbers, N]
  int64_t first, T, N, S;
  double jsd_weight;

  ISDAA_FIELDS(partial, rows, count, divergence, numbers, first, T, N, S, jsd_weight)
};

// The gradient of the policy's product, 0 for a token that is not live, in one part, or in two: rounded to fp16, and in fp16 or bf16 what
// that leaves times `low_factor`. Each may be written over the fp32 rows that it comes from, at the address of its row: a block reads a stretch of
// both rows before it writes there, and writes no faster than it reads.
struct KlGradient {
  const float* policy;     // [T, C]: the product for the vocabulary rows [begin, end)
  const float* reference;  // [T, C]
  void* out;               // [T, C]
  void* low;               // [T, C] of the same strides, or null
  int32_t out_dtype, low_dtype;
  const void* policy_bias;  // [V], or null
  int32_t policy_bias_dtype;
  const void* reference_bias;  // [V], or null
  int32_t reference_bias_dtype;
  const int32_t* targets;  // [T], or null: without the log-prob's part
  const float* tokens;     // [., T]
  const uint8_t* live;     // [T]
  float* bias_sums;        // [ceil(T / kKlBiasRows), C] sums over tokens, or null
  int64_t T, begin, end, stride_policy, stride_reference, stride_out;
  float policy_scale, policy_softcap, reference_scale, reference_softcap, low_factor;
  int32_t direction;
  double jsd_weight;

  ISDAA_FIELDS(policy, reference, out, low, out_dtype, low_dtype, policy_bias, policy_bias_dtype, reference_bias, reference_bias_dtype,
               targets, tokens, live, bias_sums, T, begin, end, stride_policy, stride_reference, stride_out, policy_scale, policy_softcap, reference_scale,
               reference_softcap, low_factor, direction, jsd_weight)
};

void linear_kl_fold(const KlFold& params, cudaStream_t stream);
void linear_kl_combine(const KlCombine& params, cudaStream_t stream);
void linear_kl_mixture(const KlMixture& params, cudaStream_t stream);
void linear_kl_mixture_sum(const KlMixtureSum& params, cudaStream_t stream);
void linear_kl_gradient(const KlGradient& params, cudaStream_t stream);

}  // namespace isdaa
