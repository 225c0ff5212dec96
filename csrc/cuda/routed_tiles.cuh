// What the routed kernels share: tiles by dtype, and rows that follow each other or a list.
#pragma once
#include "product_tile.cuh"
#include "routed.h"

namespace isdaa {

// Columns of a tile and the step along its sum. Gathered rows come through the L2 cache: tiles of 128 x 128 do 64 flop a byte. fp32 factors
// are multiplied without tensor cores, which takes its time whatever the tile.
template <class T>
constexpr int kTileColumns = sizeof(T) == 2 ? 128 : 64;
template <class T>
constexpr int kTileStep = sizeof(T) == 2 ? 64 : 32;

// The tile's rows are the rows [first, end) of the matrix, all columns of which are summed over.
template <int kStep>
struct RowsOfTile {
  static constexpr Ask kAsk = Ask::kNow;
  int first, end;

  __device__ __forceinline__ void begin(int) {}
  __device__ __forceinline__ int row(int, int r) const { return first + r < end ? first + r : -1; }
  __device__ __forceinline__ int column(int step) const { return step * kStep; }
};

// The same of rows list[first], list[first + 1], ...
template <int kStep>
struct ListedRowsOfTile {
  static constexpr Ask kAsk = Ask::kOnce;
  const int32_t* list;
  int first, end;

  __device__ __forceinline__ void begin(int) {}
  __device__ __forceinline__ int row(int, int r) const { return first + r < end ? list[first + r] : -1; }
  __device__ __forceinline__ int column(int step) const { return step * kStep; }
};

// The rows [0, end) of the matrix are summed over, columns from `first_column` on are the tile's own.
template <int kStep>
struct RowsOfSum {
  static constexpr Ask kAsk = Ask::kNow;
  int end, first_column;

  __device__ __forceinline__ void begin(int) {}
  __device__ __forceinline__ int row(int step, int r) const { return step * kStep + r < end ? step * kStep + r : -1; }
  __device__ __forceinline__ int column(int) const { return first_column; }
};

// The same of rows list[0], list[1], ...
template <int kStep>
struct ListedRowsOfSum {
  static constexpr Ask kAsk = Ask::kAhead;
  const int32_t* list;
  int end, first_column;

  __device__ __forceinline__ void begin(int) {}
  __device__ __forceinline__ int row(int step, int r) const { return step * kStep + r < end ? list[step * kStep + r] : -1; }
  __device__ __forceinline__ int column(int) const { return first_column; }
};

// sums (+)= the tile: the thread's row i is added to to[i], null for none, from the tile's first column on, of which there are `columns`.
// Everything is read before anything is written, so that the reads wait for memory together.
template <class Product>
__device__ __forceinline__ void add_tile(
    Product& product, float* const (&to)[Product::kRows], int64_t columns, bool aligned, bool replace) {
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kColumns; j += 2) {
      const int column = product.column(j);
      if (replace || !to[i]) continue;
      float before[2] = {0.0f, 0.0f};
      if (aligned && column + 1 < columns) load_wide<2>(to[i] + column, before);
      else
        for (int e = 0; e < 2; ++e) before[e] = column + e < columns ? to[i][column + e] : 0.0f;
      product.at(i, j) += before[0], product.at(i, j + 1) += before[1];
    }
#pragma unroll
  for (int i = 0; i < Product::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kColumns; j += 2) {
      const int column = product.column(j);
      if (!to[i]) continue;
      const float pair[2] = {product.at(i, j), product.at(i, j + 1)};
      if (aligned && column + 1 < columns) store_wide<2>(to[i] + column, pair);
      else
        for (int e = 0; e < 2; ++e)
          if (column + e < columns) to[i][column + e] = pair[e];
    }
}

__device__ __forceinline__ bool pairs_aligned(const float* rows, int64_t stride) {
  return stride % 2 == 0 && reinterpret_cast<uintptr_t>(rows) % 8 == 0;
}

}  // namespace isdaa
