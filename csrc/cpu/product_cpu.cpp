#include "product_cpu.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace isdaa {
namespace {

constexpr int64_t kWorthThreads = 1 << 14;       // elements to copy; below, waking a thread costs more than it does

// How many threads share the rows; the others share the panels. The split with the least to do for the busiest thread.
int64_t threads_over_rows(int64_t row_groups, int64_t panels, int64_t threads) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t t = threads; t >= 1; --t) {
    if (threads % t) continue;
    const int64_t load = ceil_div(row_groups, t) * ceil_div(panels, threads / t);
    if (load < least) least = load, best = t;
  }
  return best;
}

}  // namespace

template <typename T>
int64_t panel_width() { return product_table<T>().panel_width; }

template <typename T>
void pack_panels(const Packing<T>& p, int threads) {
  const auto& kernels = product_table<T>();
  const int64_t total = p.transposed ? ceil_div(p.rows, kernels.panel_width) : p.rows;
#pragma omp parallel num_threads(threads) if (p.rows * p.columns >= kWorthThreads)
  {
    const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
    kernels.pack(p, total * t / count, total * (t + 1) / count);
  }
}

template <typename T>
void multiply_share(const Product<T>& p, int64_t t, int64_t threads) {
  const auto& kernels = product_table<T>();
  const int64_t groups = ceil_div(p.rows, kernels.height), panels = ceil_div(p.columns, kernels.panel_width);
  const int64_t over_rows = threads_over_rows(groups, panels, threads), over_panels = threads / over_rows;
  const int64_t r = t / over_panels, c = t % over_panels;
  const Part part{groups * r / over_rows * kernels.height, std::min(groups * (r + 1) / over_rows * kernels.height, p.rows),
                  panels * c / over_panels, panels * (c + 1) / over_panels};
  thread_local std::vector<T> scratch;
  if (p.left_transposed && scratch.size() < (size_t)kernels.scratch) scratch.resize(kernels.scratch);
  kernels.multiply(p, part, scratch.data());
}

template <typename T>
void multiply_panels(const Product<T>& p, int threads) {
#pragma omp parallel num_threads(threads) if (p.rows * p.columns * p.inner >= kWorthThreadsToMultiply)
  multiply_share(p, omp_get_thread_num(), omp_get_num_threads());
}

#define ISDAA_INSTANTIATE(T)                            \
  template int64_t panel_width<T>();                    \
  template void pack_panels<T>(const Packing<T>&, int); \
  template void multiply_panels<T>(const Product<T>&, int); \
  template void multiply_share<T>(const Product<T>&, int64_t, int64_t);
ISDAA_INSTANTIATE(float)
ISDAA_INSTANTIATE(double)

}  // namespace isdaa
