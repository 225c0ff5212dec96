#include "row_table.h"
#define ISDAA_LANES 4

namespace isdaa {
namespace baseline {
#include "simd.h"
#include "product_kernels.h"
#include "row_kernels.h"
#include "linear_kl_rows.h"

void fold_f32(const FoldTile<float>& p, int64_t row) { fold_row(p, row); }
void fold_f64(const FoldTile<double>& p, int64_t row) { fold_row(p, row); }
void gradient_f32(const GradientTile<float>& p, int64_t row) { gradient_row(p, row); }
void gradient_f64(const GradientTile<double>& p, int64_t row) { gradient_row(p, row); }
void routed_f32(const RoutedTile<float>& p, int64_t row, float* sums) { routed_row(p, row, sums); }
void routed_f64(const RoutedTile<double>& p, int64_t row, double* sums) { routed_row(p, row, sums); }
void route_f32(const RouteBlocks<float>& p, int64_t block, float* weighted) { route_block(p, block, weighted); }
void route_f64(const RouteBlocks<double>& p, int64_t block, double* weighted) { route_block(p, block, weighted); }
void kl_fold_f32(const KlTile<float>& p, int64_t row) { kl_fold_row(p, row); }
void kl_fold_f64(const KlTile<double>& p, int64_t row) { kl_fold_row(p, row); }
void kl_mixture_f32(const KlTile<float>& p, int64_t row) { kl_mixture_row(p, row); }
void kl_mixture_f64(const KlTile<double>& p, int64_t row) { kl_mixture_row(p, row); }
void kl_gradient_f32(const KlTile<float>& p, int64_t row) { kl_gradient_row(p, row); }
void kl_gradient_f64(const KlTile<double>& p, int64_t row) { kl_gradient_row(p, row); }
}  // namespace baseline

const RowTable row_table_baseline = {"baseline", baseline::fold_f32, baseline::fold_f64, baseline::gradient_f32, baseline::gradient_f64, baseline::routed_f32, baseline::routed_f64, baseline::route_f32, baseline::route_f64,
    baseline::kl_fold_f32, baseline::kl_fold_f64, baseline::kl_mixture_f32, baseline::kl_mixture_f64, baseline::kl_gradient_f32, baseline::kl_gradient_f64,
    baseline::product_table<float>(), baseline::product_table<double>()};
}  // namespace isdaa
