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

template <typename T>
struct FoldTile {
  T* logits;               // [N, V] in: the product; out: z (scratch)
  int64_t logits_stride;   // between rows
  int64_t rows, columns;
  HeadTransform<T> head;
  const int64_t* target;   // [N] column of the target within this tile; outside [0, V) elsewhere
  T* running_max;          // [N] in and out
  double* running_sum;     // [N] in and out: sum of exp(z - running_max)
  T* target_logit;         // [N] written where the target lies in this tile
  T* kept;                 // [N, V] a copy of the product, or null
  int64_t kept_stride;
  int threads;
};

template <typename T>
struct GradientTile {
  const T* logits;             // the product: row i begins at logits + row_index[i] * logits_stride
  const int64_t* row_index;    // [N], or null: row i is i
  int64_t logits_stride;
  T* gradient;                 // [N, V] out: d(sum of coefficient * logprob) / d(product); may be `logits`
  int64_t gradient_stride;
  int64_t rows, columns;
  HeadTransform<T> head;
  const int64_t* target;       // [N] as above
  const double* lse;           // [N] log-sum-exp of z over the whole vocabulary
  const T* coefficient;        // [N] upstream gradient of the log-prob, scaled by a power of two into [1, 2)
  int threads;
};

}  // namespace isdaa
