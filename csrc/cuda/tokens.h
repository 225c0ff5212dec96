// Kernels whose work goes by token: gathering, the end of the log-sum-exp, coefficients of the backward, the end of the gradients.
// N tokens of the call, L live ones at most, T tokens of a slab, C vocabulary rows of a chunk, D hidden size, V vocabulary, S slots.
#pragma once
#include "device.h"
#include "fields.h"

namespace isdaa {

// out[i] = source[rows[first + i]] * scale[i], 0 past the count
struct Gather {
  const void* source;  // [., D]
  int32_t source_dtype;
  const int64_t* rows;   // [L]
  const int32_t* count;  // [1]
  const float* scale;    // [T], or null: 1
  void* out;             // [T, D], rows of neighbouring numbers
  int32_t out_dtype;
  int64_t first, T, D, stride_n, stride_d, stride_out;

  ISDAA_FIELDS(source, source_dtype, rows, count, scale, out, out_dtype, first, T, D, stride_n, stride_d, stride_out)
};

// The partial results of each token in one order of their slots, summed in fp64; NaN where the target is no vocabulary row.
struct Combine {
  const float* partial_max;      // [S, T], as all partial results
  const double* partial_sum;
  const float* partial_entropy;  // or null: not asked for
  const float* partial_total;    // or null
  const float* partial_squares;  // or null
  const float* target_logit;     // [T]
  const int32_t* targets;        // [T]
  const int64_t* rows;           // [L]
  const int32_t* count;          // [1]
  float* logprob;                // [N], as all that follow
  double* lse;
  float* entropy;     // or null: not asked for
  float* lse_stat;    // or null
  float* mean_logit;  // or null
  float* log_sum_sq;  // or null
  float* is_top1;     // or null
  int64_t first, T, V, S;

  ISDAA_FIELDS(partial_max, partial_sum, partial_entropy, partial_total, partial_squares, target_logit, targets, rows, count, logprob,
               lse, entropy, lse_stat, mean_logit, log_sum_sq, is_top1, first, T, V, S)
};

// Coefficients of the backward, scaled by powers of two so that 16-bit numbers hold them.
//
// A token's largest coefficient, times the slope of z, is below 2^(e + 1), that of the call below 2^(top + 1). The hidden state is scaled
// by 2^r, the gradient of its logits by 2^(q + shift - e), with r + q = e - top and r >= least: then their product is in units of
// 2^(top - shift) for all tokens alike. Without `scaled` all coefficients stay as they are.
struct TokenNumbers {
  const int64_t* rows;   // [L]
  const int32_t* count;  // [1]
  const int32_t* top;    // [1]
  const float* logprob_gradient;   // [N], as the next
  const float* prob_gradient;      // or null
  const float* log_prob_gradient;  // or null
  const float* flat_gradient;      // or null
  const float* logprob;
  const double* lse;
  const float* inverse_temperature;  // [T]
  float* out;                        // [kTokenRows, T], or null
  float* weight_entry;               // [T] the target's own entry in the units of d_weight, or null
  int64_t first, T;
  float logit_scale, softcap;  // softcap 0: none
  int32_t least, shift;
  bool scaled;

  ISDAA_FIELDS(rows, count, top, logprob_gradient, prob_gradient, log_prob_gradient, flat_gradient, logprob, lse, inverse_temperature,
               out, weight_entry, first, T, logit_scale, softcap, least, shift, scaled)
};

// d_hidden[rows[first + i]] = (sums[i] + the target's entry * weight[target]) * the token's power of two
struct FinishHidden {
  const float* sums;       // [T, D]
  const float* tokens;     // [kTokenRows, T]
  const int32_t* targets;  // [T]
  const void* weight;      // [V, D]
  int32_t weight_dtype;
  const int64_t* rows;   // [L]
  const int32_t* count;  // [1]
  void* d_hidden;        // [N, D]
  int32_t d_hidden_dtype;
  int64_t first, T, D, V, stride_sums, stride_weight_v, stride_weight_d;

  ISDAA_FIELDS(sums, tokens, targets, weight, weight_dtype, rows, count, d_hidden, d_hidden_dtype, first, T, D, V, stride_sums,
               stride_weight_v, stride_weight_d)
};

// d_weight[begin + c] = (sums[c] + sum of entry * hidden over the tokens whose target is begin + c) * 2^(top - shift); with `mean`,
// mean[begin + c] * rest[its block] is added first. The row that this becomes is vocab_order[begin + c] where there is an order.
struct FinishWeight {
  const float* sums;           // [C, D]
  const int64_t* order;        // [L] tokens by target
  const int32_t* starts;       // [V + 1] where each vocabulary row's tokens begin in it
  const int64_t* rows;         // [L]
  const float* weight_entry;   // [L]
  const void* hidden;          // [N, D]
  int32_t hidden_dtype;
  const int32_t* top;  // [1]
  void* d_weight;      // [V, D]
  int32_t d_weight_dtype;
  const float* mean;           // [V], or null
  const float* rest;           // [B, D], or null
  const int64_t* vocab_order;  // [V], or null
  int64_t begin, C, D, stride_sums, stride_n, stride_d, block;
  int32_t shift;

  ISDAA_FIELDS(sums, order, starts, rows, weight_entry, hidden, hidden_dtype, top, d_weight, d_weight_dtype, mean, rest, vocab_order,
               begin, C, D, stride_sums, stride_n, stride_d, block, shift)
};

void gather(const Gather& params, cudaStream_t stream);
void combine(const Combine& params, cudaStream_t stream);
void token(const TokenNumbers& params, cudaStream_t stream);
void finish_hidden(const FinishHidden& params, cudaStream_t stream);
void finish_weight(const FinishWeight& params, cudaStream_t stream);

}  // namespace isdaa
