// routed_gradient: tiles of kGradientRows listed tokens and kColumns rows of their block.
#pragma once
#include "any.cuh"
#include "head.cuh"
#include "routed_tiles.cuh"

namespace isdaa {

struct alignas(16) ListedToken {
  float unscale, slope, lse_high, lse_low;
  float share;   // log of the block's mass; -inf: none, not counted in its mean distribution
  float factor;  // that the gradient is times exp(z) over its sum within the block; where there is no mass, times p
  float scale;
  int target;  // place within the block, if there it is
};

struct TileAt {
  int block, tile;   // of the chunk, within the block's list
  int first_column;  // within the block
  int listed;        // tokens from the tile's first on
};

// The item-th tile, of `parts` parts each; in shared memory: it would sit in registers all through the product.
__device__ __forceinline__ void find_tile(const RoutedGradient& p, int item, int kColumns, int* shared, TileAt& at) {
  const int parts = (int)p.block / kColumns, tile = item / parts;
  int passed = 0;
  for (int b = threadIdx.x; b < (int)p.blocks; b += kProductThreads) passed += p.ends[b] <= tile;
  passed = block_sum<kProductThreads>(passed, shared);
  if (threadIdx.x == 0) {
    const int within = tile - (passed ? p.ends[passed - 1] : 0);
    at = {passed, within, item % parts * kColumns, p.counts[passed] - within * kGradientRows};
  }
  __syncthreads();
}

__device__ __forceinline__ ListedToken load_token(const RoutedGradient& p, int64_t b, int64_t place) {
  const int64_t i = p.lists[b * p.T + place], T = p.T;
  ListedToken token;
  token.unscale = p.tokens[kUnscale * T + i];
  token.slope = p.logit_scale * p.tokens[kInverseTemperature * T + i];
  token.lse_high = p.tokens[kLseHigh * T + i];
  token.lse_low = p.tokens[kLseLow * T + i];
  token.scale = p.tokens[kScale * T + i];
  token.share = p.log_mass[((int)p.begin / (int)p.block + b) * p.N + p.rows[p.first + i]];
  token.factor = p.tokens[kPlain * T + i] * token.slope * (token.share > kLowest ? expf(token.share) : 1.0f);
  token.target = (int)(p.targets[i] - p.begin - b * p.block);
  return token;
}

// What a tile needs after its product, where the product's factors were. Rows end with 8 numbers that shift the banks.
template <int kColumns>
struct ProductsOfTile {
  static constexpr int kWidth = kColumns + 8, kPairs = kColumns / 2, kGroups = kProductThreads / kPairs, kRows = kGradientRows / kGroups;
  float products[kGradientRows][kWidth];
  ListedToken tokens[kGradientRows];
  float bias[kColumns], means[kGroups][kColumns], totals[kGroups][kColumns];  // sums of a group of rows
};

template <class Tile>
__device__ __forceinline__ void put_products(Tile& product, const RoutedGradient& p, const TileAt& at, ProductsOfTile<Tile::N>& tile) {
  if ((int)threadIdx.x < at.listed && threadIdx.x < kGradientRows)
    tile.tokens[threadIdx.x] = load_token(p, at.block, at.tile * kGradientRows + threadIdx.x);
  if (threadIdx.x < Tile::N) {
    const int64_t c = at.block * p.block + at.first_column + threadIdx.x;
    tile.bias[threadIdx.x] = p.bias && c < p.C ? load_any(p.bias, p.bias_dtype, c) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumns; j += 2) {
      const float pair[2] = {product.at(i, j), product.at(i, j + 1)};
      store_wide<2>(&tile.products[product.row(i)][product.column(j)], pair);
    }
  __syncthreads();
}

// Turns products into their gradient, two neighbouring columns and a group of rows a thread, and writes it and its sums over tokens.
template <class T, int kColumns>
__device__ __forceinline__ void finish_gradient(
    ProductsOfTile<kColumns>& tile, const RoutedGradient& p, const TileAt& at) {
  using Products = ProductsOfTile<kColumns>;
  const int column = threadIdx.x % Products::kPairs * 2, group = threadIdx.x / Products::kPairs, within = at.first_column + column;
  const int first_c = at.block * (int)p.block, width = (int)p.C - first_c;
  const int end = at.listed < (group + 1) * Products::kRows ? at.listed : (group + 1) * Products::kRows;
  T* const out = static_cast<T*>(p.out) + (at.block * p.T + at.tile * kGradientRows) * p.block + within;
  float means[2] = {0.0f, 0.0f}, totals[2] = {0.0f, 0.0f};
#pragma unroll 2
  for (int row = group * Products::kRows; row < end; ++row) {
    const ListedToken token = tile.tokens[row];
    const bool counted = token.share > kLowest;
    const float share = counted ? token.share : 0.0f;
    float g[2];
    load_wide<2>(&tile.products[row][column], g);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float z = (g[e] * token.unscale + tile.bias[column + e]) * token.slope;
      const float within_block = expf(((z - token.lse_high) - token.lse_low) - share);
      means[e] += counted ? within_block : 0.0f;
      g[e] = within + e < width && within + e != token.target ? within_block * token.factor : 0.0f;
      totals[e] += g[e] * token.scale;
    }
    store_wide<2>(out + row * p.block, g);
  }
  store_wide<2>(&tile.means[group][column], means);
  store_wide<2>(&tile.totals[group][column], totals);
  __syncthreads();
  const int c = first_c + at.first_column + (int)threadIdx.x;
  if (threadIdx.x >= kColumns || c >= p.C) return;
  float mean = 0.0f, total = 0.0f;
  for (int of = 0; of < Products::kGroups; ++of) mean += tile.means[of][threadIdx.x], total += tile.totals[of][threadIdx.x];
  p.mean_sums[at.tile * p.C + c] = mean;
  if (p.bias_sums) p.bias_sums[at.tile * p.C + c] = total;
}

template <class T, int kColumns>
using GradientTile = Product<T, kGradientRows, kColumns, kTileStep<T>, Order::kAlongSum, Order::kAlongSum>;

// Grid: (programs).
template <class T, int kColumns>
__global__ void __launch_bounds__(kProductThreads, 2) routed_gradient_kernel(const __grid_constant__ RoutedGradient p) {
  using Tile = GradientTile<T, kColumns>;
  constexpr int K = Tile::K;
  ISDAA_DYNAMIC_SHARED(shared);
  __shared__ int shared_counts[kProductThreads / kWarp];
  __shared__ TileAt at;
  __shared__ int items;
  const Matrix<T> hidden(p.hidden, p.stride_hidden, 1, p.D), weight(p.weight, p.stride_weight_v, p.stride_weight_d, p.D);
  if (threadIdx.x == 0) items = p.ends[p.blocks - 1] * ((int)p.block / kColumns);
  __syncthreads();
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    find_tile(p, item, kColumns, shared_counts, at);
    RowLoader<typename Tile::A, ListedRowsOfTile<K>> a(hidden, {p.lists + at.block * p.T + at.tile * kGradientRows, 0, at.listed});
    RowLoader<typename Tile::B, RowsOfTile<K>> b(weight, {(int)(at.block * p.block) + at.first_column, (int)p.C});
    Tile product;
    product.clear();
    product_tile(product, a, b, ((int)p.D + K - 1) / K, shared);
    auto& products = *reinterpret_cast<ProductsOfTile<kColumns>*>(shared);
    put_products(product, p, at, products);
    finish_gradient<T>(products, p, at);
  }
}

template <class T, int kColumns>
size_t gradient_shared_bytes() {
  const size_t factors = shared_bytes<GradientTile<T, kColumns>>(), products = sizeof(ProductsOfTile<kColumns>);
  return factors > products ? factors : products;
}

}  // namespace isdaa
