// What the routed backward does not recompute: mass times the mean distribution of the block, through two products of the width of the
// number of blocks. T tokens of a slab, N tokens of the call, L live ones at most, B blocks, D hidden size, C vocabulary rows of a chunk.
//
// rest[b, i] = coefficient of token i in the gradient of the product, times its mass in block b where that is not recomputed. The factors
// that are no inputs are fp32 numbers: where the other factor is 16-bit they enter as two 16-bit halves, for a single one would leave the
// rows of the gradient of the logits a sum of 2^-9 of what is not routed.
#pragma once
#include "device.h"
#include "fields.h"

namespace isdaa {

// sums[b] (+)= the sum over tokens of rest[b, i] * hidden[i], of pairs that are not routed at all.
struct RestWeight {
  const uint8_t* route;   // [B, L], as `route` writes it
  const float* log_mass;  // [B, N]
  const int64_t* rows;    // [L]
  const int32_t* count;   // [1]
  const float* tokens;    // [kTokenRows, T]
  const void* hidden;     // [T, D] times its token's power of two
  int32_t hidden_dtype;
  const float* poison;  // [1] NaN where a token of the call has a number that is not finite, else 0
  float* sums;          // [B, D]
  int64_t first, T, D, L, N, B, stride_hidden;
  float logit_scale;
  bool is_first;  // poison is there to add to, else sums

  ISDAA_FIELDS(route, log_mass, rows, count, tokens, hidden, hidden_dtype, poison, sums, first, T, D, L, N, B, stride_hidden,
               logit_scale, is_first)
};

// sums[i] += the sum over blocks of rest[b, i] * mean[b], of pairs that are not routed in the gradient of hidden. Live tokens only.
struct RestHidden {
  const uint8_t* route;   // [B, L]
  const float* log_mass;  // [B, N]
  const int64_t* rows;    // [L]
  const int32_t* count;   // [1]
  const float* tokens;    // [kTokenRows, T]
  const float* mean;      // [B, D]
  float* sums;            // [T, D]
  int32_t dtype;          // of the halves that both factors are split in, or fp32
  int64_t first, T, D, L, N, B, stride_sums;
  float logit_scale;

  ISDAA_FIELDS(route, log_mass, rows, count, tokens, mean, sums, dtype, first, T, D, L, N, B, stride_sums, logit_scale)
};

// The sums of each block's tiles in one order, and after the last slab each block's distribution: uniform where nothing is routed.
struct BlockSums {
  const float* mean_sums;  // [ceil(T / rows), C]
  const float* bias_sums;  // [ceil(T / rows), C], or null
  const int32_t* counts;   // [blocks] listed tokens
  float* mean;             // [C]
  float* bias;             // [C], or null
  int64_t C, block, rows;  // rows: listed tokens of a tile
  bool is_first, is_last;  // nothing is there to add to; the sums of `mean` are whole

  ISDAA_FIELDS(mean_sums, bias_sums, counts, mean, bias, C, block, rows, is_first, is_last)
};

// out[b] = the mean of the block's rows under its distribution.
struct BlockMean {
  const void* weight;  // [C, D] the chunk's rows in the order of the blocks
  int32_t weight_dtype;
  const float* mean;  // [C]
  float* out;         // [blocks, D]
  int64_t D, C, block, stride_weight_v, stride_weight_d;

  ISDAA_FIELDS(weight, weight_dtype, mean, out, D, C, block, stride_weight_v, stride_weight_d)
};

void rest_weight(const RestWeight& params, cudaStream_t stream);
void rest_hidden(const RestHidden& params, cudaStream_t stream);
void block_sums(const BlockSums& params, cudaStream_t stream);
void block_mean(const BlockMean& params, cudaStream_t stream);

}  // namespace isdaa
