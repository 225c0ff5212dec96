// The vocabulary pass: logits in memory folded into log-sum-exps, or turned into their gradient, with one read of each.
// T tokens of a slab, C columns of the chunk, V vocabulary, S slots of partial results.
#pragma once
#include "device.h"
#include "fields.h"

namespace isdaa {

constexpr int kSlotColumns = 2048, kFineSlotColumns = 64;  // of logits that one slot of partial results stands for
constexpr int kBiasRows = 16;                              // tokens that one row of bias_sums is the sum of

// Each token's share of log-sum-exp and statistics, slot by slot, and the target's logit where it is here.
struct FoldLogits {
  const void* logits;                // [., C]: the product for the vocabulary rows [begin, end); token i is row i, or rows[first + i]
  int32_t logits_dtype;
  const int64_t* rows;               // or null
  const void* bias;                  // [V], or null
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
  int64_t first, T, begin, end, stride_n, stride_v;
  float logit_scale;
  float softcap;          // 0: none
  int32_t slot_columns;   // kSlotColumns or kFineSlotColumns

  ISDAA_FIELDS(logits, logits_dtype, rows, bias, bias_dtype, targets, inverse_temperature, count, partial_max, partial_sum,
               partial_entropy, partial_total, partial_squares, target_logit, first, T, begin, end, stride_n, stride_v, logit_scale,
               softcap, slot_columns)
};

// The gradient of the product, 0 for a token that is not live. `out` may be the logits themselves, and of another type too, if row i
// begins where row i of the logits does: a block reads a stretch of its row before it writes there, and writes no faster than it reads.
struct GradientLogits {
  const void* logits;  // [T, C]: the product for the vocabulary rows [begin, end)
  int32_t logits_dtype;
  void* out;           // [T, C]
  int32_t out_dtype;
  const void* bias;  // [V], or null
  int32_t bias_dtype;
  const int32_t* targets;  // [T]
  const float* tokens;     // [kTokenRows, T]
  float* bias_sums;        // [ceil(T / kBiasRows), C] sums over tokens, or null
  const uint8_t* live;     // [T]
  int64_t T, begin, end, stride_n, stride_v, stride_out_n, stride_out_v;
  float logit_scale, softcap;
  bool target_entry;  // the target's own entry stands in its column; else 0 does, and it is added outside

  ISDAA_FIELDS(logits, logits_dtype, out, out_dtype, bias, bias_dtype, targets, tokens, bias_sums, live, T, begin, end, stride_n,
               stride_v, stride_out_n, stride_out_v, logit_scale, softcap, target_entry)
};

void fold_logits(const FoldLogits& params, cudaStream_t stream);
void gradient_logits(const GradientLogits& params, cudaStream_t stream);

}  // namespace isdaa
