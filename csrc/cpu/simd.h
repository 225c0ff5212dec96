// Vector arithmetic on compiler vector types, one width for each instruction set. No intrinsics, so the same source serves x86-64 and arm64.
// Included once by every row_kernels_<isa>.cpp, inside that file's own namespace and target.

using Float = float __attribute__((vector_size(4 * ISDAA_LANES)));
using Int = int32_t __attribute__((vector_size(4 * ISDAA_LANES)));

inline Float broadcast(float x) { return x - Float{}; }

inline Float load(const float* p) {
  Float v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The first `count` lanes; the others are `fill`.
inline Float load(const float* p, int64_t count, float fill) {
  if (count >= ISDAA_LANES) return load(p);
  Float v = broadcast(fill);
  __builtin_memcpy(&v, p, count * sizeof(float));
  return v;
}

inline void store(float* p, Float v, int64_t count) {
  if (count >= ISDAA_LANES) __builtin_memcpy(p, &v, sizeof v);
  else __builtin_memcpy(p, &v, count * sizeof(float));
}

inline Float maximum(Float a, Float b) { return a > b ? a : b; }

inline Float absolute(Float x) { return (Float)((Int)x & 0x7fffffff); }

// exp(x) with a relative error of about 1e-7 for x up to 88; exactly 0 below `floor`, NaN for NaN. `floor` >= -87: no denormal is made.
inline Float exponential_up_to_88(Float x, float floor) {
  const float round = 12582912.0f + 127.0f;  // beside it no fraction is left, and the lowest bits are the exponent of 2^n
  const Float shifted = x * 1.44269504f + round, n = shifted - round;
  const Float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  Float y = r * 1.3814540e-3f + 8.3687451e-3f;
  y = y * r + 4.1668391e-2f;
  y = y * r + 1.6666520e-1f;
  y = y * r + 4.9999993e-1f;
  y = (y * (r * r) + r) + 1.0f;
  y *= (Float)((Int)shifted << 23);
  return (Float)((Int)y & ~(x < floor));
}

inline Float exponential(Float x, float floor) {
  const Float high = broadcast(88.0f);
  return exponential_up_to_88(x > high ? high : x, floor);
}

// log(x) of a positive normal number, with a relative error of about 1e-7, near 1 as well.
inline Float logarithm(Float x) {
  const Int bits = (Int)x;
  Float exponent = __builtin_convertvector((bits >> 23) - 126, Float);
  Float m = (Float)((bits & 0x007fffff) | 0x3f000000);  // in [1/2, 1)
  const Int low = m < 0.707106781f;
  exponent = low ? exponent - 1.0f : exponent;
  m = (low ? m + m : m) - 1.0f;
  const Float square = m * m;
  Float y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * square + exponent * -2.12194440e-4f - 0.5f * square;
  return m + y + exponent * 0.693359375f;
}

inline Float hyperbolic_tangent(Float x) {
  // 1 - 2 / (exp(2|x|) + 1) loses digits near 0; there an odd polynomial, fitted to a relative error of 4e-9, is exact to fp32.
  const Float a = absolute(x);
  const Float s = x * x;
  const Float inner = -5.3739714301e-2f + s * (2.0639084706e-2f - s * 5.7049841591e-3f);
  const Float series = x + x * s * (-3.3333281942e-1f + s * (1.3331442189e-1f + s * inner));
  const Float e = exponential((a > 20.0f ? broadcast(20.0f) : a) * 2.0f, -87.0f);
  const Float tail = 1.0f - 2.0f / (e + 1.0f);
  const Float signed_tail = (Float)((Int)tail | ((Int)x & (int32_t)0x80000000));
  const Float y = a < 0.625f ? series : signed_tail;
  return x == x ? y : x;
}

inline bool any(Int mask) {
  int64_t words[ISDAA_LANES / 2], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (int64_t word : words) all |= word;
  return all != 0;
}

inline double sum_lanes(Float v) {
  using Double = double __attribute__((vector_size(4 * ISDAA_LANES)));  // half as many lanes
  using Half = float __attribute__((vector_size(2 * ISDAA_LANES)));
  Half low, high;
  __builtin_memcpy(&low, &v, sizeof low);
  __builtin_memcpy(&high, (const char*)&v + sizeof low, sizeof high);
  const Double pairs = __builtin_convertvector(low, Double) + __builtin_convertvector(high, Double);
  double totals[ISDAA_LANES / 2];
  __builtin_memcpy(totals, &pairs, sizeof totals);
  for (int width = ISDAA_LANES / 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) totals[i] += totals[i + width];
  return totals[0];
}

inline float max_lanes(Float v) {
  float m[ISDAA_LANES];
  __builtin_memcpy(m, &v, sizeof m);
  for (int width = ISDAA_LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) m[i] = m[i + width] > m[i] ? m[i + width] : m[i];
  return m[0];
}
