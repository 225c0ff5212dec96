// One row of a tile. Included by every row_kernels_<isa>.cpp after simd.h, inside that file's namespace.
// fp32 is vectorised; fp64 is the exact, plain loop that gradient checks use.

// Below these the gradient entry p is written as 0, so that no product of the library's GEMM meets a denormal number.
constexpr float kSmallestLogProbability = -50.0f;
constexpr double kSmallestLogProbability64 = -650.0;

struct Transform {
  float scale, softcap, inverse_softcap, inverse_temperature;
  bool identity;

  Transform(const HeadTransform<float>& h, int64_t row)
      : scale(h.logit_scale), softcap(h.softcap), inverse_softcap(h.softcap > 0 ? 1.0f / h.softcap : 0.0f),
        inverse_temperature(h.inverse_temperature ? h.inverse_temperature[row] : h.constant_inverse_temperature),
        identity(!h.bias && scale == 1.0f && softcap == 0.0f && inverse_temperature == 1.0f) {}

  // z, and dz/dx in `slope`
  Float operator()(Float x, Float bias, Float& slope) const {
    x = (x + bias) * scale;
    slope = broadcast(scale * inverse_temperature);
    if (softcap > 0) {
      const Float t = hyperbolic_tangent(x * inverse_softcap);
      slope = slope * (1.0f - t * t);
      x = t * softcap;
    }
    return x * inverse_temperature;
  }
};

inline Float bias_at(const float* bias, int64_t j, int64_t count) { return bias ? load(bias + j, count, 0.0f) : Float{}; }

// z of the whole row in place, and its maximum.
inline float transform_row(const FoldTile<float>& p, int64_t i) {
  float* x = p.logits + i * p.logits_stride;
  const Transform transform(p.head, i);
  const float lowest = -__builtin_inff();
  Float a = broadcast(lowest), b = a, slope;
  int64_t j = 0;
  if (transform.identity) {
    for (; j + 2 * ISDAA_LANES <= p.columns; j += 2 * ISDAA_LANES) {
      a = maximum(load(x + j), a);
      b = maximum(load(x + j + ISDAA_LANES), b);
    }
    a = maximum(a, b);
  }
  for (; j < p.columns; j += ISDAA_LANES) {
    const int64_t count = p.columns - j;
    if (!transform.identity) store(x + j, transform(load(x + j, count, 0.0f), bias_at(p.head.bias, j, count), slope), count);
    a = maximum(load(x + j, count, lowest), a);
  }
  return max_lanes(a);
}

// sum of exp(z - shift), shift being the largest z. Terms that are 1 are counted apart: where the target has all but 1e-5 of the
// probability, 1 - p lives in the small terms, and beside a 1 they would lose their digits.
inline double sum_row(const float* z, int64_t columns, float shift) {
  Float sum{};
  Int ones{};
  const auto add = [&](Float difference) {
    const Int one = difference == 0.0f;
    const Float e = exponential(difference, -87.0f);
    sum += one ? Float{} : e;
    ones -= one;
  };
  int64_t j = 0;
  for (; j + ISDAA_LANES <= columns; j += ISDAA_LANES) add(load(z + j) - shift);
  if (j < columns) add(load(z + j, columns - j, -__builtin_inff()) - shift);
  return sum_lanes(sum) + sum_lanes(__builtin_convertvector(ones, Float));
}

inline void fold_row(const FoldTile<float>& p, int64_t i) {
  const float* z = p.logits + i * p.logits_stride;
  if (p.kept) __builtin_memcpy(p.kept + i * p.kept_stride, z, p.columns * sizeof(float));
  const float tile_max = transform_row(p, i), old_max = p.running_max[i], lowest = -__builtin_inff();
  const float new_max = tile_max > old_max ? tile_max : old_max;
  const double sum = sum_row(z, p.columns, new_max == lowest ? 0.0f : new_max);
  const double factor = old_max == lowest ? 0.0 : __builtin_exp((double)old_max - new_max);
  p.running_sum[i] = p.running_sum[i] * factor + sum;
  p.running_max[i] = new_max;
  if (p.target[i] >= 0 && p.target[i] < p.columns) p.target_logit[i] = z[p.target[i]];
}

inline void gradient_row(const GradientTile<float>& p, int64_t i) {
  const float* x = p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride;
  float* g = p.gradient + i * p.gradient_stride;
  const Transform transform(p.head, i);
  const float lse = (float)p.lse[i], lse_rest = (float)(p.lse[i] - lse), minus_c = -p.coefficient[i];
  const int64_t target = p.target[i];
  const bool here = target >= 0 && target < p.columns;
  const float target_product = here ? x[target] : 0.0f;  // read before the row is overwritten
  Float slope = broadcast(1.0f);
  for (int64_t j = 0; j < p.columns; j += ISDAA_LANES) {
    const int64_t count = p.columns - j;
    Float z = load(x + j, count, 0.0f);
    if (!transform.identity) z = transform(z, bias_at(p.head.bias, j, count), slope);
    store(g + j, exponential((z - lse) - lse_rest, kSmallestLogProbability) * minus_c * slope, count);
  }
  if (here) {  // c * (1 - p) by expm1: p near 1 keeps its digits
    Float z = broadcast(target_product);
    if (!transform.identity) z = transform(z, broadcast(p.head.bias ? p.head.bias[target] : 0.0f), slope);
    g[target] = (float)(minus_c * __builtin_expm1((double)z[0] - p.lse[i]) * slope[0]);
  }
}

inline double transform64(const HeadTransform<double>& h, int64_t row, double x, double bias, double& slope) {
  const double inverse_temperature = h.inverse_temperature ? h.inverse_temperature[row] : h.constant_inverse_temperature;
  x = (x + bias) * h.logit_scale;
  slope = h.logit_scale * inverse_temperature;
  if (h.softcap > 0) {
    const double t = __builtin_tanh(x / h.softcap);
    slope *= 1 - t * t;
    x = t * h.softcap;
  }
  return x * inverse_temperature;
}

inline void fold_row(const FoldTile<double>& p, int64_t i) {
  double* x = p.logits + i * p.logits_stride;
  if (p.kept) __builtin_memcpy(p.kept + i * p.kept_stride, x, p.columns * sizeof(double));
  const double lowest = -__builtin_inf(), old_max = p.running_max[i];
  double new_max = old_max, slope, sum = 0;
  for (int64_t j = 0; j < p.columns; ++j) {
    x[j] = transform64(p.head, i, x[j], p.head.bias ? p.head.bias[j] : 0.0, slope);
    new_max = x[j] > new_max ? x[j] : new_max;
  }
  const double shift = new_max == lowest ? 0.0 : new_max;
  for (int64_t j = 0; j < p.columns; ++j) sum += __builtin_exp(x[j] - shift);
  const double factor = old_max == lowest ? 0.0 : __builtin_exp(old_max - new_max);
  p.running_sum[i] = p.running_sum[i] * factor + sum;
  p.running_max[i] = new_max;
  if (p.target[i] >= 0 && p.target[i] < p.columns) p.target_logit[i] = x[p.target[i]];
}

inline void gradient_row(const GradientTile<double>& p, int64_t i) {
  const double* x = p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride;
  double* g = p.gradient + i * p.gradient_stride;
  for (int64_t j = 0; j < p.columns; ++j) {
    double slope;
    const double log_p = transform64(p.head, i, x[j], p.head.bias ? p.head.bias[j] : 0.0, slope) - p.lse[i];
    const double d = j == p.target[i] ? -__builtin_expm1(log_p) : log_p < kSmallestLogProbability64 ? 0.0 : -__builtin_exp(log_p);
    g[j] = p.coefficient[i] * d * slope;
  }
}
