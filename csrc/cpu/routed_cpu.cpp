#include "routed_cpu.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "product_cpu.h"
#include "row_table.h"

namespace isdaa {
namespace {

constexpr int64_t kWorthThreads = 1 << 13;  // elements

void routed_row(const RoutedTile<float>& tile, int64_t i, float* sums) { chosen_row_table().routed_f32(tile, i, sums); }
void routed_row(const RoutedTile<double>& tile, int64_t i, double* sums) { chosen_row_table().routed_f64(tile, i, sums); }

// Tokens whose gradient of hidden is routed here, then those of weight alone.
template <typename T>
void list_tokens(const RoutedBlock<T>& p) {
  int64_t at[] = {0, p.hidden_count};
  for (int64_t n = 0; n < p.token.tokens; ++n)
    if (p.route[n] != kNowhere) p.listed[at[p.route[n] == kWeight]++] = n;
  for (int64_t i = 0; i < p.weight_count; ++i) p.where[i] = p.row[p.listed[i]];
}

template <typename T>
void add_to_first(T* rows, int64_t count, int64_t columns) {
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = 0; j < columns; ++j) rows[j] += rows[i * columns + j];
}

// One thread's tokens [begin, end) of a piece: their hidden states are read once and stay near.
template <typename T>
void routed_rows(const RoutedBlock<T>& p, int64_t start, int64_t count, int64_t begin, int64_t end, T* sums, T* d_bias) {
  const auto& kernels = product_table<T>();
  const int64_t* where = p.where + start;
  const Part part{begin, end, 0, ceil_div(p.columns, kernels.panel_width)};
  kernels.multiply({p.hidden, where, p.hidden_stride, false, p.weight_columns, count, p.width, p.columns, p.product, nullptr, p.columns, false},
                   part, nullptr);
  const RoutedTile<T> tile = p.tile(start, count);
  for (int64_t i = begin; i < end; ++i) routed_row(tile, i, sums);
  if (d_bias)
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < p.columns; ++j) d_bias[j] += p.product[i * p.columns + j];
  const int64_t to_hidden = std::min(tile.to_hidden, count);
  if (p.d_hidden && begin < to_hidden)
    kernels.multiply({p.product, nullptr, p.columns, false, p.weight_rows, to_hidden, p.columns, p.width, p.d_hidden, where, p.width, true},
                     {begin, std::min(end, to_hidden), 0, ceil_div(p.width, kernels.panel_width)}, nullptr);
  if (p.d_weight)
    kernels.pack({p.hidden, where, p.hidden_stride, count, p.width, nullptr, false, p.hidden_panels}, begin, end);
}

}  // namespace

template <typename T>
void route_blocks(const RouteBlocks<T>& p) {
  const RowTable table = chosen_row_table();
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<T> weighted(p.token.tokens);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < p.blocks; ++b) {
      if constexpr (sizeof(T) == 4) table.route_f32(p, b, weighted.data());
      else table.route_f64(p, b, weighted.data());
    }
  }
}

template <typename T>
void routed_block(const RoutedBlock<T>& p, int threads) {
  const auto& kernels = product_table<T>();
  list_tokens(p);
  std::fill(p.sums, p.sums + threads * p.columns, T(0));
  if (p.d_bias) std::fill(p.d_bias, p.d_bias + threads * p.columns, T(0));
  if (p.d_weight && p.weight_count == 0) std::fill(p.d_weight, p.d_weight + p.columns * p.width, T(0));
#pragma omp parallel num_threads(threads) if (p.weight_count * p.columns * p.width >= kWorthThreadsToMultiply)
  {
    const int64_t t = omp_get_thread_num(), active = omp_get_num_threads();
    for (int64_t start = 0; start < p.weight_count; start += p.piece) {
      const int64_t count = std::min(p.piece, p.weight_count - start), groups = ceil_div(count, kernels.height);
      const int64_t begin = groups * t / active * kernels.height, end = std::min(groups * (t + 1) / active * kernels.height, count);
      if (begin < end) routed_rows(p, start, count, begin, end, p.sums + t * p.columns, p.d_bias ? p.d_bias + t * p.columns : nullptr);
      if (p.d_weight) {
#pragma omp barrier
        const bool add = start > 0;
        multiply_share<T>({p.product, nullptr, p.columns, true, p.hidden_panels, p.columns, count, p.width, p.d_weight, nullptr, p.width, add}, t,
                          active);
      }
#pragma omp barrier
    }
  }
  add_to_first(p.sums, threads, p.columns);
  if (p.d_bias) add_to_first(p.d_bias, threads, p.columns);
}

template <typename T>
void finish_block(const RoutedBlockEnd<T>& p) {
  T total = 0;
  for (int64_t j = 0; j < p.columns; ++j) total += p.sums[j];
  for (int64_t j = 0; j < p.columns; ++j) p.sums[j] = total > 0 ? p.sums[j] / total : T(1) / p.columns;
  if (!p.gradient) return;
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.columns * p.width >= kWorthThreads)
  for (int64_t j = 0; j < p.columns; ++j) {
    const T* source = p.gradient + j * p.width;
    T* target = p.out + (p.row ? p.row[j] : j) * p.width;
    for (int64_t d = 0; d < p.width; ++d) {
      const T sum = source[d] + p.sums[j] * p.rest_hidden[d];
      target[d] = (std::abs(sum) <= p.limit ? T(0) : sum) * p.first * p.second;
    }
  }
}

#define ISDAA_INSTANTIATE(T)                                                                                                      \
  template void route_blocks<T>(const RouteBlocks<T>&);                                                                           \
  template void routed_block<T>(const RoutedBlock<T>&, int);                                                                     \
  template void finish_block<T>(const RoutedBlockEnd<T>&);
ISDAA_INSTANTIATE(float)
ISDAA_INSTANTIATE(double)

}  // namespace isdaa
