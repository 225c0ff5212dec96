// Matrix products over panels (product_params.h). Included by every row_kernels_<isa>.cpp after simd.h, inside that file's namespace.
// Six rows times one panel stay in registers over a stretch of the inner dimension: 12 running vectors, or 24 where there are 32
// registers. An element of the result is summed in the same order whatever stands beside it and however many threads work.

using Double = double __attribute__((vector_size(4 * ISDAA_LANES)));

template <typename T>
struct Wide {
  using Vector = std::conditional_t<sizeof(T) == 4, Float, Double>;
  static constexpr int64_t kLanes = 4 * ISDAA_LANES / sizeof(T);
  static constexpr int kVectors = ISDAA_LANES == 16 ? 4 : 2;  // of a panel's row
  static constexpr int64_t kPanel = kLanes * kVectors;
};

constexpr int kHeight = 6;          // rows at a time
constexpr int64_t kRowsNear = 96;   // of the left factor, which all panels pass by
// Of the inner dimension, summed in registers before it joins what was summed so far: a panel of it stays near, and rounding errors grow
// with the length of a stretch and the number of them, not with the whole.
constexpr int64_t kStretch = 160;

// Keeps a loaded vector in its register: folded into the arithmetic it would be loaded once for each row.
#if defined(__x86_64__)
#define ISDAA_IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__aarch64__)
#define ISDAA_IN_REGISTER(v) asm("" : "+w"(v))
#else
#define ISDAA_IN_REGISTER(v)
#endif

template <typename T>
struct Strip {
  typename Wide<T>::Vector sum[kHeight][Wide<T>::kVectors];

  template <typename Left>  // left(i, k): element k of row i
  void multiply(Left left, const T* panel, int64_t inner) {
    using W = Wide<T>;
    typename W::Vector total[kHeight][W::kVectors] = {};
    for (int64_t k = 0; k < inner; ++k, panel += W::kPanel) {
      typename W::Vector right[W::kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < W::kVectors; ++v) {
        __builtin_memcpy(&right[v], panel + v * W::kLanes, sizeof right[v]);
        ISDAA_IN_REGISTER(right[v]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kHeight; ++i) {
        const typename W::Vector factor = left(i, k) - typename W::Vector{};
#pragma GCC unroll 4
        for (int v = 0; v < W::kVectors; ++v) total[i][v] += factor * right[v];
      }
    }
    __builtin_memcpy(sum, total, sizeof sum);
  }

  // Calls for what `put` will write to.
  static void expect(const Product<T>& p, int64_t row, int64_t panel) {
    using W = Wide<T>;
    for (int i = 0; i < kHeight && row + i < p.rows; ++i) {
      const T* out = p.out + (p.out_row ? p.out_row[row + i] : row + i) * p.out_stride + panel * W::kPanel;
      for (int64_t j = 0; j < W::kPanel; j += 64 / sizeof(T)) __builtin_prefetch(out + j, 1);
    }
  }

  void put(const Product<T>& p, int64_t row, int64_t panel, bool add) const {
    using W = Wide<T>;
    const int64_t column = panel * W::kPanel, count = p.columns - column;
    for (int i = 0; i < kHeight && row + i < p.rows; ++i) {
      T* out = p.out + (p.out_row ? p.out_row[row + i] : row + i) * p.out_stride + column;
      if (count >= W::kPanel) {
#pragma GCC unroll 4
        for (int v = 0; v < W::kVectors; ++v) {
          typename W::Vector value = sum[i][v];
          if (add) {
            typename W::Vector old;
            __builtin_memcpy(&old, out + v * W::kLanes, sizeof old);
            value += old;
          }
          __builtin_memcpy(out + v * W::kLanes, &value, sizeof value);
        }
      } else {
        const T* value = (const T*)sum[i];
        for (int64_t j = 0; j < count; ++j) out[j] = add ? out[j] + value[j] : value[j];
      }
    }
  }
};

template <typename T>
inline void multiply_rows(const Product<T>& p, const Part& part) {
  using W = Wide<T>;
  const int64_t stretches = p.inner ? (p.inner + kStretch - 1) / kStretch : 1;
  for (int64_t s = 0; s < stretches; ++s) {
    const int64_t begin = p.inner * s / stretches, end = p.inner * (s + 1) / stretches;
    for (int64_t near = part.row_begin; near < part.row_end; near += kRowsNear) {
      const int64_t far = near + kRowsNear < part.row_end ? near + kRowsNear : part.row_end;
      for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel)
        for (int64_t row = near; row < far; row += kHeight) {
          const T* at[kHeight];
          for (int i = 0; i < kHeight; ++i) {
            const int64_t r = row + i < p.rows ? row + i : p.rows - 1;
            at[i] = p.left + (p.left_row ? p.left_row[r] : r) * p.left_stride + begin;
          }
          Strip<T> strip;
          strip.expect(p, row, panel);
          strip.multiply([&](int i, int64_t k) { return at[i][k]; }, p.panels + (panel * p.inner + begin) * W::kPanel, end - begin);
          strip.put(p, row, panel, p.add || s > 0);
        }
    }
  }
}

// The left factor comes column by column: a piece of it is first brought into rows of six, which lie side by side.
template <typename T>
inline void multiply_columns(const Product<T>& p, const Part& part, T* scratch) {
  using W = Wide<T>;
  const int64_t stretches = p.inner ? (p.inner + kStretch - 1) / kStretch : 1;
  for (int64_t s = 0; s < stretches; ++s) {
    const int64_t begin = p.inner * s / stretches, end = p.inner * (s + 1) / stretches, inner = end - begin;
    for (int64_t near = part.row_begin; near < part.row_end; near += kRowsNear) {
      const int64_t far = near + kRowsNear < part.row_end ? near + kRowsNear : part.row_end;
      for (int64_t k = 0; k < inner; ++k) {
        const T* source = p.left + (p.left_row ? p.left_row[begin + k] : begin + k) * p.left_stride;
        for (int64_t row = near; row < far; row += kHeight) {
          T* target = scratch + (row - near) * inner + k * kHeight;
          if (row + kHeight <= p.rows) __builtin_memcpy(target, source + row, kHeight * sizeof(T));
          else
            for (int i = 0; i < kHeight; ++i) target[i] = row + i < p.rows ? source[row + i] : T(0);
        }
      }
      for (int64_t panel = part.panel_begin; panel < part.panel_end; ++panel)
        for (int64_t row = near; row < far; row += kHeight) {
          const T* at = scratch + (row - near) * inner;
          Strip<T> strip;
          strip.multiply([&](int i, int64_t k) { return at[k * kHeight + i]; }, p.panels + (panel * p.inner + begin) * W::kPanel, inner);
          strip.put(p, row, panel, p.add || s > 0);
        }
    }
  }
}

template <typename T>
inline void multiply_part(const Product<T>& p, const Part& part, T* scratch) {
  if (p.left_transposed) multiply_columns(p, part, scratch);
  else multiply_rows(p, part);
}

// Rows [begin, end) of the source where they are the inner dimension, a few together, so that a panel gets some lines at a time. The next
// rows, which may stand anywhere, are called for meanwhile.
template <typename T>
inline void pack_rows(const Packing<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t kPanel = Wide<T>::kPanel, kRows = 8, kLine = 64 / sizeof(T);
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t rows = end - first < kRows ? end - first : kRows, after = end - first - rows < kRows ? end - first - rows : kRows;
    const T *source[kRows], *next[kRows];
    for (int64_t r = 0; r < rows; ++r) source[r] = p.values + (p.row ? p.row[first + r] : first + r) * p.stride;
    for (int64_t r = 0; r < after; ++r) next[r] = p.values + (p.row ? p.row[first + rows + r] : first + rows + r) * p.stride;
    T* target = p.panels + first * kPanel;
    for (int64_t column = 0; column < p.columns; column += kPanel, target += p.rows * kPanel) {
      for (int64_t r = 0; r < after; ++r)
        for (int64_t j = column; j < column + kPanel && j < p.columns; j += kLine) __builtin_prefetch(next[r] + j);
      if (column + kPanel > p.columns) {
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < kPanel; ++j) target[r * kPanel + j] = column + j < p.columns ? source[r][column + j] : T(0);
      } else {
        for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(target + r * kPanel, source[r] + column, kPanel * sizeof(T));
      }
      if (p.scale)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < kPanel; ++j) target[r * kPanel + j] *= p.scale[first + r];
    }
  }
}

// Panels [begin, end), each of as many rows of the source as it is wide.
template <typename T>
inline void pack_columns(const Packing<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t kPanel = Wide<T>::kPanel;
  for (int64_t panel = begin; panel < end; ++panel) {
    T* target = p.panels + panel * p.columns * kPanel;
    const T* source[kPanel];
    const int64_t count = p.rows - panel * kPanel < kPanel ? p.rows - panel * kPanel : kPanel;
    for (int64_t j = 0; j < count; ++j) source[j] = p.values + (p.row ? p.row[panel * kPanel + j] : panel * kPanel + j) * p.stride;
    if (count == kPanel) {
      for (int64_t k = 0; k < p.columns; ++k, target += kPanel)
#pragma GCC unroll 64
        for (int64_t j = 0; j < kPanel; ++j) target[j] = source[j][k];
    } else {
      for (int64_t k = 0; k < p.columns; ++k, target += kPanel)
        for (int64_t j = 0; j < kPanel; ++j) target[j] = j < count ? source[j][k] : T(0);
    }
  }
}

template <typename T>
inline void pack_part(const Packing<T>& p, int64_t begin, int64_t end) {
  if (p.transposed) pack_columns(p, begin, end);
  else pack_rows(p, begin, end);
}

template <typename T>
constexpr ProductTable<T> product_table() {
  return {kHeight, Wide<T>::kPanel, kRowsNear * kStretch, pack_part<T>, multiply_part<T>};
}
