// The contract between bindings, host loops and row kernels of the CPU backend. No torch header.
// Letters: N rows (tokens) of a tile, V columns (vocabulary rows) of a tile.
#pragma once
#include <cstdint>

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
  T* block_lse;              // [N, V / block] log-sum-exp of each block of columns, or null; then no sums of `stats` are taken
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

}  // namespace isdaa
