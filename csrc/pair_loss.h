// The loss of preference pairs as isdaa_kernels.objectives defines it, and its derivatives: plain templates on the number type that the
// CPU's compiler and nvcc both read. A new pairwise objective is a case of `base_loss`, here and in its Triton twin, pair_formulas.py.
//
// Letters: P pairs; a, b log-ratios to the reference of the chosen and the rejected completion; a', b' the same to the behaviour policy;
// n_a, n_b their counts of scored tokens. Derivatives are by the policy's two sums of token log-probs.
#pragma once
#include <math.h>
#include <cstdint>

#ifdef __CUDACC__
#define ISDAA_ANYWHERE __device__ __forceinline__
#else
#define ISDAA_ANYWHERE inline
#endif

namespace isdaa {

enum PairBase : int32_t { kDpo = 0, kIpo = 1, kIpoMean = 2, kSlic = 3 };  // isdaa_kernels.pair_loss.BASES
enum ClipMode : int32_t { kJoint = 0, kPerCompletion = 1, kNoClip = 2 };  // isdaa_kernels.pair_loss.MODES

// What does not differ from pair to pair.
template <class T>
struct PairSettings {
  int32_t base, mode;
  bool weighted, normalize, detach;  // of ImportanceWeight; `weighted` false: every weight is 1
  T epsilon, floor, power, length_exponent;  // floor 0: none
  T denominator;
};

template <class T>
struct Completion {
  T policy, reference, behaviour;  // sums of token log-probs
  T length;                        // count of scored tokens
};

template <class T>
struct PairInput {
  Completion<T> chosen, rejected;
  T beta, label_smoothing, sample_weight;
};

template <class T>
struct PairRecord {
  T loss, loss_chosen, loss_rejected;                              // of the base objective
  T log_weight, total, weight_chosen, weight_rejected, clipped;    // log_weight with its derivatives; total: a' + b' before clip and floor
  T weight;
  T a, b;
  T sample_weight;
  T nonempty;  // 1 or 0, as `clipped`
};
constexpr int kPairRecord = 13;  // numbers
static_assert(sizeof(PairRecord<double>) == kPairRecord * sizeof(double), "isdaa_kernels.pair_loss.RECORD");

constexpr int kPairMetrics = 13;  // isdaa_kernels.objectives.metrics.PAIR_METRICS

// d/d(x) of the loss of x = beta (a - b), where s is the sigmoid: -(1 - e) log s(x) - e log s(-x). As in PyTorch 0 * -inf is NaN.
template <class T>
ISDAA_ANYWHERE void dpo_loss(T beta, T smoothing, PairRecord<T>& pair) {
  const T x = beta * (pair.a - pair.b), z = exp(-fabs(x));
  const T tail = log1p(z), small = z / (1 + z), large = 1 / (1 + z);
  const T log_right = (x < 0 ? x : T(0)) - tail, log_wrong = (x > 0 ? -x : T(0)) - tail;
  pair.loss = -(1 - smoothing) * log_right - smoothing * log_wrong;
  pair.loss_chosen = beta * (smoothing * (x > 0 ? large : small) - (1 - smoothing) * (x < 0 ? large : small));
  pair.loss_rejected = -pair.loss_chosen;
}

// r^2 with r = a / n_a - b / n_b - 1 / (2 beta); `ipo` has counts of 1.
template <class T>
ISDAA_ANYWHERE void ipo_loss(T beta, T chosen_length, T rejected_length, PairRecord<T>& pair) {
  const T r = pair.a / chosen_length - pair.b / rejected_length - 1 / (2 * beta);
  pair.loss = r * r;
  pair.loss_chosen = 2 * r / chosen_length;
  pair.loss_rejected = -2 * r / rejected_length;
}

// max(0, 1 - beta (a - b)). A NaN keeps its slope, as in PyTorch.
template <class T>
ISDAA_ANYWHERE void slic_loss(T beta, PairRecord<T>& pair) {
  const T hinge = 1 - beta * (pair.a - pair.b);
  const bool satisfied = hinge <= 0;
  pair.loss = satisfied ? T(0) : hinge;
  pair.loss_chosen = satisfied ? T(0) : -beta;
  pair.loss_rejected = -pair.loss_chosen;
}

template <class T>
ISDAA_ANYWHERE void base_loss(int32_t base, const PairInput<T>& input, PairRecord<T>& pair) {
  switch (base) {
    case kDpo: return dpo_loss(input.beta, input.label_smoothing, pair);
    case kIpo: return ipo_loss(input.beta, T(1), T(1), pair);
    case kIpoMean: return ipo_loss(input.beta, input.chosen.length, input.rejected.length, pair);
    default: return slic_loss(input.beta, pair);
  }
}

// x where it is below the cap, else the cap; NaN stays. `slope` becomes 0 where the cap bites.
template <class T>
ISDAA_ANYWHERE T capped(T x, T cap, T& slope) {
  if (!(x <= cap)) slope = 0;
  return x > cap ? cap : x;
}

// length^exponent. Without pow, whose every case would cost a GPU registers.
template <class T>
ISDAA_ANYWHERE T power_of_length(T length, T exponent) {
  return exponent == 1 ? length : exp(exponent * log(length));
}

// ImportanceWeight: a' and b' tempered by power and lengths, clipped, floored.
template <class T>
ISDAA_ANYWHERE void log_weight(const PairSettings<T>& set, const PairInput<T>& input, PairRecord<T>& pair) {
  const Completion<T>&c = input.chosen, &r = input.rejected;
  T chosen = c.policy - c.behaviour, rejected = r.policy - r.behaviour;
  T slope_c = set.power, slope_r = set.power;
  if (set.length_exponent > 0) {
    const T over_c = power_of_length(c.length, set.length_exponent), over_r = power_of_length(r.length, set.length_exponent);
    chosen /= over_c, rejected /= over_r, slope_c /= over_c, slope_r /= over_r;
  }
  chosen *= set.power, rejected *= set.power;
  pair.total = pair.log_weight = chosen + rejected;
  if (set.mode == kJoint) {
    T passes = 1;
    pair.clipped = pair.total >= 2 * set.epsilon;
    pair.log_weight = capped(pair.total, 2 * set.epsilon, passes);
    slope_c *= passes, slope_r *= passes;
  } else if (set.mode == kPerCompletion) {
    // the larger of the two is NaN where one is
    pair.clipped = chosen == chosen && rejected == rejected && (chosen >= set.epsilon || rejected >= set.epsilon);
    pair.log_weight = capped(chosen, set.epsilon, slope_c) + capped(rejected, set.epsilon, slope_r);
  }
  if (set.floor > 0) {
    const T least = log(set.floor);
    if (!(pair.log_weight >= least)) slope_c = slope_r = 0;
    if (pair.log_weight < least) pair.log_weight = least;
  }
  pair.weight_chosen = slope_c, pair.weight_rejected = slope_r;
}

// All that a pair tells on its own. A pair with an empty completion is all zeros but for its weight of 1, whatever its log-probs are.
template <class T>
ISDAA_ANYWHERE PairRecord<T> record_of(const PairSettings<T>& set, const PairInput<T>& input) {
  PairRecord<T> pair = {};
  pair.weight = 1;
  if (!(input.chosen.length > 0 && input.rejected.length > 0)) return pair;
  pair.nonempty = 1;
  pair.sample_weight = input.sample_weight;
  pair.a = input.chosen.policy - input.chosen.reference;
  pair.b = input.rejected.policy - input.rejected.reference;
  base_loss(set.base, input, pair);
  if (set.weighted) {
    log_weight(set, input, pair);
    pair.weight = exp(pair.log_weight);  // one exponential of the sum: the product of two could be inf * 0
  }
  return pair;
}

// Whether a pair's weight enters the mean of `normalize`.
template <class T>
ISDAA_ANYWHERE bool enters_mean(const PairRecord<T>& pair) {
  return pair.nonempty != 0 && pair.log_weight - pair.log_weight == 0;
}

template <class T>
ISDAA_ANYWHERE T larger_or_nan(T a, T b) {
  return b > a || b != b ? b : a;
}

// The batch: what needs all pairs. It is worked on by a team, one thread of a CPU or the threads of a block, each of which takes every
// `step`-th pair from `begin` on and sees in a pass only what it wrote itself:
//     team.sum(x)     x[i] becomes its sum over the team, in one fixed order, for every member
//     team.largest(x) the largest over the team, NaN if there is one
//     team.leader()   true of one member
template <class T, class Team>
class PairBatch {
 public:
  ISDAA_ANYWHERE PairBatch(Team& team, const PairSettings<T>& set, PairRecord<T>* records, int64_t P)
      : team_(team), set_(set), records_(records), P_(P) {}

  // input(p) -> PairInput<T>. slope: [2, P] d loss / d(sum) of chosen, then of rejected.
  template <class Input>
  ISDAA_ANYWHERE void run(const Input& input, T* slope, float* loss, float* metrics) {
    for (int64_t p = team_.begin(); p < P_; p += team_.step()) records_[p] = record_of(set_, input(p));
    T entering = 0;
    if (set_.weighted && set_.normalize) entering = normalize();
    const T total = report(loss, metrics);
    for (int64_t p = team_.begin(); p < P_; p += team_.step()) write_slope(p, total, entering, slope);
  }

 private:
  // Divides the weights by their mean over the pairs that enter it, whose number it returns. Shifted by the largest logarithm, or tiny
  // weights would give 0 / 0.
  ISDAA_ANYWHERE T normalize() {
    T peak = T(-1e300);
    for (int64_t p = team_.begin(); p < P_; p += team_.step())
      if (enters_mean(records_[p]) && records_[p].log_weight > peak) peak = records_[p].log_weight;
    peak = team_.largest(peak);
    T sums[2] = {0, 0};
    for (int64_t p = team_.begin(); p < P_; p += team_.step()) {
      if (!enters_mean(records_[p])) continue;
      sums[0] += exp(records_[p].log_weight - peak);
      sums[1] += 1;
    }
    team_.sum(sums);
    const T mean = sums[0] / (sums[1] > 1 ? sums[1] : T(1));
    for (int64_t p = team_.begin(); p < P_; p += team_.step())
      if (records_[p].nonempty != 0) records_[p].weight = exp(records_[p].log_weight - peak) / mean;
    return sums[1];
  }

  // Loss and metrics; the sum of the weighted losses.
  ISDAA_ANYWHERE T report(float* loss, float* metrics) {
    T top = 0;
    for (int64_t p = team_.begin(); p < P_; p += team_.step())
      if (records_[p].nonempty != 0) top = larger_or_nan(top, records_[p].weight);
    top = team_.largest(top);
    // of the effective sample size: weights over the largest, or small squares would underflow
    const T tiny = T(2.2250738585072014e-308), unit = top < tiny ? tiny : top;
    T sums[12] = {};
    for (int64_t p = team_.begin(); p < P_; p += team_.step()) {
      const PairRecord<T>& pair = records_[p];
      if (pair.nonempty == 0) continue;
      const T scaled = pair.weight / unit;
      const T own[12] = {1, pair.weight * pair.loss * pair.sample_weight, pair.a - pair.b, T(pair.a - pair.b > 0), pair.a, pair.b,
                         pair.weight, pair.clipped, T(pair.weight < T(1e-3)), pair.total, scaled, scaled * scaled};
      for (int i = 0; i < 12; ++i) sums[i] += own[i];
    }
    team_.sum(sums);
    if (team_.leader()) {
      *loss = float(sums[1] / set_.denominator);
      const T count = sums[0] > 1 ? sums[0] : T(1);
      const T ess = sums[10] * sums[10] / (sums[11] < tiny ? tiny : sums[11]);
      const T found[kPairMetrics] = {sums[1] / count, sums[2] / count, sums[3] / count, sums[4] / count, sums[5] / count,
                                     sums[6] / count, top, sums[7] / count, sums[8] / count, ess, sums[9] / count,
                                     -(sums[4] / count + sums[5] / count) / 2, T(P_) - sums[0]};
      for (int i = 0; i < kPairMetrics; ++i) metrics[i] = float(found[i]);
    }
    return sums[1];
  }

  ISDAA_ANYWHERE void write_slope(int64_t p, T total, T entering, T* slope) {
    const PairRecord<T>& pair = records_[p];
    const T share = pair.sample_weight / set_.denominator;
    T chosen = 0, rejected = 0;
    // a satisfied hinge has no gradient, be its weight NaN
    if (pair.nonempty != 0 && !(set_.base == kSlic && pair.loss_chosen == 0))
      chosen = share * pair.weight * pair.loss_chosen, rejected = share * pair.weight * pair.loss_rejected;
    if (pair.nonempty != 0 && set_.weighted && !set_.detach) {
      T by_weight = share * pair.loss;
      if (set_.normalize && enters_mean(pair)) by_weight -= total / set_.denominator / entering;
      // a slope of 0 takes out even what is not finite
      if (pair.weight_chosen != 0) chosen += by_weight * pair.weight * pair.weight_chosen;
      if (pair.weight_rejected != 0) rejected += by_weight * pair.weight * pair.weight_rejected;
    }
    slope[p] = chosen;
    slope[P_ + p] = rejected;
  }

  Team& team_;
  const PairSettings<T>& set_;
  PairRecord<T>* records_;
  int64_t P_;
};

}  // namespace isdaa
