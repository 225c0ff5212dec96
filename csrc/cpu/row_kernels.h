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

inline Float bias_at(const float* bias, int64_t j, int64_t count) {
  return bias ? load_partial(bias + j, count, 0.0f) : broadcast(0);
}

inline void fold_row(const FoldTile<float>& p, int64_t i) {
  float* x = p.logits + i * p.logits_stride;
  if (p.kept) __builtin_memcpy(p.kept + i * p.kept_stride, x, p.columns * sizeof(float));
  const Transform transform(p.head, i);
  const float lowest = -__builtin_inff();
  Float largest = broadcast(lowest), slope;
  int64_t j = 0;
  for (; j + ISDAA_LANES <= p.columns; j += ISDAA_LANES) {
    Float z = load(x + j);
    if (!transform.identity) store(x + j, z = transform(z, p.head.bias ? load(p.head.bias + j) : broadcast(0), slope));
    largest = maximum(z, largest);
  }
  const int64_t tail = p.columns - j;
  if (tail) {
    Float z = load_partial(x + j, tail, lowest);
    if (!transform.identity) store_partial(x + j, z = transform(z, bias_at(p.head.bias, j, tail), slope), tail);
    largest = maximum(load_partial(x + j, tail, lowest), largest);
  }
  const float tile_max = max_lanes(largest), old_max = p.running_max[i];
  const float new_max = tile_max > old_max ? tile_max : old_max;
  const float shift = new_max == lowest ? 0.0f : new_max;
  Double sum{};  // fp64: where the target has all but 1e-5 of the probability, 1 - p lives in the small terms
  for (j = 0; j + ISDAA_LANES <= p.columns; j += ISDAA_LANES)
    sum += __builtin_convertvector(exponential(load(x + j) - shift, -87.0f), Double);
  if (tail) sum += __builtin_convertvector(exponential(load_partial(x + j, tail, lowest) - shift, -87.0f), Double);
  const double factor = old_max == lowest ? 0.0 : __builtin_exp((double)old_max - new_max);
  p.running_sum[i] = p.running_sum[i] * factor + sum_lanes(sum);
  p.running_max[i] = new_max;
  if (p.target[i] >= 0 && p.target[i] < p.columns) p.target_logit[i] = x[p.target[i]];
}

inline void gradient_row(const GradientTile<float>& p, int64_t i) {
  const float* x = p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride;
  float* g = p.gradient + i * p.gradient_stride;
  const Transform transform(p.head, i);
  const float lse = (float)p.lse[i], lse_rest = (float)(p.lse[i] - lse), minus_c = -p.coefficient[i];
  const int64_t target = p.target[i];
  const bool here = target >= 0 && target < p.columns;
  const float target_product = here ? x[target] : 0.0f;  // read before the row is overwritten
  Float slope;
  for (int64_t j = 0; j < p.columns; j += ISDAA_LANES) {
    const int64_t count = p.columns - j < ISDAA_LANES ? p.columns - j : ISDAA_LANES;
    const bool whole = count == ISDAA_LANES;
    const Float raw = whole ? load(x + j) : load_partial(x + j, count, 0.0f);
    const Float bias = !p.head.bias ? broadcast(0) : whole ? load(p.head.bias + j) : bias_at(p.head.bias, j, count);
    Float z = raw;
    if (transform.identity) slope = broadcast(1.0f);
    else z = transform(raw, bias, slope);
    const Float y = exponential((z - lse) - lse_rest, kSmallestLogProbability) * minus_c * slope;
    if (whole) store(g + j, y);
    else store_partial(g + j, y, count);
  }
  if (here) {  // c * (1 - p) by expm1: p near 1 keeps its digits
    const Float bias = broadcast(p.head.bias ? p.head.bias[target] : 0.0f);
    Float z = broadcast(target_product);
    if (transform.identity) slope = broadcast(1.0f);
    else z = transform(z, bias, slope);
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
