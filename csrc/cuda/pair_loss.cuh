// A block sums a piece of a sequence; the block that comes last works on the pairs. On the way back a block writes a piece.
#pragma once
#include "last_block.h"
#include "pair_loss.h"

namespace isdaa {

constexpr int kPairThreads = 512;
constexpr int kSpreadThreads = 256;
constexpr int kGroup = 4;  // tokens that a thread takes at once

// The threads of a block, for PairBatch.
template <int kThreads>
class BlockTeam {
 public:
  static constexpr int kWarps = kThreads / kWarp, kMost = 12;
  struct Shared {
    double part[kMost][kWarps];
  };

  __device__ explicit BlockTeam(Shared& shared) : shared_(shared) {}
  __device__ int64_t begin() const { return threadIdx.x; }
  __device__ int64_t step() const { return kThreads; }
  __device__ bool leader() const { return threadIdx.x == 0; }

  template <int kCount>
  __device__ void sum(double (&x)[kCount]) {
    static_assert(kCount <= kMost);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = warp_sum(x[i]);
      if (lane_index() == 0) shared_.part[i][warp_index()] = x[i];
    }
    __syncthreads();
    if (threadIdx.x < kCount) {
      double* part = shared_.part[threadIdx.x];
      for (int w = 1; w < kWarps; ++w) part[0] += part[w];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = shared_.part[i][0];
    __syncthreads();
  }

  __device__ double largest(double x) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) x = larger_or_nan(x, __shfl_xor_sync(kAllLanes, x, offset));
    if (lane_index() == 0) shared_.part[0][warp_index()] = x;
    __syncthreads();
    x = shared_.part[0][0];
    for (int w = 1; w < kWarps; ++w) x = larger_or_nan(x, shared_.part[0][w]);
    __syncthreads();
    return x;
  }

 private:
  Shared& shared_;
};

// Tokens first..first+3. Where `wide`, all four lie within the tensor and on a border of 16 bytes; else only those in the span are read.
template <class T, class Out>
__device__ __forceinline__ void load_group(const T* x, int64_t first, Span span, bool wide, Out (&out)[kGroup]) {
  if (wide) {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kGroup; i += kEach) {
      const Pack<kEach, T> pack = *reinterpret_cast<const Pack<kEach, T>*>(x + first + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) out[i + j] = (Out)pack.value[j];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) out[i] = first + i >= span.begin && first + i < span.end ? (Out)x[first + i] : Out(0);
}

__device__ __forceinline__ bool on_16_bytes(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Which tokens of a group are scored and lie in the span.
template <class Params>
__device__ __forceinline__ void scored_group(const Params& p, int64_t first, Span span, bool wide, bool (&scored)[kGroup]) {
  int64_t target[kGroup];
  wide = wide && on_16_bytes(p.targets);
  if (p.targets && p.targets_bytes == 4) load_group(static_cast<const int32_t*>(p.targets), first, span, wide, target);
  else if (p.targets) load_group(static_cast<const int64_t*>(p.targets), first, span, wide, target);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    scored[i] = first + i >= span.begin && first + i < span.end && (!p.targets || target[i] != p.ignore_index);
}

__device__ __forceinline__ void add_group(const void* x, int32_t bytes, int64_t first, Span span, bool wide,
                                          const bool (&scored)[kGroup], double& sum) {
  double value[kGroup];
  wide = wide && on_16_bytes(x);
  if (bytes == 4) load_group(static_cast<const float*>(x), first, span, wide, value);
  else load_group(static_cast<const double*>(x), first, span, wide, value);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum += scored[i] ? value[i] : 0.0;
}

// This thread's share of {policy, reference, behaviour, scored tokens}.
__device__ __forceinline__ void sum_piece(const PairLossForward& p, Span span, double (&sum)[kPairSums]) {
#pragma unroll 2
  for (int64_t first = span.begin / kGroup * kGroup + threadIdx.x * kGroup; first < span.end; first += kPairThreads * kGroup) {
    const bool wide = first + kGroup <= p.N;
    bool scored[kGroup];
    scored_group(p, first, span, wide, scored);
    add_group(p.policy, p.policy_bytes, first, span, wide, scored, sum[0]);
    if (p.reference_per_token) add_group(p.reference, p.reference_bytes, first, span, wide, scored, sum[1]);
    if (p.behaviour && p.behaviour_per_token) add_group(p.behaviour, p.behaviour_bytes, first, span, wide, scored, sum[2]);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sum[3] += scored[i];
  }
}

// Grid: (S, K), or one block where there are no tokens to sum.
__global__ void __launch_bounds__(kPairThreads, 1) pair_loss_forward_kernel(const __grid_constant__ PairLossForward p) {
  __shared__ BlockTeam<kPairThreads>::Shared shared;
  __shared__ int32_t arrived;
  BlockTeam<kPairThreads> team(shared);
  if (p.cu_seqlens && p.S) {
    double sum[kPairSums] = {0, 0, 0, 0};
    sum_piece(p, piece_of(p, blockIdx.x, blockIdx.y), sum);
    team.sum(sum);
    if (team.leader())
      for (int i = 0; i < kPairSums; ++i) p.sums[((int64_t)blockIdx.x * p.K + blockIdx.y) * kPairSums + i] = sum[i];
    if (!comes_last(p.counter, (int32_t)(gridDim.x * gridDim.y), &arrived)) return;
  }
  const PairSettings<double> set = settings_of(p);
  PairBatch<double, BlockTeam<kPairThreads>> batch(team, set, reinterpret_cast<PairRecord<double>*>(p.records), p.P);
  batch.run([&](int64_t pair) { return pair_input(p, pair); }, p.slope, p.loss, p.metrics);
}

// The slopes of row s, over the pairs that it is in, in one order.
__device__ __forceinline__ double slope_of_row(const PairLossBackward& p, int64_t s, double* shared) {
  if (p.P == 0) return 0;
  if (!p.pairs) return p.slope[s];
  double slope = 0;
  for (int64_t i = threadIdx.x; i < 2 * p.P; i += kSpreadThreads)
    if (integer_at(p.pairs, p.pairs_bytes, i) == s) slope += p.slope[i % 2 * p.P + i / 2];
  return block_sum<kSpreadThreads>(slope, shared);
}

template <class T>
__device__ __forceinline__ void store_group(T* out, int64_t first, Span span, const bool (&scored)[kGroup], T slope) {
  T value[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) value[i] = scored[i] ? slope : T(0);
  if (first >= span.begin && first + kGroup <= span.end && on_16_bytes(out)) {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kGroup; i += kEach) {
      Pack<kEach, T> pack;
#pragma unroll
      for (int j = 0; j < kEach; ++j) pack.value[j] = value[i + j];
      *reinterpret_cast<Pack<kEach, T>*>(out + first + i) = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (first + i >= span.begin && first + i < span.end) out[first + i] = value[i];
}

template <class T>
__device__ __forceinline__ void spread(const PairLossBackward& p, Span span, double slope) {
  T* out = static_cast<T*>(p.out);
  for (int64_t first = span.begin / kGroup * kGroup + threadIdx.x * kGroup; first < span.end; first += kSpreadThreads * kGroup) {
    bool scored[kGroup];
    scored_group(p, first, span, first + kGroup <= p.N, scored);
    store_group<T>(out, first, span, scored, (T)slope);
  }
}

// Zeros for the tokens before the first sequence and behind the last.
template <class T>
__device__ __forceinline__ void clear_outside(const PairLossBackward& p) {
  T* out = static_cast<T*>(p.out);
  const int64_t begin = integer_at(p.cu_seqlens, p.cu_seqlens_bytes, 0), end = integer_at(p.cu_seqlens, p.cu_seqlens_bytes, p.S);
  for (int64_t i = threadIdx.x; i < begin && i < p.N; i += kSpreadThreads) out[i] = T(0);
  for (int64_t i = (end < 0 ? 0 : end) + threadIdx.x; i < p.N; i += kSpreadThreads) out[i] = T(0);
}

// Grid: (max(S, 1), K)
__global__ void __launch_bounds__(kSpreadThreads) pair_loss_backward_kernel(const __grid_constant__ PairLossBackward p) {
  __shared__ double shared[kSpreadThreads / kWarp];
  if (p.cu_seqlens && blockIdx.x == 0 && blockIdx.y == 0) {
    if (p.out_bytes == 4) clear_outside<float>(p);
    else clear_outside<double>(p);
  }
  if (p.S == 0) return;
  double slope = slope_of_row(p, blockIdx.x, shared);
  slope = slope == 0 ? 0 : slope * (double)*p.grad;  // 0 is no gradient, be the upstream one inf
  const Span span = piece_of(p, blockIdx.x, blockIdx.y);
  if (p.out_bytes == 4) spread<float>(p, span, slope);
  else spread<double>(p, span, slope);
}

}  // namespace isdaa
