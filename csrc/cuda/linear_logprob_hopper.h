// The logits' product for Hopper GPUs (sm_90a), fused with what follows it: a tile of logits lives in registers and is folded, or turned
// into its gradient, at once. 16-bit factors. T tokens of a slab (a multiple of 128), D hidden size, V vocabulary, C vocabulary rows of a
// chunk, S = 4 * ceil(V / 256) slots of partial results, of 64 vocabulary rows each. Rows of hidden and weight begin on 16-byte borders;
// what lies behind their D numbers is not read. All T rows of hidden are read, live or not.
#pragma once
#include "device.h"
#include "fields.h"

namespace isdaa {

// Each token's share of log-sum-exp and statistics, slot by slot, and the target's logit. Only live tokens' numbers are written.
struct LinearLogprobForwardHopper {
  const void* hidden;  // [T, D]
  const void* weight;  // [V, D]
  int32_t dtype;       // of both
  const void* bias;    // [V], or null
  int32_t bias_dtype;
  const int32_t* targets;            // [T]
  const float* inverse_temperature;  // [T]
  const int32_t* count;              // [1] live tokens of the call
  float* partial_max;                // [S, T], as all of the next
  double* partial_sum;               // of exp(z - max)
  float* partial_entropy;            // of exp(z - max) * (max - z), or null
  float* partial_total;              // of z, or null
  float* partial_squares;            // of exp(2 (z - max)), or null
  float* target_logit;               // [T]
  int64_t first, T, D, V, stride_hidden, stride_weight;
  float logit_scale;
  float softcap;     // 0: none
  int32_t programs;  // multiprocessors of the device

  ISDAA_FIELDS(hidden, weight, dtype, bias, bias_dtype, targets, inverse_temperature, count, partial_max, partial_sum,
               partial_entropy, partial_total, partial_squares, target_logit, first, T, D, V, stride_hidden, stride_weight, logit_scale,
               softcap, programs)
};

// The gradient of the product for the vocabulary rows [begin, end), 0 in the target's column and for tokens that are not live.
struct LinearLogprobBackwardHopper {
  const void* hidden;  // [T, D] times 2^-back of its token
  const void* weight;  // [V, D]
  int32_t dtype;       // of both and of out
  const void* bias;    // [V], or null
  int32_t bias_dtype;
  const int32_t* targets;  // [T]
  const float* tokens;     // [kTokenRows, T]
  const int32_t* count;    // [1] tokens of the call that carry a gradient
  void* out;               // [T, C]
  float* bias_sums;        // [T / 128, C] sums over tokens, or null; rows without a live token are left as they are
  int64_t first, T, D, V, begin, end, stride_hidden, stride_weight, stride_out;
  float logit_scale;
  float softcap;        // 0: none
  bool log_prob, flat;  // whether any of these rows of `tokens` is not 0
  int32_t programs;     // multiprocessors of the device

  ISDAA_FIELDS(hidden, weight, dtype, bias, bias_dtype, targets, tokens, count, out, bias_sums, first, T, D, V, begin, end,
               stride_hidden, stride_weight, stride_out, logit_scale, softcap, log_prob, flat, programs)
};

void linear_logprob_forward_hopper(const LinearLogprobForwardHopper& params, cudaStream_t stream);
void linear_logprob_backward_hopper(const LinearLogprobBackwardHopper& params, cudaStream_t stream);

}  // namespace isdaa
