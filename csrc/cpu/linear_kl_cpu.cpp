#include "linear_kl_cpu.h"

#include "row_table.h"

namespace isdaa {
namespace {

constexpr int64_t kWorthThreads = 1 << 14;  // elements; below, waking a thread costs more than it does

template <typename T>
void each_row(const KlTile<T>& tile, int threads, void (*row_kernel)(const KlTile<T>&, int64_t)) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tile.rows * tile.columns >= kWorthThreads)
  for (int64_t row = 0; row < tile.rows; ++row) row_kernel(tile, row);
}

}  // namespace

template <>
void kl_fold_tile(const KlTile<float>& tile, int threads) { each_row(tile, threads, chosen_row_table().kl_fold_f32); }
template <>
void kl_fold_tile(const KlTile<double>& tile, int threads) { each_row(tile, threads, chosen_row_table().kl_fold_f64); }
template <>
void kl_mixture_tile(const KlTile<float>& tile, int threads) { each_row(tile, threads, chosen_row_table().kl_mixture_f32); }
template <>
void kl_mixture_tile(const KlTile<double>& tile, int threads) { each_row(tile, threads, chosen_row_table().kl_mixture_f64); }
template <>
void kl_gradient_tile(const KlTile<float>& tile, int threads) { each_row(tile, threads, chosen_row_table().kl_gradient_f32); }
template <>
void kl_gradient_tile(const KlTile<double>& tile, int threads) { each_row(tile, threads, chosen_row_table().kl_gradient_f64); }

}  // namespace isdaa
