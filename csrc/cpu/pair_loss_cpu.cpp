#include "pair_loss_cpu.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace isdaa {
namespace {

constexpr int64_t kWorthThreads = 1 << 19;  // tokens; below, waking a thread costs more than it does
constexpr int kLanes = 8;                   // running sums, so that an addition need not wait for the one before it

// A team of one.
struct Alone {
  int64_t begin() const { return 0; }
  int64_t step() const { return 1; }
  bool leader() const { return true; }
  template <int kCount>
  void sum(double (&)[kCount]) const {}
  double largest(double x) const { return x; }
};

// Over the scored tokens; what the others hold does not matter.
template <class Number, class Target>
double sum_scored(const Number* x, const Target* target, Target ignore, int64_t count) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += target[i + j] != ignore ? double(x[i + j]) : 0.0;
  for (; i < count; ++i) lane[i % kLanes] += target[i] != ignore ? double(x[i]) : 0.0;
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

template <class Number>
double sum_all(const Number* x, int64_t count) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += double(x[i + j]);
  for (; i < count; ++i) lane[i % kLanes] += double(x[i]);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

template <class Target>
int64_t count_scored(const Target* target, Target ignore, int64_t count) {
  int64_t scored = 0;
  for (int64_t i = 0; i < count; ++i) scored += target[i] != ignore;
  return scored;
}

struct Tokens {
  const void* targets;
  int32_t bytes;
  int64_t ignore_index;

  // with(target, ignore), or all() where no token is left out
  template <class With, class All>
  auto visit(const With& with, const All& all) const {
    if (targets && bytes == 4) return with(static_cast<const int32_t*>(targets), (int32_t)ignore_index);
    if (targets) return with(static_cast<const int64_t*>(targets), ignore_index);
    return all();
  }
};

template <class Number>
double sum_span(const Number* x, const Tokens& tokens, Span span) {
  const int64_t count = span.end - span.begin;
  return tokens.visit([&](auto* target, auto ignore) { return sum_scored(x + span.begin, target + span.begin, ignore, count); },
                      [&] { return sum_all(x + span.begin, count); });
}

double sum_stream(const void* x, int32_t bytes, const Tokens& tokens, Span span) {
  return bytes == 4 ? sum_span(static_cast<const float*>(x), tokens, span) : sum_span(static_cast<const double*>(x), tokens, span);
}

void sum_sequence(const PairLossForward& p, int64_t s) {
  const Tokens tokens = {p.targets, p.targets_bytes, p.ignore_index};
  const Span span = piece_of(p, s, 0);
  double* out = p.sums + s * kPairSums;
  out[0] = sum_stream(p.policy, p.policy_bytes, tokens, span);
  out[1] = p.reference_per_token ? sum_stream(p.reference, p.reference_bytes, tokens, span) : 0;
  out[2] = p.behaviour && p.behaviour_per_token ? sum_stream(p.behaviour, p.behaviour_bytes, tokens, span) : 0;
  out[3] = (double)tokens.visit(
      [&](auto* target, auto ignore) { return count_scored(target + span.begin, ignore, span.end - span.begin); },
      [&] { return span.end - span.begin; });
}

void check_segments(const void* cu_seqlens, int32_t bytes, int64_t S, int64_t N) {
  int64_t last = 0;
  for (int64_t s = 0; s <= S; ++s) {
    const int64_t end = integer_at(cu_seqlens, bytes, s);
    if (end < last || end > N)
      throw std::invalid_argument("cu_seqlens: expected ascending numbers from 0 to " + std::to_string(N) + ", got " +
                                  std::to_string(end) + " at place " + std::to_string(s));
    last = end;
  }
}

void check_pairs(const void* pairs, int32_t bytes, int64_t P, int64_t S) {
  for (int64_t i = 0; i < 2 * P; ++i) {
    const int64_t row = integer_at(pairs, bytes, i);
    if (row < 0 || row >= S)
      throw std::invalid_argument("pairs: expected rows in 0.." + std::to_string(S - 1) + ", got " + std::to_string(row));
  }
}

template <class Params>
void check(const Params& p) {
  if (p.cu_seqlens) check_segments(p.cu_seqlens, p.cu_seqlens_bytes, p.S, p.N);
  if (p.pairs) check_pairs(p.pairs, p.pairs_bytes, p.P, p.S);
}

std::vector<double> slope_of_rows(const PairLossBackward& p) {
  std::vector<double> slope_S(p.S, 0.0);
  for (int64_t i = 0; i < 2 * p.P; ++i) {
    const int64_t row = p.pairs ? integer_at(p.pairs, p.pairs_bytes, i) : i;
    slope_S[row] += p.pairs ? p.slope[i % 2 * p.P + i / 2] : p.slope[i];
  }
  // 0 is no gradient, be the upstream one inf
  for (double& slope : slope_S) slope = slope == 0 ? 0 : slope * (double)*p.grad;
  return slope_S;
}

template <class Number>
void spread(const PairLossBackward& p, const Tokens& tokens, Span span, Number slope) {
  Number* out = static_cast<Number*>(p.out);
  tokens.visit(
      [&](auto* target, auto ignore) {
        for (int64_t i = span.begin; i < span.end; ++i) out[i] = target[i] != ignore ? slope : Number(0);
      },
      [&] { std::fill(out + span.begin, out + span.end, slope); });
}

template <class Number>
void spread_all(const PairLossBackward& p, int threads) {
  const std::vector<double> slope_S = slope_of_rows(p);
  const Tokens tokens = {p.targets, p.targets_bytes, p.ignore_index};
  Number* out = static_cast<Number*>(p.out);
  if (p.cu_seqlens) {  // tokens before the first sequence and behind the last
    std::fill(out, out + integer_at(p.cu_seqlens, p.cu_seqlens_bytes, 0), Number(0));
    std::fill(out + integer_at(p.cu_seqlens, p.cu_seqlens_bytes, p.S), out + p.N, Number(0));
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (p.N >= kWorthThreads)
  for (int64_t s = 0; s < p.S; ++s) spread(p, tokens, piece_of(p, s, 0), (Number)slope_S[s]);
}

}  // namespace

void pair_loss_forward(const PairLossForward& p, int threads) {
  check(p);
  if (p.cu_seqlens) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (p.N >= kWorthThreads)
    for (int64_t s = 0; s < p.S; ++s) sum_sequence(p, s);
  }
  const PairSettings<double> set = settings_of(p);
  Alone alone;
  PairBatch<double, Alone> batch(alone, set, reinterpret_cast<PairRecord<double>*>(p.records), p.P);
  batch.run([&](int64_t pair) { return pair_input(p, pair); }, p.slope, p.loss, p.metrics);
}

void pair_loss_backward(const PairLossBackward& p, int threads) {
  check(p);
  if (p.out_bytes == 4) spread_all<float>(p, threads);
  else spread_all<double>(p, threads);
}

}  // namespace isdaa
