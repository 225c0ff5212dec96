#include "routed_cpu.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "row_table.h"

namespace isdaa {
namespace {

constexpr int64_t kWorthThreads = 1 << 13;  // elements

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

void list_tokens(const uint8_t* route, int64_t tokens, int64_t hidden_count, int64_t* listed) {
  int64_t at[] = {0, hidden_count};
  for (int64_t n = 0; n < tokens; ++n)
    if (route[n] != kNowhere) listed[at[route[n] == kWeight]++] = n;
}

template <typename T>
void gather_rows(const RoutedTokens<T>& token, const int64_t* listed, int64_t count, const T* values, int64_t stride, int64_t width,
                 T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count * width >= kWorthThreads)
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(out + i * width, values + token.row[listed[i]] * stride, width * sizeof(T));
}

template <typename T>
void routed_tile(const RoutedTile<T>& p) {
  const RowTable table = chosen_row_table();
  std::fill(p.sums + p.columns, p.sums + p.threads * p.columns, T(0));
#pragma omp parallel num_threads(p.threads) if (p.count * p.columns >= kWorthThreads)
  {
    T* sums = p.sums + omp_get_thread_num() * p.columns;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.count; ++i) {
      if constexpr (sizeof(T) == 4) table.routed_f32(p, i, sums);
      else table.routed_f64(p, i, sums);
    }
  }
  for (int64_t thread = 1; thread < p.threads; ++thread)
    for (int64_t j = 0; j < p.columns; ++j) p.sums[j] += p.sums[thread * p.columns + j];
}

template <typename T>
void finish_block(const RoutedBlock<T>& p) {
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

template <typename T>
void add_rows(const RoutedTokens<T>& token, const int64_t* listed, int64_t count, const T* values, int64_t width, T* out,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count * width >= kWorthThreads)
  for (int64_t i = 0; i < count; ++i) {
    const T* source = values + i * width;
    T* target = out + token.row[listed[i]] * width;
    for (int64_t d = 0; d < width; ++d) target[d] += source[d];
  }
}

#define ISDAA_INSTANTIATE(T)                                                                                                      \
  template void route_blocks<T>(const RouteBlocks<T>&);                                                                           \
  template void routed_tile<T>(const RoutedTile<T>&);                                                                             \
  template void finish_block<T>(const RoutedBlock<T>&);                                                                           \
  template void gather_rows<T>(const RoutedTokens<T>&, const int64_t*, int64_t, const T*, int64_t, int64_t, T*, int); \
  template void add_rows<T>(const RoutedTokens<T>&, const int64_t*, int64_t, const T*, int64_t, T*, int);
ISDAA_INSTANTIATE(float)
ISDAA_INSTANTIATE(double)

}  // namespace isdaa
