// Host side of the CPU backend's matrix products: parts shared out over threads.
#pragma once
#include "row_table.h"

namespace isdaa {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kWorthThreadsToMultiply = 1 << 18;  // products; below, waking a thread costs more than it does

template <typename T>
const ProductTable<T>& product_table() {
  if constexpr (sizeof(T) == 4) return chosen_row_table().product_f32;
  else return chosen_row_table().product_f64;
}

// Columns of a panel.
template <typename T>
int64_t panel_width();

template <typename T>
void pack_panels(const Packing<T>& packing, int threads);

template <typename T>
void multiply_panels(const Product<T>& product, int threads);

// What thread t of `threads` makes of it.
template <typename T>
void multiply_share(const Product<T>& product, int64_t t, int64_t threads);

}  // namespace isdaa
