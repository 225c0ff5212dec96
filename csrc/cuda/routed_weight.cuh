// routed_weight: kRows rows of a block times columns of hidden, summed over the tokens of the block's list.
#pragma once
#include "routed_tiles.cuh"

namespace isdaa {

template <class T, int kRows>
using WeightTile = Product<T, kRows, kTileColumns<T>, kTileStep<T>, Order::kAcrossSum, Order::kAcrossSum>;

// Grid: (tiles of D, parts of kRows rows of the blocks).
template <class T, int kRows>
__global__ void __launch_bounds__(kProductThreads, 2) routed_weight_kernel(const __grid_constant__ RoutedWeight p) {
  using Tile = WeightTile<T, kRows>;
  constexpr int K = Tile::K;
  ISDAA_DYNAMIC_SHARED(shared);
  const int parts = (int)p.block / kRows, first_row = blockIdx.y % parts * kRows, first_d = blockIdx.x * Tile::N;
  const int64_t b = p.skip + blockIdx.y / parts;
  const int count = p.counts[b];
  const Matrix<T> g(static_cast<const T*>(p.g) + b * p.T * p.block, p.block, 1, p.block), hidden(p.hidden, p.stride_hidden, 1, p.D);
  RowLoader<typename Tile::A, RowsOfSum<K>> of_g(g, {count, first_row});
  RowLoader<typename Tile::B, ListedRowsOfSum<K>> of_hidden(hidden, {p.lists + b * p.T, count, first_d});
  Tile product;
  product.clear();
  product_tile(product, of_g, of_hidden, (count + K - 1) / K, shared);

  float* to[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int64_t within = first_row + product.row(i), c = (b - p.skip) * p.block + within;
    to[i] = b * p.block + within < p.C && c < p.R ? p.sums + c * p.D + first_d : nullptr;
  }
  add_tile(product, to, p.D - first_d, pairs_aligned(p.sums, p.D), p.is_first);
}

}  // namespace isdaa
