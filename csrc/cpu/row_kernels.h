// One row of a tile. Included by every row_kernels_<isa>.cpp after simd.h, inside that file's namespace.
// fp32 is vectorised; fp64 is the exact, plain loop that gradient checks use.

// Below these the gradient entry p is written as 0, so that no matrix product meets a denormal number.
constexpr float kSmallestLogProbability = -50.0f;
constexpr double kSmallestLogProbability64 = -650.0;
// The entropy multiplies p by its log, so there the entry itself is compared, with exp(kSmallestLogProbability), and p goes further down.
constexpr float kSmallestEntry = 2e-22f, kSmallestLogProbabilityOfStats = -60.0f;

constexpr int kBisections = 20;  // as in isdaa_kernels.routing

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

// The largest of z[0, count), -inf where there is none. Several running maxima, so that none waits for the one before.
inline float largest(const float* z, int64_t count) {
  constexpr int kRunning = 4;
  const float lowest = -__builtin_inff();
  Float top[kRunning];
  for (Float& t : top) t = broadcast(lowest);
  int64_t j = 0;
  for (; j + kRunning * ISDAA_LANES <= count; j += kRunning * ISDAA_LANES)
    for (int k = 0; k < kRunning; ++k) top[k] = maximum(load(z + j + k * ISDAA_LANES), top[k]);
  for (; j < count; j += ISDAA_LANES) top[0] = maximum(load(z + j, count - j, lowest), top[0]);
  return max_lanes(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
}

// The final logits of the row: the product itself where the transform changes nothing, else in scratch.
inline const float* transform_row(const FoldTile<float>& p, int64_t i) {
  const float* x = p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride;
  const Transform transform(p.head, i);
  if (transform.identity) return x;
  float* z = p.scratch + i * p.scratch_stride;
  Float slope;
  for (int64_t j = 0; j < p.columns; j += ISDAA_LANES) {
    const int64_t count = p.columns - j;
    store(z + j, transform(load(x + j, count, 0.0f), bias_at(p.head.bias, j, count), slope), count);
  }
  return z;
}

struct Sums {
  double exponentials, entropy, squares, logits;
};

// Sums over d = z - shift, shift being the largest z: exp(d), and of those asked for exp(d) * -d, exp(2 d), z. Terms that are 1 are
// counted apart: where the target has all but 1e-5 of the probability, 1 - p lives in the small terms, and beside a 1 they would lose
// their digits. Two levels of fp32 sums, as many equal terms in one would round alike.
template <bool kEntropy, bool kSquares, bool kLogits>
inline Sums sum_row(const float* z, int64_t columns, float shift) {
  constexpr int64_t kGroup = 16 * ISDAA_LANES;
  Float sum{}, entropy{}, squares{}, logits{};
  Int ones{};
  for (int64_t begin = 0; begin < columns; begin += kGroup) {
    Float group{}, group_entropy{}, group_squares{}, group_logits{};
    const auto add = [&](Float v, Float counted) {
      const Float d = v - shift;
      const Int one = d == 0.0f;
      const Float e = exponential_up_to_88(d, -87.0f);
      group += (Float)((Int)e & ~one);
      ones -= one;
      if constexpr (kEntropy) group_entropy += d < -87.0f ? Float{} : e * -d;  // not 0 * inf
      if constexpr (kSquares) group_squares += (one | (d < -43.0f)) ? Float{} : e * e;  // no denormal number is made
      if constexpr (kLogits) group_logits += counted;
    };
    if (begin + kGroup <= columns) {
      for (int64_t j = begin; j < begin + kGroup; j += ISDAA_LANES) {
        const Float v = load(z + j);
        add(v, v);
      }
    } else {
      for (int64_t j = begin; j < columns; j += ISDAA_LANES)
        add(load(z + j, columns - j, -__builtin_inff()), load(z + j, columns - j, 0.0f));
    }
    sum += group;
    entropy += group_entropy;
    squares += group_squares;
    logits += group_logits;
  }
  const double count = sum_lanes(__builtin_convertvector(ones, Float));
  return {sum_lanes(sum) + count, sum_lanes(entropy), sum_lanes(squares) + count, sum_lanes(logits)};
}

inline Sums sum_row(const FoldStats<float>& s, const float* z, int64_t columns, float shift) {
  switch ((s.entropy_sum ? 1 : 0) | (s.square_sum ? 2 : 0) | (s.logit_sum ? 4 : 0)) {
    case 1: return sum_row<true, false, false>(z, columns, shift);
    case 2: return sum_row<false, true, false>(z, columns, shift);
    case 3: return sum_row<true, true, false>(z, columns, shift);
    case 4: return sum_row<false, false, true>(z, columns, shift);
    case 5: return sum_row<true, false, true>(z, columns, shift);
    case 6: return sum_row<false, true, true>(z, columns, shift);
    case 7: return sum_row<true, true, true>(z, columns, shift);
    default: return sum_row<false, false, false>(z, columns, shift);
  }
}

template <typename T>
inline void insert_top(T* top, int64_t k, T z) {
  int64_t at = k - 1;
  for (; at > 0 && top[at - 1] < z; --at) top[at] = top[at - 1];
  top[at] = z;
}

// The running k largest. Few elements pass the smallest of them once the first tiles are through, so most of a row costs one comparison.
inline void fold_top(float* top, int64_t k, const float* z, int64_t columns) {
  constexpr int64_t kGroup = 4 * ISDAA_LANES;
  const auto insert = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      if (z[j] > top[k - 1]) insert_top(top, k, z[j]);
  };
  int64_t j = 0;
  for (; j + kGroup <= columns; j += kGroup) {
    const float threshold = top[k - 1];
    Int above{};
    for (int64_t i = 0; i < kGroup; i += ISDAA_LANES) above |= load(z + j + i) > threshold;
    if (any(above)) insert(j, j + kGroup);
  }
  insert(j, columns);
}

inline void fold_top(double* top, int64_t k, const double* z, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j)
    if (z[j] > top[k - 1]) insert_top(top, k, z[j]);
}

// Adds a tile's sums, taken at `new_max`, to the running ones, which are moved there from `old_max`.
template <typename T>
inline void add_sums(const FoldTile<T>& p, int64_t i, const Sums& sums, T old_max, T new_max) {
  const FoldStats<T>& s = p.stats;
  const bool first = old_max == -__builtin_inf();
  const double factor = first ? 0.0 : __builtin_exp((double)old_max - new_max);
  // exp(z - new) * (new - z) = factor * exp(z - old) * ((old - z) + (new - old))
  if (s.entropy_sum)
    s.entropy_sum[i] = (first ? 0.0 : factor * (s.entropy_sum[i] + ((double)new_max - old_max) * p.running_sum[i])) + sums.entropy;
  if (s.square_sum) s.square_sum[i] = s.square_sum[i] * factor * factor + sums.squares;
  if (s.logit_sum) s.logit_sum[i] += sums.logits;
  p.running_sum[i] = p.running_sum[i] * factor + sums.exponentials;
  p.running_max[i] = new_max;
}

// Each block's log-sum-exp, and from them the tile's sum of exp(z - shift): one exponential an element serves both.
inline double fold_blocks(const FoldTile<float>& p, int64_t i, const float* z, float shift) {
  double total = 0;
  float* out = p.block_lse + i;
  for (int64_t begin = 0; begin < p.columns; begin += p.block, out += p.block_lse_stride) {
    const int64_t count = begin + p.block < p.columns ? p.block : p.columns - begin;
    const float block_max = largest(z + begin, count);
    const bool empty = block_max == -__builtin_inff();
    const double sum = sum_row<false, false, false>(z + begin, count, empty ? 0.0f : block_max).exponentials;
    *out = block_max + (empty ? 0.0f : __builtin_logf((float)sum));
    total += empty ? sum : sum * __builtin_exp((double)block_max - shift);
  }
  return total;
}

template <typename T>
inline void fold_rest(const FoldTile<T>& p, int64_t i, const T* z) {
  if (p.target[i] >= 0 && p.target[i] < p.columns) p.target_logit[i] = z[p.target[i]];
  if (p.stats.top) fold_top(p.stats.top + i * p.stats.top_k, p.stats.top_k, z, p.columns);
}

inline void fold_row(const FoldTile<float>& p, int64_t i) {
  if (p.kept)
    __builtin_memcpy(p.kept + i * p.kept_stride, p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride,
                     p.columns * sizeof(float));
  const float* z = transform_row(p, i);
  const float tile_max = largest(z, p.columns), old_max = p.running_max[i];
  const float new_max = tile_max > old_max ? tile_max : old_max;
  const float shift = new_max == -__builtin_inff() ? 0.0f : new_max;
  if (p.block_lse) {
    Sums sums{};
    if (p.stats.sums()) sums = sum_row(p.stats, z, p.columns, shift);
    sums.exponentials = fold_blocks(p, i, z, shift);
    add_sums(p, i, sums, old_max, new_max);
    fold_rest(p, i, z);
    return;
  }
  add_sums(p, i, p.stats.sums() ? sum_row(p.stats, z, p.columns, shift) : sum_row<false, false, false>(z, p.columns, shift), old_max,
           new_max);
  fold_rest(p, i, z);
}

template <typename T>
inline T coefficient_at(const T* values, int64_t i) { return values ? values[i] : T(0); }

// p of the target by expm1, so that 1 - p keeps its digits when p is near 1. d = log p.
template <typename T>
inline double target_gradient(const GradientTile<T>& p, int64_t i, double d, double floor) {
  double g = -(double)p.coefficient[i] * __builtin_expm1(d) + coefficient_at(p.flat, i);
  if (p.statistics() && !(d < floor)) g += __builtin_exp(d) * (coefficient_at(p.prob, i) + coefficient_at(p.log_prob, i) * d);
  return g;
}

// The least exponent at which coefficient * p is no denormal number.
inline float log_floor(float coefficient) {
  const float least = __builtin_logf(1.17549435e-38f / __builtin_fabsf(coefficient)) + 0.001f;
  return least > kSmallestLogProbability ? least : kSmallestLogProbability;
}

inline void gradient_row(const GradientTile<float>& p, int64_t i) {
  const float* x = p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride;
  float* g = p.gradient + (p.gradient_index ? p.gradient_index[i] : i) * p.gradient_stride;
  const Transform transform(p.head, i);
  const float lse = (float)p.lse[i], lse_rest = (float)(p.lse[i] - lse), scale = p.scale ? p.scale[i] : 1.0f;
  const int64_t target = p.target[i];
  const bool here = target >= 0 && target < p.columns;
  const float target_product = here ? x[target] : 0.0f;  // read before the row is overwritten
  Float slope = broadcast(1.0f);
  const auto each = [&](auto entry) {
    for (int64_t j = 0; j < p.columns; j += ISDAA_LANES) {
      const int64_t count = p.columns - j;
      Float z = load(x + j, count, 0.0f);
      if (!transform.identity) z = transform(z, bias_at(p.head.bias, j, count), slope);
      store(g + j, entry((z - lse) - lse_rest) * slope, count);
    }
  };
  if (!p.statistics()) {
    const float minus_c = -p.coefficient[i] * scale, floor = p.scale ? log_floor(minus_c) : kSmallestLogProbability;
    each([&](Float d) { return exponential(d, floor) * minus_c; });
  } else {
    const float prob = coefficient_at(p.prob, i) - p.coefficient[i], log_prob = coefficient_at(p.log_prob, i);
    const float flat = coefficient_at(p.flat, i), least = 1.17549435e-38f / scale;
    const float limit = least > kSmallestEntry ? least : kSmallestEntry;
    each([&](Float d) {
      const Float e = exponential(d, kSmallestLogProbabilityOfStats);
      const Float low = broadcast(kSmallestLogProbabilityOfStats), bounded = d < low ? low : d;  // 0 * -inf is no number
      const Float entry = e * (prob + log_prob * bounded) + flat;
      return (absolute(entry) < limit ? Float{} : entry) * scale;
    });
  }
  if (here) {
    Float z = broadcast(target_product);
    if (!transform.identity) z = transform(z, broadcast(p.head.bias ? p.head.bias[target] : 0.0f), slope);
    const double entry = target_gradient(p, i, (double)z[0] - p.lse[i], kSmallestLogProbability);
    g[target] = (float)(entry * scale * slope[0]);
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
  const double* x = p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride;
  double* z = p.scratch + i * p.scratch_stride;
  if (p.kept) __builtin_memcpy(p.kept + i * p.kept_stride, x, p.columns * sizeof(double));
  const double lowest = -__builtin_inf(), old_max = p.running_max[i];
  double new_max = old_max, slope;
  for (int64_t j = 0; j < p.columns; ++j) {
    z[j] = transform64(p.head, i, x[j], p.head.bias ? p.head.bias[j] : 0.0, slope);
    new_max = z[j] > new_max ? z[j] : new_max;
  }
  const double shift = new_max == lowest ? 0.0 : new_max;
  Sums sums{};
  for (int64_t j = 0; j < p.columns; ++j) sums.exponentials += __builtin_exp(z[j] - shift);
  if (p.stats.sums())
    for (int64_t j = 0; j < p.columns; ++j) {
      const double d = z[j] - shift, e = __builtin_exp(d);
      sums.entropy += e == 0 ? 0.0 : e * -d;
      sums.squares += e * e;
      sums.logits += z[j];
    }
  if (p.block_lse)
    for (int64_t begin = 0; begin < p.columns; begin += p.block) {
      const int64_t end = begin + p.block < p.columns ? begin + p.block : p.columns;
      double top = lowest, sum = 0;
      for (int64_t j = begin; j < end; ++j) top = z[j] > top ? z[j] : top;
      for (int64_t j = begin; j < end; ++j) sum += __builtin_exp(z[j] - (top == lowest ? 0.0 : top));
      p.block_lse[begin / p.block * p.block_lse_stride + i] = top + (top == lowest ? 0.0 : __builtin_log(sum));
    }
  add_sums(p, i, sums, old_max, new_max);
  fold_rest(p, i, z);
}

inline void gradient_row(const GradientTile<double>& p, int64_t i) {
  const double* x = p.logits + (p.row_index ? p.row_index[i] : i) * p.logits_stride;
  double* g = p.gradient + (p.gradient_index ? p.gradient_index[i] : i) * p.gradient_stride;
  const double prob = coefficient_at(p.prob, i) - p.coefficient[i], log_prob = coefficient_at(p.log_prob, i);
  const double flat = coefficient_at(p.flat, i), scale = p.scale ? p.scale[i] : 1.0;
  for (int64_t j = 0; j < p.columns; ++j) {
    double slope;
    const double d = transform64(p.head, i, x[j], p.head.bias ? p.head.bias[j] : 0.0, slope) - p.lse[i];
    double entry = flat;
    if (j == p.target[i]) entry = target_gradient(p, i, d, kSmallestLogProbability64);
    else if (!(d < kSmallestLogProbability64)) entry += __builtin_exp(d) * (prob + log_prob * d);
    g[j] = entry * scale * slope;
  }
}

// 0 for what would be, or make, a denormal number in a matrix product.
inline float no_denormal(float x) { return __builtin_fabsf(x) < 1e-30f ? 0.0f : x; }
inline double no_denormal(double x) { return x; }

// Row i of the tile: its gradient in place of the product, exp(z - block_lse) added to `sums`.
inline void routed_row(const RoutedTile<float>& p, int64_t i, float* sums) {
  const int64_t n = p.listed[i];
  float* x = p.product + i * p.columns;
  const float mass = p.token.mass(p.b, n), factor = p.token.coefficient[n] * p.token.slope[n];
  const float block_lse = p.token.finite_block_lse(p.b, n);
  const float weight = mass * factor, least = mass > 0.0f ? kSmallestEntry / mass : 1.0f;
  const Transform transform(p.head, n);
  Float slope;
  for (int64_t j = 0; j < p.columns; j += ISDAA_LANES) {
    const int64_t count = p.columns - j;
    Float z = load(x + j, count, 0.0f);
    if (!transform.identity) z = transform(z, bias_at(p.head.bias, j, count), slope);
    const Float within = exponential(z - block_lse, kSmallestLogProbability);
    store(sums + j, load(sums + j, count, 0.0f) + within, count);
    store(x + j, within < least ? Float{} : within * weight, count);
  }
  const int64_t target = p.token.target[n] - p.b * p.token.block;
  if (target >= 0 && target < p.columns) x[target] = p.entry[n] * p.token.slope[n];
  if (i >= p.to_hidden) p.rest[n] = no_denormal(weight);
}

inline void routed_row(const RoutedTile<double>& p, int64_t i, double* sums) {
  const int64_t n = p.listed[i];
  double* x = p.product + i * p.columns;
  const double weight = p.token.mass(p.b, n) * p.token.coefficient[n] * p.token.slope[n];
  const double block_lse = p.token.finite_block_lse(p.b, n);
  double slope;
  for (int64_t j = 0; j < p.columns; ++j) {
    const double within = __builtin_exp(transform64(p.head, n, x[j], p.head.bias ? p.head.bias[j] : 0.0, slope) - block_lse);
    sums[j] += within;
    x[j] = within * weight;
  }
  const int64_t target = p.token.target[n] - p.b * p.token.block;
  if (target >= 0 && target < p.columns) x[target] = p.entry[n] * p.token.slope[n];
  if (i >= p.to_hidden) p.rest[n] = weight;
}

// The sum of those of x[0, count) that are larger than `limit`.
inline double sum_above(const float* x, int64_t count, float limit) {
  constexpr int64_t kGroup = 16 * ISDAA_LANES;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    Float group{};
    for (int64_t j = begin; j < count && j < begin + kGroup; j += ISDAA_LANES) {
      const Float v = load(x + j, count - j, 0.0f);
      group += (Float)((Int)v & (v > limit));
    }
    total += sum_lanes(group);
  }
  return total;
}

inline double sum_above(const double* x, int64_t count, double limit) {
  double total = 0;
  for (int64_t j = 0; j < count; ++j) total += x[j] > limit ? x[j] : 0.0;
  return total;
}

// Routes of one block: its tokens' |coefficient| * mass against the limit, the block's own threshold, and the target.
template <typename T>
inline void route_block(const RouteBlocks<T>& p, int64_t b, T* weighted) {
  const RoutedTokens<T>& token = p.token;
  uint8_t* route = p.route + b * token.tokens;
  T* rest = p.rest + b * token.tokens;
  T high = 0;
  for (int64_t n = 0; n < token.tokens; ++n) {
    const T mass = token.mass(b, n);
    weighted[n] = mass * __builtin_fabs(token.coefficient[n]);
    rest[n] = no_denormal(mass * (token.coefficient[n] * token.slope[n]));
    high = weighted[n] > high ? weighted[n] : high;
  }
  T low = high;  // nothing lies above
  if (p.row_share > 0) {
    low = 0;
    const double wanted = p.row_share * sum_above(weighted, token.tokens, low);
    for (int step = 0; step < kBisections; ++step) {
      const T middle = (low + high) / 2;
      (sum_above(weighted, token.tokens, middle) >= wanted ? low : high) = middle;
    }
  }
  int64_t weight_count = 0, hidden_count = 0;
  for (int64_t n = 0; n < token.tokens; ++n) {
    const bool hidden = weighted[n] > p.limit || token.target[n] / token.block == b;
    const bool weight = hidden || weighted[n] > low;
    route[n] = hidden ? kWeightAndHidden : weight ? kWeight : kNowhere;
    if (weight) rest[n] = 0;
    weight_count += weight;
    hidden_count += hidden;
  }
  p.weight_count[b] = weight_count;
  p.hidden_count[b] = hidden_count;
}
