// One row of a tile of linear_kl. Included by every row_kernels_<isa>.cpp after row_kernels.h, inside that file's namespace.
// excess(x) = exp(x) - 1 - x is not negative, and sum of b excess(log(o / b)) = KL(b || o), as sum of b = sum of o = 1: summed like that a
// small divergence keeps its digits, where sum of b log(b / o) would cancel. For |x| > 1/2 nothing cancels: b excess(x) = o - b - b x.

constexpr float kSmallGap = 0.5f;
constexpr double kSmallGap64 = 0.5;
// Terms of a smaller b times a gap below 1 are nothing beside the largest, which is 1, and some of them would be denormal numbers.
constexpr float kFaintTerm = 1e-20f;

// excess(x) for |x| <= 1/2
inline Float small_excess(Float x) {
  Float y = x * 2.7557319e-6f + 2.4801587e-5f;
  y = y * x + 1.9841270e-4f;
  y = y * x + 1.3888889e-3f;
  y = y * x + 8.3333333e-3f;
  y = y * x + 4.1666667e-2f;
  y = y * x + 1.6666667e-1f;
  y = y * x + 0.5f;
  return y * (x * x);
}

inline double small_excess(double x) {
  double term = x * x / 2, sum = 0;
  for (int k = 3; k < 18; ++k) {
    sum += term;
    term *= x / k;
  }
  return sum;
}

// a - b in two parts, the second of which the first has rounded off. Two heads' logits may lie far apart and yet mean the same.
template <typename V>
struct Difference {
  V high, low;

  Difference(V a, V b) : high(a - b) {
    const V back = high - a;
    low = (a - (high - back)) - (b + back);
    low = low == low ? low : V{};  // of infinities
  }
};

// Products become final logits in place; their maximum.
inline float final_logits(float* x, const HeadTransform<float>& head, int64_t i, int64_t columns) {
  const Transform transform(head, i);
  const float lowest = -__builtin_inff();
  Float top = broadcast(lowest), slope;
  for (int64_t j = 0; j < columns; j += ISDAA_LANES) {
    const int64_t count = columns - j;
    if (!transform.identity) store(x + j, transform(load(x + j, count, 0.0f), bias_at(head.bias, j, count), slope), count);
    top = maximum(load(x + j, count, lowest), top);
  }
  return max_lanes(top);
}

inline double final_logits(double* x, const HeadTransform<double>& head, int64_t i, int64_t columns) {
  double top = -__builtin_inf(), slope;
  for (int64_t j = 0; j < columns; ++j) {
    x[j] = transform64(head, i, x[j], head.bias ? head.bias[j] : 0.0, slope);
    top = x[j] > top ? x[j] : top;
  }
  return top;
}

struct KlSums {
  double base, other;  // exp(z - shift)
  double gap;          // b x
  double excess;       // b excess(x) where |x| <= 1/2
  double linear;       // b (1 + x) elsewhere
  double other_apart;  // o elsewhere
};

// x = (z of other - z of base) - center. Terms that are 1 are counted apart, as in sum_row.
inline KlSums kl_sum_row(const float* base, const float* other, int64_t columns, float base_shift, float other_shift, float center) {
  constexpr int64_t kGroup = 16 * ISDAA_LANES;
  const float lowest = -__builtin_inff();
  Float base_sum{}, other_sum{}, gap_sum{}, excess_sum{}, linear_sum{}, apart_sum{};
  Int base_ones{}, other_ones{};
  for (int64_t begin = 0; begin < columns; begin += kGroup) {
    const int64_t end = begin + kGroup < columns ? begin + kGroup : columns;
    Float base_group{}, other_group{}, gap_group{}, excess_group{}, linear_group{}, apart_group{};
    for (int64_t j = begin; j < end; j += ISDAA_LANES) {
      const Float zb = load(base + j, columns - j, lowest), zo = load(other + j, columns - j, lowest);
      const Float db = zb - base_shift, dg = zo - other_shift;
      const Difference<Float> gap(zo, zb);
      const Float x = (gap.high - center) + gap.low;
      const Float b = exponential_up_to_88(db, -87.0f), o = exponential_up_to_88(dg, -87.0f), size = absolute(x);
      const Int base_one = db == 0.0f, other_one = dg == 0.0f, small = size <= kSmallGap;
      const Int skip = (b == 0.0f) | ((b < kFaintTerm) & (size < 1.0f));
      base_group += base_one ? Float{} : b;
      other_group += other_one ? Float{} : o;
      base_ones -= base_one;
      other_ones -= other_one;
      gap_group += skip ? Float{} : b * x;
      excess_group += (small & ~skip) ? b * small_excess(small ? x : Float{}) : Float{};
      linear_group += (small | skip) ? Float{} : b + b * x;
      apart_group += small ? Float{} : o;
    }
    base_sum += base_group;
    other_sum += other_group;
    gap_sum += gap_group;
    excess_sum += excess_group;
    linear_sum += linear_group;
    apart_sum += apart_group;
  }
  return {sum_lanes(base_sum) + sum_lanes(__builtin_convertvector(base_ones, Float)),
          sum_lanes(other_sum) + sum_lanes(__builtin_convertvector(other_ones, Float)),
          sum_lanes(gap_sum), sum_lanes(excess_sum), sum_lanes(linear_sum), sum_lanes(apart_sum)};
}

inline KlSums kl_sum_row(const double* base, const double* other, int64_t columns, double base_shift, double other_shift, double center) {
  KlSums sums{};
  for (int64_t j = 0; j < columns; ++j) {
    const double b = __builtin_exp(base[j] - base_shift), o = __builtin_exp(other[j] - other_shift);
    const Difference<double> gap(other[j], base[j]);
    const double x = (gap.high - center) + gap.low;
    const bool small = __builtin_fabs(x) <= kSmallGap64;
    sums.base += b;
    sums.other += o;
    sums.gap += b == 0 ? 0.0 : b * x;
    if (small) sums.excess += b * small_excess(x);
    else {
      sums.linear += b == 0 ? 0.0 : b + b * x;
      sums.other_apart += o;
    }
  }
  return sums;
}

inline double exponential_sum(const float* z, int64_t columns, float shift) {
  return sum_row<false, false, false>(z, columns, shift).exponentials;
}

inline double exponential_sum(const double* z, int64_t columns, double shift) {
  double sum = 0;
  for (int64_t j = 0; j < columns; ++j) sum += __builtin_exp(z[j] - shift);
  return sum;
}

// What moves sums taken at `old_max` to `new_max`.
template <typename T>
inline double rescale(T old_max, T new_max) {
  return old_max == -__builtin_inf() ? 0.0 : __builtin_exp((double)old_max - new_max);
}

inline double scaled(double sum, double factor) { return factor == 0 ? 0.0 : sum * factor; }  // an infinite sum may vanish too

// Moves the sums of the divergence to the gap d where the base is largest: near their mean, or excess(d - center) would cancel.
template <typename T>
inline void move_center(const KlTile<T>& p, int64_t i, double base_sum, T gap) {
  if (!(__builtin_fabs(gap) < __builtin_inf())) return;
  const double step = gap - p.center[i], shrink = __builtin_expm1(-step);
  if (base_sum != 0) {
    p.excess_sum[i] = p.excess_sum[i] * (1 + shrink) + shrink * (base_sum + p.gap_sum[i]) + step * base_sum;
    p.gap_sum[i] -= step * base_sum;
  }
  p.center[i] = gap;
}

template <typename T>
inline void kl_fold_row(const KlTile<T>& p, int64_t i) {
  T *policy = p.policy + i * p.policy_stride, *reference = p.reference + i * p.reference_stride;
  const T policy_top = final_logits(policy, p.policy_head(), i, p.columns);
  const T reference_top = final_logits(reference, p.reference_head(), i, p.columns);
  if (p.target && p.target[i] >= 0 && p.target[i] < p.columns) {
    p.policy_target[i] = policy[p.target[i]];
    p.reference_target[i] = reference[p.target[i]];
  }
  const T lowest = -__builtin_inf(), old_policy = p.policy_max[i], old_reference = p.reference_max[i];
  const T new_policy = policy_top > old_policy ? policy_top : old_policy;
  const T new_reference = reference_top > old_reference ? reference_top : old_reference;
  const T policy_shift = new_policy == lowest ? T(0) : new_policy, reference_shift = new_reference == lowest ? T(0) : new_reference;
  const double policy_factor = rescale(old_policy, new_policy), reference_factor = rescale(old_reference, new_reference);
  double policy_sum, reference_sum;
  if (p.direction == kKlJsd) {
    policy_sum = exponential_sum(policy, p.columns, policy_shift);
    reference_sum = exponential_sum(reference, p.columns, reference_shift);
  } else {
    const bool forward = p.direction == kKlForward;
    const T *base = forward ? reference : policy, *other = forward ? policy : reference;
    const T base_shift = forward ? reference_shift : policy_shift, other_shift = forward ? policy_shift : reference_shift;
    const T base_top = forward ? reference_top : policy_top;
    if (base_top > (forward ? old_reference : old_policy)) {
      int64_t j = 0;
      while (base[j] != base_top) ++j;
      move_center<T>(p, i, forward ? p.reference_sum[i] : p.policy_sum[i], other[j] - base[j]);
    }
    const KlSums sums = kl_sum_row(base, other, p.columns, base_shift, other_shift, (T)p.center[i]);
    const double factor = forward ? reference_factor : policy_factor;
    p.gap_sum[i] = scaled(p.gap_sum[i], factor) + sums.gap;
    p.excess_sum[i] = scaled(p.excess_sum[i], factor) + sums.excess - sums.linear;
    // o in units of b
    if (sums.other_apart != 0) p.excess_sum[i] += sums.other_apart * __builtin_exp((double)other_shift - base_shift - p.center[i]);
    policy_sum = forward ? sums.other : sums.base;
    reference_sum = forward ? sums.base : sums.other;
  }
  p.policy_sum[i] = p.policy_sum[i] * policy_factor + policy_sum;
  p.reference_sum[i] = p.reference_sum[i] * reference_factor + reference_sum;
  p.policy_max[i] = new_policy;
  p.reference_max[i] = new_reference;
}

// log(m / p) and log(m / q) of the mixture m = (1 - weight) p + weight q, from r = log(p / q).
struct Mixture {
  float weight, rest;

  explicit Mixture(double weight) : weight((float)weight), rest((float)(1 - weight)) {}

  void operator()(Float r, Float& over_p, Float& over_q) const {
    const Int up = r >= 0.0f;
    const Float size = absolute(r), lesser = up ? broadcast(weight) : broadcast(rest);
    const Int small = size <= kSmallGap;
    const Float t = lesser * (small_excess(small ? -size : Float{}) - size), near = 1.0f + t;
    Float u = near;
    if (any(~small)) {
      const Float far = (up ? broadcast(rest) : broadcast(weight)) + lesser * exponential_up_to_88(-size, -87.0f);
      u = small ? near : far;
    }
    const Float log_u = logarithm(u);
    const Float log_m = !small ? log_u : u == 1.0f ? t : log_u * (t / (u - 1.0f));  // log(m / max(p, q))
    over_p = up ? log_m : log_m - r;
    over_q = up ? log_m + r : log_m;
  }
};

inline void mixture64(double weight, double r, double& over_p, double& over_q) {
  const bool up = r >= 0;
  const double size = __builtin_fabs(r), lesser = up ? weight : 1 - weight, greater = up ? 1 - weight : weight;
  const double log_m = size <= kSmallGap64 ? __builtin_log1p(lesser * __builtin_expm1(-size)) : __builtin_log(greater + lesser * __builtin_exp(-size));
  over_p = up ? log_m : log_m - r;
  over_q = up ? log_m + r : log_m;
}

// Both rows of final logits, as log p, log q and log(p / q) - less, in vectors; `each(j, count, log_p, log_q, r, slope of the policy)`.
template <typename Each>
inline void each_pair(const KlTile<float>& p, int64_t i, double less, const Each& each) {
  const float *policy = p.policy + i * p.policy_stride, *reference = p.reference + i * p.reference_stride;
  const HeadTransform<float> policy_head = p.policy_head(), reference_head = p.reference_head();
  const Transform to_policy(policy_head, i), to_reference(reference_head, i);
  const double gap = p.lse_gap[i] + less;
  const float lp = (float)p.policy_lse[i], lp_rest = (float)(p.policy_lse[i] - lp);
  const float lq = (float)p.reference_lse[i], lq_rest = (float)(p.reference_lse[i] - lq);
  const float gap_high = (float)gap, gap_rest = (float)(gap - gap_high);
  Float slope = broadcast(1.0f), unused;
  for (int64_t j = 0; j < p.columns; j += ISDAA_LANES) {
    const int64_t count = p.columns - j;
    Float zp = load(policy + j, count, 0.0f), zq = load(reference + j, count, 0.0f);
    if (!to_policy.identity) zp = to_policy(zp, bias_at(policy_head.bias, j, count), slope);
    if (!to_reference.identity) zq = to_reference(zq, bias_at(reference_head.bias, j, count), unused);
    const Difference<Float> r(zp, zq);
    each(j, count, (zp - lp) - lp_rest, (zq - lq) - lq_rest, (r.high - gap_high) + (r.low - gap_rest), slope);
  }
}

template <typename Each>
inline void each_pair(const KlTile<double>& p, int64_t i, double less, const Each& each) {
  const double *policy = p.policy + i * p.policy_stride, *reference = p.reference + i * p.reference_stride;
  const HeadTransform<double> policy_head = p.policy_head(), reference_head = p.reference_head();
  for (int64_t j = 0; j < p.columns; ++j) {
    double slope, unused;
    const double zp = transform64(policy_head, i, policy[j], p.policy_bias ? p.policy_bias[j] : 0.0, slope);
    const double zq = transform64(reference_head, i, reference[j], p.reference_bias ? p.reference_bias[j] : 0.0, unused);
    const Difference<double> r(zp, zq);
    each(j, int64_t(1), zp - p.policy_lse[i], zq - p.reference_lse[i], ((r.high - p.lse_gap[i]) - less) + r.low, slope);
  }
}

// b excess(x), m being b exp(x)
inline Float mixture_term(Float b, Float m, Float x) {
  const Int small = absolute(x) <= kSmallGap, none = (b == 0.0f) | ((b < kFaintTerm) & small);
  const Float large = m - (b + b * x);
  return none ? m - b : small ? b * small_excess(small ? x : Float{}) : large;
}

inline double mixture_term(double b, double m, double x) {
  return b == 0 ? m : __builtin_fabs(x) <= kSmallGap64 ? b * small_excess(x) : m - (b + b * x);
}

// The first `count` lanes; the others are 0.
inline Float first(Float v, int64_t count) {
  if (count >= ISDAA_LANES) return v;
  float kept[ISDAA_LANES];
  store(kept, v, ISDAA_LANES);
  return load(kept, count, 0.0f);
}

inline void kl_mixture_row(const KlTile<float>& p, int64_t i) {
  const Mixture mixture(p.jsd_weight);
  constexpr int64_t kGroup = 16 * ISDAA_LANES;
  Float p_sum{}, q_sum{}, mean{}, p_group{}, q_group{}, mean_group{};
  each_pair(p, i, 0.0, [&](int64_t j, int64_t count, Float log_p, Float log_q, Float r, Float) {
    Float over_p, over_q;
    mixture(r, over_p, over_q);
    const Float pj = exponential_up_to_88(log_p, -87.0f), qj = exponential_up_to_88(log_q, -87.0f);
    const Float m = mixture.rest * pj + mixture.weight * qj;
    const Int faint = (pj == 0.0f) | ((pj < kFaintTerm) & (absolute(over_p) < 1.0f));
    p_group += first(mixture_term(pj, m, over_p), count);
    q_group += first(mixture_term(qj, m, over_q), count);
    mean_group -= first(faint ? Float{} : pj * over_p, count);
    if ((j + ISDAA_LANES) % kGroup == 0 || count <= ISDAA_LANES) {
      p_sum += p_group;
      q_sum += q_group;
      mean += mean_group;
      p_group = q_group = mean_group = Float{};
    }
  });
  p.policy_divergence[i] += sum_lanes(p_sum);
  p.reference_divergence[i] += sum_lanes(q_sum);
  p.policy_mean[i] += sum_lanes(mean);
}

inline void kl_mixture_row(const KlTile<double>& p, int64_t i) {
  double p_sum = 0, q_sum = 0, mean = 0;
  each_pair(p, i, 0.0, [&](int64_t, int64_t, double log_p, double log_q, double r, double) {
    double over_p, over_q;
    mixture64(p.jsd_weight, r, over_p, over_q);
    const double pj = __builtin_exp(log_p), qj = __builtin_exp(log_q), m = (1 - p.jsd_weight) * pj + p.jsd_weight * qj;
    p_sum += mixture_term(pj, m, over_p);
    q_sum += mixture_term(qj, m, over_q);
    if (pj != 0) mean -= pj * over_p;
  });
  p.policy_divergence[i] += p_sum;
  p.reference_divergence[i] += q_sum;
  p.policy_mean[i] += mean;
}

// d loss / d z:  forward p - q;  reverse p (log(p / q) - its mean);  jsd (1 - weight) p (log(p / m) - its mean); of a log-prob -p, and
// 1 - p at the target, by expm1, so that it keeps its digits when p is near 1.
inline void kl_gradient_row(const KlTile<float>& p, int64_t i) {
  float* out = p.policy + i * p.policy_stride;
  const float coefficient = p.coefficient[i], logprob = p.logprob ? p.logprob[i] : 0.0f;
  const int64_t target = p.logprob ? p.target[i] : -1;
  const Mixture mixture(p.jsd_weight);
  const auto write = [&](double less, auto entry) {
    each_pair(p, i, less, [&](int64_t j, int64_t count, Float log_p, Float log_q, Float r, Float slope) {
      const Float pj = exponential_up_to_88(log_p, kSmallestLogProbabilityOfStats), g = entry(pj, log_q, r);
      if (!p.logprob) return store(out + j, (absolute(g) < kSmallestEntry ? Float{} : g) * coefficient * slope, count);
      const Float of_divergence = coefficient == 0.0f ? Float{} : g * coefficient;  // g may be infinite
      Float both = of_divergence - pj * logprob;
      const int64_t lane = target - j;
      if (lane >= 0 && lane < ISDAA_LANES) both[lane] = of_divergence[lane] - (float)(logprob * __builtin_expm1((double)log_p[lane]));
      store(out + j, (absolute(both) < kSmallestEntry ? Float{} : both) * slope, count);
    });
  };
  if (p.direction == kKlForward)
    write(0.0, [&](Float pj, Float log_q, Float r) {
      const Float qj = exponential_up_to_88(log_q, kSmallestLogProbabilityOfStats);
      const Int small = absolute(r) <= kSmallGap;
      const Float x = small ? r : Float{};
      return small ? qj * (x + small_excess(x)) : pj - qj;  // q expm1(r)
    });
  else if (p.direction == kKlReverse)
    write(p.mean[i], [&](Float pj, Float, Float above) { return pj == 0.0f ? Float{} : pj * above; });
  else
    write(0.0, [&, mean = (float)p.mean[i]](Float pj, Float, Float r) {
      Float over_p, over_q;
      mixture(r, over_p, over_q);
      return pj == 0.0f ? Float{} : mixture.rest * pj * (-over_p - mean);
    });
}

inline void kl_gradient_row(const KlTile<double>& p, int64_t i) {
  double* out = p.policy + i * p.policy_stride;
  const double less = p.direction == kKlReverse ? p.mean[i] : 0.0;
  each_pair(p, i, less, [&](int64_t j, int64_t, double log_p, double log_q, double r, double slope) {
    const double pj = log_p < kSmallestLogProbability64 ? 0.0 : __builtin_exp(log_p);
    double entry = 0;
    if (p.direction == kKlForward) {
      const double qj = log_q < kSmallestLogProbability64 ? 0.0 : __builtin_exp(log_q);
      entry = __builtin_fabs(r) <= kSmallGap64 ? qj * __builtin_expm1(r) : pj - qj;
    } else if (p.direction == kKlReverse) {
      if (pj != 0) entry = pj * r;
    } else if (pj != 0) {
      double over_p, over_q;
      mixture64(p.jsd_weight, r, over_p, over_q);
      entry = (1 - p.jsd_weight) * pj * (-over_p - p.mean[i]);
    }
    entry = p.coefficient[i] == 0 ? 0.0 : entry * p.coefficient[i];
    if (p.logprob) entry -= p.logprob[i] * (j == p.target[i] ? __builtin_expm1(log_p) : pj);
    out[j] = entry * slope;
  });
}
