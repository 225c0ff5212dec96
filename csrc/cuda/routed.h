// The routed backward: blocks of vocabulary as experts, each with the list of tokens that are routed to it, as matrix products over
// gathered rows. T tokens of a slab, C vocabulary rows of a chunk, `blocks` blocks of `block` rows in it, D hidden size, N tokens of the
// call, L live ones at most, B blocks of the whole vocabulary. The gradient of the product lies packed, [blocks, T, block]: row i of a
// block belongs to the i-th token of its list (routes.h).
#pragma once
#include "device.h"
#include "fields.h"
#include "routes.h"

namespace isdaa {

constexpr int kGradientRows = 128;  // listed tokens of a tile, each tile with a row of mean_sums and of bias_sums

// The logits of each block's listed tokens, and their gradient.
struct RoutedGradient {
  const void* hidden;  // [T, D] times its token's power of two, of `dtype`, as weight and out
  const void* weight;  // [C, D] the chunk's rows in the order of the blocks
  int32_t dtype;
  const void* bias;  // [C] of the chunk, or null
  int32_t bias_dtype;
  const int32_t* targets;  // [T] places in the order of the blocks
  const float* tokens;     // [kTokenRows, T]
  const float* log_mass;   // [B, N]
  const int64_t* rows;     // [L]
  const int32_t* lists;    // [blocks, T]
  const int32_t* counts;   // [blocks]
  const int32_t* ends;     // [blocks] tiles up to each block's last
  void* out;               // [blocks, T, block]: 0 in the target's column
  float* mean_sums;        // [ceil(T / kGradientRows), C]: sums over a tile's tokens of exp(z) over its sum within the block
  float* bias_sums;        // [ceil(T / kGradientRows), C] of the gradient, or null
  int64_t first, T, D, N, begin, C, blocks, block, stride_hidden, stride_weight_v, stride_weight_d;
  float logit_scale;
  int32_t programs;  // at most as many blocks of threads share the tiles, whose number is read on the device

  ISDAA_FIELDS(hidden, weight, dtype, bias, bias_dtype, targets, tokens, log_mass, rows, lists, counts, ends, out, mean_sums, bias_sums,
               first, T, D, N, begin, C, blocks, block, stride_hidden, stride_weight_v, stride_weight_d, logit_scale, programs)
};

// sums[c] (+)= the sum over the block's listed tokens of g[., c] * hidden, for the chunk's rows from block `skip` on.
struct RoutedWeight {
  const void* g;       // [blocks, T, block], of `dtype`, as hidden
  const void* hidden;  // [T, D]
  int32_t dtype;
  const int32_t* lists;   // [blocks, T]
  const int32_t* counts;  // [blocks]
  float* sums;            // [R, D]
  int64_t skip, T, D, C, R, block, stride_hidden;
  bool is_first;  // nothing is there to add to

  ISDAA_FIELDS(g, hidden, dtype, lists, counts, sums, skip, T, D, C, R, block, stride_hidden, is_first)
};

// sums[i] += the sum over the blocks that token i is routed to, route 2, of g @ weight.
//
// Two kernels, one of which takes a block of the vocabulary for a span of tokens. Where at least kDensePercent of the span's tokens are
// routed to the block, all of them are multiplied, and the products of all such blocks are added up in registers. Elsewhere the listed
// tokens are, and their sums are read and written once a block, which costs more than multiplying them. In both a block of threads alone
// adds to some columns of some tokens, in one order.
struct RoutedHidden {
  const void* g;       // [blocks, T, block], of `dtype`, as weight
  const void* weight;  // [C, D]
  int32_t dtype;
  const int32_t* count;   // [1] live tokens of the call
  const int32_t* lists;   // [blocks, T]
  const int32_t* places;  // [blocks, T]
  const int32_t* starts;  // [blocks, ceil(T / kListStep) + 1]
  float* sums;            // [T, D]
  int64_t blocks, block, first, T, D, C, stride_weight_v, stride_weight_d, stride_sums;
  int32_t step;      // kListStep
  int32_t programs;  // about as many blocks of threads share the spans: what the device holds at once

  ISDAA_FIELDS(g, weight, dtype, count, lists, places, starts, sums, blocks, block, first, T, D, C, stride_weight_v, stride_weight_d,
               stride_sums, step, programs)
};

void routed_gradient(const RoutedGradient& params, cudaStream_t stream);
void routed_weight(const RoutedWeight& params, cudaStream_t stream);
void routed_hidden(const RoutedHidden& params, cudaStream_t stream);

}  // namespace isdaa
