// The contract between bindings, host loops and kernels of the CPU backend's matrix products. No torch header.
// out[R, J] = left[R, K] right[K, J]. The right factor lies in panels: its columns side by side in groups as wide as the instruction set's
// kernel takes them, [ceil(J / width), K, width], with zeros behind the last column.
#pragma once
#include <cstdint>

#include "../fields.h"

namespace isdaa {

template <typename T>
struct Packing {
  const T* values;     // row i begins at values + (row ? row[i] : i) * stride
  const int64_t* row;  // [rows], or null
  int64_t stride, rows, columns;
  const T* scale;      // [rows] a factor of each row, or null; not where `transposed`
  bool transposed;     // false: rows are the inner dimension K, columns J; true: the other way round
  T* panels;

  ISDAA_FIELDS(values, row, stride, rows, columns, scale, transposed, panels)
};

template <typename T>
struct Product {
  const T* left;            // row i begins at left + (left_row ? left_row[i] : i) * left_stride; transposed: element [k, i] of [K, R]
  const int64_t* left_row;  // [R], or null
  int64_t left_stride;
  bool left_transposed;
  const T* panels;
  int64_t rows, inner, columns;
  T* out;                   // row i begins at out + (out_row ? out_row[i] : i) * out_stride
  const int64_t* out_row;   // [R], each row once, or null
  int64_t out_stride;
  bool add;                 // to what `out` holds

  ISDAA_FIELDS(left, left_row, left_stride, left_transposed, panels, rows, inner, columns, out, out_row, out_stride, add)
};

// What one thread makes of it: rows and panels from begin to end.
struct Part {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

}  // namespace isdaa
