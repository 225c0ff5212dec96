// The parameters of the loss stage, the same on CPU and GPU, and how they are read.
//
// N numbers of the policy: token log-probs of a packed batch, or, without cu_seqlens, one sum a sequence (N = S). S sequences, P pairs,
// K pieces that a sequence is cut into for summing. Where a pointer has `_bytes` beside it, 4 and 8 say float and double (int32_t and
// int64_t of integers). Values that a device cannot check lead to no access outside the tensors: ends of sequences are cut to 0..N, a
// pair whose row does not exist is NaN.
#pragma once
#include <cstdint>

#include "fields.h"
#include "pair_loss.h"

namespace isdaa {

// sums[s, k] = {policy, reference, behaviour, scored tokens} of a piece
constexpr int kPairSums = 4;

struct PairLossForward {
  const void* policy;  // [N]
  int32_t policy_bytes;
  const void* reference;  // [N], or [S]
  int32_t reference_bytes;
  bool reference_per_token;
  const void* behaviour;  // the same, or null: the reference
  int32_t behaviour_bytes;
  bool behaviour_per_token;
  const void* cu_seqlens;  // [S + 1], or null
  int32_t cu_seqlens_bytes;
  const void* targets;  // [N], or null: all tokens are scored
  int32_t targets_bytes;
  const double* lengths;  // [S], without cu_seqlens only; or null: nothing is empty
  const void* pairs;      // [P, 2], or null: p and P + p
  int32_t pairs_bytes;
  const double* terms;  // [4, P] beta, label_smoothing, sample_weight, denominator; or null: the values below, and sample weights of 1
  double* sums;      // [S, K, kPairSums] workspace, with cu_seqlens only
  double* records;   // [P, kPairRecord] workspace
  int32_t* counter;  // [1] workspace of the GPU, with cu_seqlens only
  double* slope;     // [2, P] out: d loss / d(sum) of the chosen, of the rejected
  float* loss;       // [1] out
  float* metrics;    // [kPairMetrics] out
  int64_t N, S, P, K, ignore_index;
  int32_t base, mode;
  bool weighted, normalize, detach;
  double beta, label_smoothing, denominator, epsilon, floor, power, length_exponent;

  ISDAA_FIELDS(policy, policy_bytes, reference, reference_bytes, reference_per_token, behaviour, behaviour_bytes, behaviour_per_token,
               cu_seqlens, cu_seqlens_bytes, targets, targets_bytes, lengths, pairs, pairs_bytes, terms, sums, records, counter, slope,
               loss, metrics, N, S, P, K, ignore_index, base, mode, weighted, normalize, detach, beta, label_smoothing, denominator,
               epsilon, floor, power, length_exponent)
};

// out[n] = grad * slope of the sequence of n, summed over its pairs; 0 where the target is ignored.
struct PairLossBackward {
  const float* grad;    // [1]
  const double* slope;  // [2, P]
  const void* cu_seqlens;
  int32_t cu_seqlens_bytes;
  const void* targets;
  int32_t targets_bytes;
  const void* pairs;
  int32_t pairs_bytes;
  void* out;  // [N]
  int32_t out_bytes;
  int64_t N, S, P, K, ignore_index;

  ISDAA_FIELDS(grad, slope, cu_seqlens, cu_seqlens_bytes, targets, targets_bytes, pairs, pairs_bytes, out, out_bytes, N, S, P, K,
               ignore_index)
};

ISDAA_ANYWHERE int64_t integer_at(const void* from, int32_t bytes, int64_t i) {
  return bytes == 4 ? static_cast<const int32_t*>(from)[i] : static_cast<const int64_t*>(from)[i];
}

ISDAA_ANYWHERE double number_at(const void* from, int32_t bytes, int64_t i) {
  return bytes == 4 ? static_cast<const float*>(from)[i] : static_cast<const double*>(from)[i];
}

struct Span {
  int64_t begin, end;
};

// The tokens of piece k of K of sequence s: all of it lies in [0, N).
template <class Params>
ISDAA_ANYWHERE Span piece_of(const Params& p, int64_t s, int64_t k) {
  if (!p.cu_seqlens) return {s, s + 1};
  int64_t begin = integer_at(p.cu_seqlens, p.cu_seqlens_bytes, s), end = integer_at(p.cu_seqlens, p.cu_seqlens_bytes, s + 1);
  begin = begin < 0 ? 0 : begin;
  end = end > p.N ? p.N : end;
  const int64_t length = (end - begin + p.K - 1) / p.K;
  begin += k * length;
  return {begin, begin + length < end ? begin + length : end};
}

ISDAA_ANYWHERE PairSettings<double> settings_of(const PairLossForward& p) {
  const double denominator = p.terms && p.P ? p.terms[3 * p.P] : p.denominator;
  return {p.base, p.mode, p.weighted, p.normalize, p.detach, p.epsilon, p.floor, p.power, p.length_exponent, denominator};
}

// The sums of row s: its pieces in their order, or the numbers that were given as sums.
ISDAA_ANYWHERE Completion<double> completion_of(const PairLossForward& p, int64_t s) {
  const double nan = double(NAN);
  if (s < 0 || s >= p.S) return {nan, nan, nan, 1};
  double total[kPairSums] = {0, 0, 0, 0};
  if (p.cu_seqlens) {
    for (int64_t k = 0; k < p.K; ++k)
      for (int i = 0; i < kPairSums; ++i) total[i] += p.sums[(s * p.K + k) * kPairSums + i];
  } else {
    total[0] = number_at(p.policy, p.policy_bytes, s);
    total[3] = p.lengths ? p.lengths[s] : 1;
  }
  if (!p.cu_seqlens || !p.reference_per_token) total[1] = number_at(p.reference, p.reference_bytes, s);
  if (!p.behaviour) total[2] = total[1];
  else if (!p.cu_seqlens || !p.behaviour_per_token) total[2] = number_at(p.behaviour, p.behaviour_bytes, s);
  return {total[0], total[1], total[2], total[3]};
}

ISDAA_ANYWHERE PairInput<double> pair_input(const PairLossForward& p, int64_t pair) {
  const int64_t chosen = p.pairs ? integer_at(p.pairs, p.pairs_bytes, 2 * pair) : pair;
  const int64_t rejected = p.pairs ? integer_at(p.pairs, p.pairs_bytes, 2 * pair + 1) : p.P + pair;
  const Completion<double> first = completion_of(p, chosen), second = completion_of(p, rejected);
  if (!p.terms) return {first, second, p.beta, p.label_smoothing, 1.0};
  return {first, second, p.terms[pair], p.terms[p.P + pair], p.terms[2 * p.P + pair]};
}

}  // namespace isdaa
