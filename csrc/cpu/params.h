// The contract between bindings, host loops and row kernels of the CPU backend. No torch header.
// Letters: N rows (tokens) of a tile, V columns (vocabulary rows) of a tile.
#pragma once
#include <cstdint>

#include "../fields.h"

namespace isdaa {

// z = softcap * tanh(logit_scale * (x + bias) / softcap) / temperature, where x is what the matrix product left.
template <typename T>
struct HeadTransform {
  const T* bias;                 // [V] of this tile, or null
  const T* inverse_temperature;  // [N], or null: then `constant_inverse_temperature` holds for all
  T constant_inverse_temperature;
  T logit_scale;
  T softcap;  // 0: none
};

// Running sums beside the log-sum-exp, over d = z - running_max; each null where nobody asked for it.
template <typename T>
struct FoldStats {
  double* entropy_sum;  // [N] sum of exp(d) * -d
  double* square_sum;   // [N] sum of exp(2 d)
  double* logit_sum;    // [N] sum of z
  T* top;               // [N, top_k] the largest z so far, descending; -inf where there were fewer
  int64_t top_k;

  bool sums() const { return entropy_sum || square_sum || logit_sum; }
};

template <typename T>
struct FoldTile {
  const T* logits;           // the product: row i begins at logits + row_index[i] * logits_stride
  const int64_t* row_index;  // [N], or null: row i is i
  int64_t logits_stride;
  T* scratch;                // [N, V] may receive z; may be `logits`
  int64_t scratch_stride;
  int64_t rows, columns;
  HeadTransform<T> head;
  const int64_t* target;   // [N] column of the target within this tile; outside [0, V) elsewhere
  T* running_max;          // [N] in and out
  double* running_sum;     // [N] in and out: sum of exp(z - running_max)
  T* target_logit;         // [N] written where the target lies in this tile
  T* kept;                 // [N, V] a copy of the product, or null
  int64_t kept_stride;
  FoldStats<T> stats;
  T* block_lse;              // [V / block, N] log-sum-exp of each block of columns, or null
  int64_t block_lse_stride;
  int64_t block;             // divides where a tile begins
  int threads;
};

template <typename T>
struct GradientTile {
  const T* logits;             // the product: row i begins at logits + row_index[i] * logits_stride
  const int64_t* row_index;    // [N], or null: row i is i
  int64_t logits_stride;
  T* gradient;                 // out: d loss / d(product); row i begins at gradient + gradient_index[i] * gradient_stride; may be `logits`
  const int64_t* gradient_index;  // [N], or null: row i is i
  int64_t gradient_stride;
  int64_t rows, columns;
  HeadTransform<T> head;
  const int64_t* target;       // [N] as above
  const double* lse;           // [N] log-sum-exp of z over the whole vocabulary
  // d loss / d z = scale * (coefficient * (onehot - p) + p * (prob + log_prob * log p) + flat); scale is the power of two that brings the
  // largest of a token's coefficients into [1, 2).
  const T* coefficient;        // [N]
  const T* prob;               // [N], or null: 0
  const T* log_prob;           // [N], or null: 0
  const T* flat;               // [N], or null: 0
  const T* scale;              // [N], or null: 1 (the caller multiplies its sums)

  bool statistics() const { return prob || log_prob || flat; }
  int threads;
};

// Numbers of the tokens of a routed backward. N tokens, B blocks of vocabulary.
template <typename T>
struct RoutedTokens {
  const T* block_lse;       // [B, .]: token n stands in column position[n]
  int64_t block_lse_stride;
  const int64_t* position;  // [N]
  const double* lse;        // [N]
  const T* coefficient;     // [N] of p in the gradient of z
  const T* slope;           // [N] dz / d(product)
  const int64_t* target;    // [N] place of the target in the order of the blocks
  int64_t tokens, block;

  T lse_of_block(int64_t b, int64_t n) const { return block_lse[b * block_lse_stride + position[n]]; }
  // 0 for a block without probability, so that exp(z - it) is 0 there, not exp(-inf + inf)
  T finite_block_lse(int64_t b, int64_t n) const { return lse_of_block(b, n) == -__builtin_inf() ? T(0) : lse_of_block(b, n); }
  T mass(int64_t b, int64_t n) const { return (T)__builtin_exp((double)lse_of_block(b, n) - lse[n]); }
};

enum Route : uint8_t { kNowhere = 0, kWeight = 1, kWeightAndHidden = 2 };

// The rules of isdaa_kernels.routing.
template <typename T>
struct RouteBlocks {
  RoutedTokens<T> token;
  T limit;           // tolerance * scale
  double row_share;
  int64_t blocks;
  uint8_t* route;    // [B, N] out
  T* rest;           // [B, N] out: mass * coefficient * slope where the route is kNowhere, else 0
  int64_t* weight_count;  // [B] out: tokens routed to the block
  int64_t* hidden_count;  // [B] out: of these, tokens whose hidden state's gradient is
  int threads;
};

// The products of T of a block's tokens with its vocabulary rows become the gradients of these products.
template <typename T>
struct RoutedTile {
  RoutedTokens<T> token;
  HeadTransform<T> head;
  const int64_t* listed;  // [T] token of each row
  int64_t count, to_hidden, columns, b;
  T* product;            // [T, C] in and out
  const T* entry;        // [N] gradient of z in the target's column
  T* rest;               // [N] of the block: filled in for the rows from `to_hidden` on
};

// One block: its tokens are listed, the products of their hidden states with its rows of weight made and turned into gradients, and these
// multiplied into the gradients of hidden and weight; in pieces of tokens.
template <typename T>
struct RoutedBlock {
  RoutedTokens<T> token;
  const uint8_t* route;  // [N] of the block
  int64_t weight_count, hidden_count, columns, b;
  const T* bias;         // [C], or null
  const T* inverse_temperature;
  T constant_inverse_temperature, logit_scale, softcap;
  const T* entry;        // [N] gradient of z in the target's column
  T* rest;               // [N] of the block
  const T* hidden;       // token n is row[n]
  const int64_t* row;    // [N]
  int64_t hidden_stride, width;
  const T* weight_columns;  // panels [D, C]
  const T* weight_rows;     // panels [C, D]
  T* d_hidden;           // rows as in `hidden`, `width` apart, which the block's gradient joins; or null
  T* d_weight;           // [C, D] out, or null
  T* d_bias;             // [threads, C]: the first row out, the others scratch; or null
  T* sums;               // [threads, C]: sums over the tokens of exp(z - block_lse); the first row out, the others scratch
  int64_t piece;         // tokens at a time
  int64_t* listed;       // [N] scratch
  int64_t* where;        // [N] scratch
  T* product;            // [piece, C] scratch
  T* hidden_panels;      // panels [piece, D], scratch

  RoutedTile<T> tile(int64_t start, int64_t count) const {
    const int64_t to_hidden = hidden_count - start;
    return {token, {bias, inverse_temperature, constant_inverse_temperature, logit_scale, softcap}, listed + start, count, to_hidden, columns, b,
            product, entry, rest};
  }

  ISDAA_FIELDS(token, route, weight_count, hidden_count, columns, b, bias, inverse_temperature, constant_inverse_temperature, logit_scale,
               softcap, entry, rest, hidden, row, hidden_stride, width, weight_columns, weight_rows, d_hidden, d_weight, d_bias, sums, piece,
               listed, where, product, hidden_panels)
};

// The end of a block: its mean distribution, and its rows of the gradient of weight with what they get from the rest.
template <typename T>
struct RoutedBlockEnd {
  T* sums;                // [C] in: of the block's distributions, out: their mean (uniform where there is none)
  int64_t columns, width;
  const T* gradient;      // [C, D] of the routed tokens, or null: no gradient of weight
  const T* rest_hidden;   // [D] hidden states times the rest of their mass
  const int64_t* row;     // [C] where a row of `out` goes, or null: i
  T* out;                 // may be `gradient` where `row` is null
  T limit, first, second;  // out = sum * first * second, 0 where |sum| <= limit
  int threads;
};

}  // namespace isdaa
