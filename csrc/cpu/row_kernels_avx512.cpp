#include "row_table.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif
#define ISDAA_LANES 16

namespace isdaa {
namespace avx512 {
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
}  // namespace avx512

const RowTable row_table_avx512 = {"avx512", avx512::fold_f32, avx512::fold_f64, avx512::gradient_f32, avx512::gradient_f64, avx512::routed_f32, avx512::routed_f64, avx512::route_f32, avx512::route_f64,
    avx512::kl_fold_f32, avx512::kl_fold_f64, avx512::kl_mixture_f32, avx512::kl_mixture_f64, avx512::kl_gradient_f32, avx512::kl_gradient_f64,
    avx512::product_table<float>(), avx512::product_table<double>()};
}  // namespace isdaa

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
