// What one instruction set offers; chosen once, at run time.
#pragma once
#include <type_traits>

#include "linear_kl_params.h"
#include "params.h"
#include "product_params.h"

namespace isdaa {

template <typename T>
struct ProductTable {
  int64_t height, panel_width;  // rows and columns that stay in registers
  int64_t scratch;              // elements that `multiply` needs where the left factor is transposed
  void (*pack)(const Packing<T>&, int64_t begin, int64_t end);
  void (*multiply)(const Product<T>&, const Part&, T* scratch);
};

struct RowTable {
  const char* name;
  void (*fold_f32)(const FoldTile<float>&, int64_t row);
  void (*fold_f64)(const FoldTile<double>&, int64_t row);
  void (*gradient_f32)(const GradientTile<float>&, int64_t row);
  void (*gradient_f64)(const GradientTile<double>&, int64_t row);
  void (*routed_f32)(const RoutedTile<float>&, int64_t row, float* sums);
  void (*routed_f64)(const RoutedTile<double>&, int64_t row, double* sums);
  void (*route_f32)(const RouteBlocks<float>&, int64_t block, float* weighted);
  void (*route_f64)(const RouteBlocks<double>&, int64_t block, double* weighted);
  void (*kl_fold_f32)(const KlTile<float>&, int64_t row);
  void (*kl_fold_f64)(const KlTile<double>&, int64_t row);
  void (*kl_mixture_f32)(const KlTile<float>&, int64_t row);
  void (*kl_mixture_f64)(const KlTile<double>&, int64_t row);
  void (*kl_gradient_f32)(const KlTile<float>&, int64_t row);
  void (*kl_gradient_f64)(const KlTile<double>&, int64_t row);
  ProductTable<float> product_f32;
  ProductTable<double> product_f64;
};

const RowTable& chosen_row_table();

extern const RowTable row_table_baseline;
#if defined(__x86_64__)
extern const RowTable row_table_avx2;
extern const RowTable row_table_avx512;
#endif

}  // namespace isdaa
