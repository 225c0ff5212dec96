#include "linear_logprob_cpu.h"

#include <cstring>

#include "row_table.h"

namespace isdaa {
namespace {

bool supported(const RowTable& table) {
#if defined(__x86_64__)
  if (&table == &row_table_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&table == &row_table_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return &table == &row_table_baseline;
}

const RowTable* const kTables[] = {
#if defined(__x86_64__)
    &row_table_avx512, &row_table_avx2,
#endif
    &row_table_baseline};

const RowTable* best() {
  for (const RowTable* table : kTables)
    if (supported(*table)) return table;
  return &row_table_baseline;
}

const RowTable* chosen = best();

constexpr int64_t kWorthThreads = 1 << 14;  // elements; below, waking a thread costs more than it does

}  // namespace

const RowTable& chosen_row_table() { return *chosen; }

const char* instruction_set() { return chosen->name; }

bool use_instruction_set(const char* name) {
  for (const RowTable* table : kTables)
    if (!std::strcmp(table->name, name) && supported(*table)) {
      chosen = table;
      return true;
    }
  return false;
}

template <typename T>
void linear_logprob_forward_tile(const FoldTile<T>& tile) {
  const RowTable table = *chosen;
#pragma omp parallel for schedule(static) num_threads(tile.threads) if (tile.rows * tile.columns >= kWorthThreads)
  for (int64_t row = 0; row < tile.rows; ++row) {
    if constexpr (sizeof(T) == 4) table.fold_f32(tile, row);
    else table.fold_f64(tile, row);
  }
}

template <typename T>
void linear_logprob_backward_tile(const GradientTile<T>& tile) {
  const RowTable table = *chosen;
#pragma omp parallel for schedule(static) num_threads(tile.threads) if (tile.rows * tile.columns >= kWorthThreads)
  for (int64_t row = 0; row < tile.rows; ++row) {
    if constexpr (sizeof(T) == 4) table.gradient_f32(tile, row);
    else table.gradient_f64(tile, row);
  }
}

template void linear_logprob_forward_tile<float>(const FoldTile<float>&);
template void linear_logprob_forward_tile<double>(const FoldTile<double>&);
template void linear_logprob_backward_tile<float>(const GradientTile<float>&);
template void linear_logprob_backward_tile<double>(const GradientTile<double>&);

}  // namespace isdaa
