// The two products of what is not routed. Their factor rest[b, i] is made on its way into shared memory.
#pragma once
#include "head.cuh"
#include "rest.h"
#include "routed_tiles.cuh"

namespace isdaa {

constexpr int kRestRows = 64, kRestStep = 32;

// Coefficient and place in log_mass of a token of the slab; a coefficient of 0 leaves it out.
struct RestToken {
  int64_t n = 0;
  float coefficient = 0.0f;
};

template <class Params>
__device__ __forceinline__ RestToken load_rest_token(const Params& p, int64_t i, int live) {
  if (i >= live) return {};
  return {p.rows[p.first + i], p.tokens[kPlain * p.T + i] * (p.logit_scale * p.tokens[kInverseTemperature * p.T + i])};
}

// What rest[b, i] is made of, read early and used late.
template <int kLeast>
struct RestPair {
  float share;
  int kind;

  template <class Params>
  __device__ __forceinline__ void load(const Params& p, const RestToken& token, int64_t b, int64_t i) {
    const bool here = b < p.B && token.coefficient != 0.0f;
    kind = here ? p.route[b * p.L + p.first + i] : kLeast;
    share = here ? p.log_mass[b * p.N + token.n] : kLowest;
  }
  __device__ __forceinline__ float value(float coefficient) const { return kind < kLeast ? expf(share) * coefficient : 0.0f * coefficient; }
};

// Tiles that an fp32 factor takes: its upper and its lower half, or itself.
template <class T>
constexpr int kHalves = sizeof(T) == 2 ? 2 : 1;

template <class Tile, int kCount>
__device__ __forceinline__ void store_halves(typename Tile::T* to, const float (&x)[kCount]) {
  using T = typename Tile::T;
  Pack<kCount, T> high, low;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    high.value[e] = narrow<T>(x[e]);
    low.value[e] = narrow<T>(x[e] - widen(high.value[e]));
  }
  *reinterpret_cast<Pack<kCount, T>*>(to) = high;
  if (kHalves<T> == 2) *reinterpret_cast<Pack<kCount, T>*>(to + Tile::kSize) = low;
}

// kRestRows blocks x kRestStep tokens of a step, a lane a token.
template <class Tile_>
struct RestOfBlocks {
  using Tile = Tile_;
  using T = typename Tile::T;
  static constexpr int kTiles = kHalves<T>, kWarps = kProductThreads / kWarp, kCount = kRestRows / kWarps;
  static_assert(kRestStep == kWarp && Tile::kRows == kRestRows && Tile::kColumns == kRestStep);

  const RestWeight& p;
  int64_t first_block;
  int live;
  RestToken token;
  RestPair<1> pairs[kCount];
  float coefficient;

  __device__ __forceinline__ void start() { token = load_rest_token(p, lane_index(), live); }

  __device__ __forceinline__ void fetch(int step, T*) {
    const int64_t i = (int64_t)step * kRestStep + lane_index();
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn) pairs[turn].load(p, token, first_block + warp_index() + turn * kWarps, i);
    coefficient = token.coefficient;
    token = load_rest_token(p, i + kRestStep, live);
  }

  __device__ __forceinline__ void place(T* tile) {
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn) {
      const float x[1] = {pairs[turn].value(coefficient)};
      store_halves<Tile>(tile + Tile::place_of(warp_index() + turn * kWarps, lane_index()), x);
    }
  }
};

template <class T>
using RestWeightTile = Product<T, kRestRows, kTileColumns<T>, kRestStep, Order::kAlongSum, Order::kAcrossSum>;

// Grid: (tiles of D, tiles of kRestRows blocks).
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) rest_weight_kernel(const __grid_constant__ RestWeight p) {
  using Tile = RestWeightTile<T>;
  ISDAA_DYNAMIC_SHARED(shared);
  const int live = (int)live_tokens(p.count, p.first, p.T), first_d = blockIdx.x * Tile::N;
  const int64_t first_block = (int64_t)blockIdx.y * kRestRows;
  const Matrix<T> hidden(p.hidden, p.stride_hidden, 1, p.D);
  RestOfBlocks<typename Tile::A> a = {p, first_block, live, {}, {}, 0.0f};
  RowLoader<typename Tile::B, RowsOfSum<kRestStep>> b(hidden, {live, first_d});
  Tile product;
  product.clear();
  product_tile(product, a, b, (live + kRestStep - 1) / kRestStep, shared);

  float* to[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int64_t block = first_block + product.row(i);
    to[i] = block < p.B ? p.sums + block * p.D + first_d : nullptr;
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j)
      if (p.is_first) product.at(i, j) += *p.poison;
  }
  add_tile(product, to, p.D - first_d, pairs_aligned(p.sums, p.D), p.is_first);
}

// The same for a few fp32 columns. Grid: (B, D).
__global__ void __launch_bounds__(kProductThreads) rest_weight_narrow_kernel(const __grid_constant__ RestWeight p) {
  __shared__ float shared_sums[kProductThreads / kWarp];
  const int live = (int)live_tokens(p.count, p.first, p.T);
  const int64_t b = blockIdx.x, d = blockIdx.y;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < live; i += kProductThreads) {
    const RestToken token = load_rest_token(p, i, live);
    RestPair<1> pair;
    pair.load(p, token, b, i);
    sum += pair.value(token.coefficient) * static_cast<const float*>(p.hidden)[i * p.stride_hidden + d];
  }
  sum = block_sum<kProductThreads>(sum, shared_sums);
  float* const to = p.sums + b * p.D + d;
  if (threadIdx.x == 0) *to = (p.is_first ? *p.poison : *to) + sum;
}

// kRestStep blocks of a step x kRestRows tokens.
template <class Tile_>
struct RestOfTokens {
  using Tile = Tile_;
  using T = typename Tile::T;
  static constexpr int kTiles = kHalves<T>, kAtOnce = kProductThreads / kRestRows, kCount = kRestStep / kAtOnce;
  static_assert(Tile::kRows == kRestStep && Tile::kColumns == kRestRows);

  const RestHidden& p;
  int64_t i;
  RestToken token;
  RestPair<2> pairs[kCount];

  __device__ __forceinline__ void start() {}

  __device__ __forceinline__ void fetch(int step, T*) {
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn)
      pairs[turn].load(p, token, (int64_t)step * kRestStep + threadIdx.x / kRestRows + turn * kAtOnce, i);
  }

  __device__ __forceinline__ void place(T* tile) {
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn) {
      const float x[1] = {pairs[turn].value(token.coefficient)};
      store_halves<Tile>(tile + Tile::place_of(threadIdx.x / kRestRows + turn * kAtOnce, threadIdx.x % kRestRows), x);
    }
  }
};

// Rows of an fp32 matrix, the rows of the sum, on their way into halves.
template <class Tile_>
struct SplitRows {
  using Tile = Tile_;
  using T = typename Tile::T;
  static constexpr int kTiles = kHalves<T>, kAtOnce = kProductThreads / Tile::kPacks, kCount = Tile::kRows / kAtOnce, kPack = Tile::kPack;

  Matrix<float> matrix;
  int64_t rows, first_column;
  float numbers[kCount][kPack];

  __device__ __forceinline__ SplitRows(const Matrix<float>& matrix, int64_t rows, int64_t first_column)
      : matrix(matrix), rows(rows), first_column(first_column) {}

  __device__ __forceinline__ void start() {}

  __device__ __forceinline__ void fetch(int step, T*) {
    const int64_t column = first_column + threadIdx.x % Tile::kPacks * kPack;
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn) {
      const int64_t row = (int64_t)step * Tile::kRows + threadIdx.x / Tile::kPacks + turn * kAtOnce;
      const float* from = matrix.data + row * matrix.stride + column;
      const bool whole = matrix.wide && row < rows && column + kPack <= matrix.columns;
#pragma unroll
      for (int e = 0; e < kPack; e += 4) {
        float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (whole) load_wide<4>(from + e, four);
        else
          for (int f = 0; f < 4; ++f)
            if (row < rows && column + e + f < matrix.columns) four[f] = from[e + f];
        for (int f = 0; f < 4; ++f) numbers[turn][e + f] = four[f];
      }
    }
  }

  __device__ __forceinline__ void place(T* tile) {
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn)
      store_halves<Tile>(tile + Tile::place(threadIdx.x / Tile::kPacks + turn * kAtOnce, threadIdx.x % Tile::kPacks), numbers[turn]);
  }
};

template <class T>
using RestHiddenTile = Product<T, kRestRows, kTileColumns<T>, kRestStep, Order::kAcrossSum, Order::kAcrossSum>;

// Grid: (tiles of D, tiles of kRestRows tokens).
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) rest_hidden_kernel(const __grid_constant__ RestHidden p) {
  using Tile = RestHiddenTile<T>;
  ISDAA_DYNAMIC_SHARED(shared);
  const int live = (int)live_tokens(p.count, p.first, p.T), first_token = blockIdx.y * kRestRows, first_d = blockIdx.x * Tile::N;
  if (first_token >= live) return;
  const int64_t i = first_token + threadIdx.x % kRestRows;
  RestOfTokens<typename Tile::A> a = {p, i, load_rest_token(p, i, live), {}};
  SplitRows<typename Tile::B> b(Matrix<float>(p.mean, p.D, 1, p.D), p.B, first_d);
  Tile product;
  product.clear();
  product_tile(product, a, b, (int)((p.B + kRestStep - 1) / kRestStep), shared);

  float* to[Tile::kRows];
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int64_t token = first_token + product.row(r);
    to[r] = token < live ? p.sums + token * p.stride_sums + first_d : nullptr;
  }
  add_tile(product, to, p.D - first_d, pairs_aligned(p.sums, p.stride_sums), false);
}

}  // namespace isdaa
