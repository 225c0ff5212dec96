// routed_hidden: a span of tokens and some columns of their sums. Which blocks of the vocabulary either kernel takes: routed.h.
#pragma once
#include "routed_count.cuh"
#include "routed_tiles.cuh"

namespace isdaa {

constexpr int kListedRows = 64, kDenseRows = kListStep;
constexpr int kDensePercent = 25;  // of a span: about where, by count of bytes, all of its tokens cost what the listed ones do

template <class T>
using ListedTile = Product<T, kListedRows, kTileColumns<T>, kTileStep<T>, Order::kAlongSum, Order::kAcrossSum>;
template <class T>
using DenseTile = Product<T, kDenseRows, kTileColumns<T>, kTileStep<T>, Order::kAlongSum, Order::kAcrossSum>;

// A span's part of a block's list.
struct SpanList {
  int block, first, end;
};

// Steps of a span, such that spans and tiles of columns make about as many pairs as there are programs.
template <class T>
__host__ __device__ inline int span_length(const RoutedHidden& p) {
  const int pairs = ((int)p.T + kListStep - 1) / kListStep * (((int)p.D + kTileColumns<T> - 1) / kTileColumns<T>);
  return (pairs + p.programs - 1) / p.programs;
}

struct TokenSpan {
  const int32_t* starts;
  int64_t step, last, steps;
  int first, end;  // tokens

  __device__ __forceinline__ TokenSpan(const RoutedHidden& p, int index, int length)
      : starts(p.starts), steps(((int)p.T + kListStep - 1) / kListStep) {
    const int64_t live = *p.count - p.first < p.T ? *p.count - p.first : p.T;
    step = (int64_t)index * length;
    last = step + length < steps ? step + length : steps;
    first = (int)(step * kListStep);
    end = (int)(last * kListStep < live ? last * kListStep : live);
  }

  __device__ __forceinline__ SpanList list(int64_t b) const {
    return {(int)b, starts[b * (steps + 1) + step], starts[b * (steps + 1) + last]};
  }
  __device__ __forceinline__ bool dense(const SpanList& list) const {
    return (int64_t)(list.end - list.first) * 100 >= (int64_t)(end - first) * kDensePercent;
  }
};

// The tile that is multiplied: rows of a list, kListedRows at a time, then the next list.
struct TileCursor {
  const SpanList* next;
  SpanList at = {0, 0, 0};

  __device__ __forceinline__ void move() {
    at.first += kListedRows;
    if (at.first >= at.end) at = *next++;
  }
};

// Rows of the packed gradient, `steps` (a power of two) of kStep columns a tile; moves the cursor.
template <int kStep>
struct ListedGradient {
  static constexpr Ask kAsk = Ask::kNow;
  TileCursor* cursor;
  int T, steps;

  __device__ __forceinline__ void begin(int step) {
    if ((step & (steps - 1)) == 0) cursor->move();
  }
  __device__ __forceinline__ int row(int, int r) const {
    return cursor->at.first + r < cursor->at.end ? cursor->at.block * T + cursor->at.first + r : -1;
  }
  __device__ __forceinline__ int column(int step) const { return (step & (steps - 1)) * kStep; }
};

// Rows of weight of the block that the cursor is at.
template <int kStep>
struct ListedWeight {
  static constexpr Ask kAsk = Ask::kNow;
  const TileCursor* cursor;
  int block, C, steps, first_column;

  __device__ __forceinline__ void begin(int) {}
  __device__ __forceinline__ int row(int step, int r) const {
    const int c = cursor->at.block * block + (step & (steps - 1)) * kStep + r;
    return c < C ? c : -1;
  }
  __device__ __forceinline__ int column(int) const { return first_column; }
};

// Adds a tile's products to the sums of its tokens once its last step is multiplied. The next tile's tokens may be the same, in other
// threads: a barrier lies between.
template <class Tile>
struct AddListed {
  Tile& product;
  const RoutedHidden& p;
  TileCursor cursor;
  int steps, first_column;
  float* to[Tile::kRows];

  __device__ __forceinline__ void operator()(int step) {
    if ((step & (steps - 1)) == 0) find_rows();
    if ((step & (steps - 1)) != steps - 1) return;
    add_tile(product, to, p.D - first_column, pairs_aligned(p.sums, p.stride_sums), false);
    product.clear();
  }

  __device__ __forceinline__ void find_rows() {
    cursor.move();
    product.settle();
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      const int place = cursor.at.first + product.row(i);
      const int64_t token = place < cursor.at.end ? p.lists[cursor.at.block * p.T + place] : -1;
      to[i] = token >= 0 ? p.sums + token * p.stride_sums + first_column : nullptr;
    }
  }
};

// Grid: (tiles of D, spans).
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) routed_hidden_listed_kernel(const __grid_constant__ RoutedHidden p) {
  using Tile = ListedTile<T>;
  ISDAA_DYNAMIC_SHARED(shared);
  __shared__ SpanList lists[kProductThreads];
  __shared__ int shared_counts[kProductThreads / kWarp];
  const TokenSpan span(p, blockIdx.y, span_length<T>(p));
  if (span.end <= span.first) return;
  const Matrix<T> g(p.g, p.block, 1, p.block), weight(p.weight, p.stride_weight_v, p.stride_weight_d, p.D);
  const int steps = (int)p.block / Tile::K, first_column = blockIdx.x * Tile::N;
  Tile product;
  product.clear();
  for (int64_t first = 0; first < p.blocks; first += kProductThreads) {
    const SpanList own = first + threadIdx.x < p.blocks ? span.list(first + threadIdx.x) : SpanList{0, 0, 0};
    const bool listed = own.end > own.first && !span.dense(own);
    int all;
    const int place = count_before<kProductThreads>(listed, shared_counts, all);
    if (listed) lists[place] = own;
    const int own_tiles = listed ? (own.end - own.first + kListedRows - 1) / kListedRows : 0;
    const int tiles = block_sum<kProductThreads>(own_tiles, shared_counts);  // after its barriers all lists are there

    TileCursor cursor = {lists};
    RowLoader<typename Tile::A, ListedGradient<Tile::K>> a(g, {&cursor, (int)p.T, steps});
    RowLoader<typename Tile::B, ListedWeight<Tile::K>> b(weight, {&cursor, (int)p.block, (int)p.C, steps, first_column});
    AddListed<Tile> add = {product, p, {lists}, steps, first_column, {}};
    product_tile(product, a, b, tiles * steps, shared, add);
  }
}

// Rows of the packed gradient of consecutive tokens, 0 for one that is not routed to the step's block.
template <int kStep>
struct DenseGradient {
  static constexpr Ask kAsk = Ask::kAhead;
  const int32_t *blocks, *places;
  int count, steps, first, end, T;

  __device__ __forceinline__ void begin(int) {}
  __device__ __forceinline__ int row(int step, int r) const {
    const int index = step / steps;
    if (index >= count || first + r >= end) return -1;
    const int place = places[(int64_t)blocks[index] * T + first + r];
    return place < 0 ? -1 : blocks[index] * T + place;
  }
  __device__ __forceinline__ int column(int step) const { return (step & (steps - 1)) * kStep; }
};

template <int kStep>
struct DenseWeight {
  static constexpr Ask kAsk = Ask::kNow;
  const int32_t* blocks;
  int block, C, steps, first_column;

  __device__ __forceinline__ void begin(int) {}
  __device__ __forceinline__ int row(int step, int r) const {
    const int c = blocks[step / steps] * block + (step & (steps - 1)) * kStep + r;
    return c < C ? c : -1;
  }
  __device__ __forceinline__ int column(int) const { return first_column; }
};

// Grid: (tiles of D, tiles of kDenseRows tokens).
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) routed_hidden_dense_kernel(const __grid_constant__ RoutedHidden p) {
  using Tile = DenseTile<T>;
  ISDAA_DYNAMIC_SHARED(shared);
  __shared__ int blocks[kProductThreads];
  __shared__ int shared_counts[kProductThreads / kWarp];
  const int length = span_length<T>(p);
  const TokenSpan span(p, blockIdx.y / length, length);
  const int first_token = blockIdx.y * kDenseRows, first_column = blockIdx.x * Tile::N, steps = (int)p.block / Tile::K;
  if (span.end <= first_token) return;
  const Matrix<T> g(p.g, p.block, 1, p.block), weight(p.weight, p.stride_weight_v, p.stride_weight_d, p.D);
  Tile product;
  product.clear();
  bool any = false;
  for (int64_t first = 0; first < p.blocks; first += kProductThreads) {
    const SpanList own = first + threadIdx.x < p.blocks ? span.list(first + threadIdx.x) : SpanList{0, 0, 0};
    const bool dense = own.end > own.first && span.dense(own);
    int all;
    const int place = count_before<kProductThreads>(dense, shared_counts, all);
    if (dense) blocks[place] = own.block;
    __syncthreads();
    RowLoader<typename Tile::A, DenseGradient<Tile::K>> a(g, {blocks, p.places, all, steps, first_token, span.end, (int)p.T});
    RowLoader<typename Tile::B, DenseWeight<Tile::K>> b(weight, {blocks, (int)p.block, (int)p.C, steps, first_column});
    product_tile(product, a, b, all * steps, shared);
    any = any || all > 0;
  }
  if (!any) return;
  float* to[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int64_t token = first_token + product.row(i);
    to[i] = token < span.end ? p.sums + token * p.stride_sums + first_column : nullptr;
  }
  add_tile(product, to, p.D - first_column, pairs_aligned(p.sums, p.stride_sums), false);
}

}  // namespace isdaa
