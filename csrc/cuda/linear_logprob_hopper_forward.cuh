// linear_logprob_forward: each tile of logits folded into partial log-sum-exps, 64 vocabulary rows a slot.
#pragma once
#include "linear_logprob_hopper.h"
#include "linear_logprob_hopper_tile.cuh"

namespace isdaa {
namespace hopper {

struct ForwardShared {
  Ring ring;
  float bias[2][kHalves][kTileColumns];  // of this tile and the next
};
static_assert(sizeof(ForwardShared) <= kSharedLimit);

// What a slot adds up to in the two rows of a thread, before the four threads of a row are put together.
struct Sums {
  float small[2][kSlots], ones[2][kSlots];  // of exp(z - max): terms below 1; number of terms that are 1
  float entropy[2][kSlots], squares[2][kSlots], total[2][kSlots];
};

// x[q] of the four threads of a row added up, in thread q.
__device__ __forceinline__ float quad_share(const float (&x)[kSlots], const Seat& seat) {
  const bool odd = seat.quad & 1, high = seat.quad & 2;
  const float a = (high ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, high ? x[0] : x[2], 2);
  const float b = (high ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, high ? x[1] : x[3], 2);
  return (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 1);
}

__device__ __forceinline__ float quad_max(float x) {
  x = larger(x, __shfl_xor_sync(kAllLanes, x, 2));
  return larger(x, __shfl_xor_sync(kAllLanes, x, 1));
}

__device__ __forceinline__ float pick(const float (&x)[kSlots], int slot) {
  const float low = slot & 1 ? x[1] : x[0], high = slot & 1 ? x[3] : x[2];
  return slot & 2 ? high : low;
}

// The logits of a slot in place of the products. A product that ends a logit is rounded before anything is taken from it: the largest
// minus itself is 0.
template <bool kRich>
__device__ __forceinline__ void transform(float (&acc)[kAccumulators], int slot, const float (&inverse)[2], const float* bias,
                                          const Head& head, const Seat& seat) {
  const float* bias_of_thread = bias + slot * kSlotColumns + 2 * seat.quad;
  if (kRich && head.softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& z = acc[at(slot, i / 4, i / 2 % 2, i % 2)];
      z = rounded_product(fast_tangent((z + bias_of_thread[8 * (i / 4) + i % 2]) * head.scale_in_cap), head.softcap * inverse[i / 2 % 2]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& z = acc[at(slot, i / 4, i / 2 % 2, i % 2)];
      if constexpr (kRich) z += bias_of_thread[8 * (i / 4) + i % 2];
      z = rounded_product(z, head.logit_scale * inverse[i / 2 % 2]);
    }
  }
}

// Columns from `left` on become -inf. Sums of those before.
__device__ __forceinline__ void mask(float (&acc)[kAccumulators], int slot, int64_t left, Sums& sums, const Seat& seat) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = 0.0f;
    if (left >= kSlotColumns) {
#pragma unroll
      for (int i = 0; i < 16; ++i) total += acc[at(slot, i / 2, r, i % 2)];
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& z = acc[at(slot, i / 2, r, i % 2)];
        if (seat.column(i / 2, i % 2) < left) total += z;
        else z = kLowest;
      }
    }
    sums.total[r][slot] = total;
  }
}

// Terms equal to 1 are counted apart: where the target has nearly all of the probability, 1 - p lives in the small terms, and beside a 1
// they would lose their digits.
template <bool kStats>
__device__ __forceinline__ void fold(const float (&acc)[kAccumulators], int slot, int r, float top, Sums& sums) {
  const float shift = top == kLowest ? 0.0f : top;
  float small = 0.0f, ones = 0.0f, entropy = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float d = acc[at(slot, i / 2, r, i % 2)] - shift, e = fast_exp(d);
    if (d == 0.0f) ones += 1.0f;
    else small += e;
    if constexpr (kStats) {
      entropy += e * fminf(-d, 1e30f);
      squares += e * e;
    }
  }
  sums.small[r][slot] = small;
  sums.ones[r][slot] = ones;
  sums.entropy[r][slot] = entropy;
  sums.squares[r][slot] = squares;
}

// The target's logit, where it is a column of the tile that this thread holds.
__device__ __forceinline__ void write_target(const float (&acc)[kAccumulators], int r, int64_t target, float* to, const Seat& seat) {
  if (target < 0 || target >= kTileColumns || target % 8 / 2 != seat.quad) return;
  const int column = (int)target - 2 * seat.quad;
  float z = 0.0f;
#pragma unroll
  for (int i = 0; i < kAccumulators / 2; ++i) z = column == 8 * (i / 2) + i % 2 ? acc[at(0, i / 2, r, i % 2)] : z;
  *to = z;
}

// Thread q of a row writes slot q.
template <bool kStats>
__device__ __forceinline__ void write_slots(const LinearLogprobForwardHopper& p, const float (&top)[kSlots], const Sums& sums, int r,
                                            int64_t place, bool live, const Seat& seat) {
  const float small = quad_share(sums.small[r], seat), ones = quad_share(sums.ones[r], seat);
  float entropy, squares, total;
  if constexpr (kStats) {
    entropy = quad_share(sums.entropy[r], seat);
    squares = quad_share(sums.squares[r], seat);
    total = quad_share(sums.total[r], seat);
  }
  if (!live) return;
  p.partial_max[place] = pick(top, seat.quad);
  p.partial_sum[place] = (double)small + (double)ones;
  if constexpr (kStats) {
    if (p.partial_entropy) p.partial_entropy[place] = entropy;
    if (p.partial_squares) p.partial_squares[place] = squares;
    if (p.partial_total) p.partial_total[place] = total;
  }
}

template <class T, bool kRich, bool kStats>
__device__ __forceinline__ void fold_tiles(const LinearLogprobForwardHopper& p, const Head& head, const Tiles& tiles, int64_t live,
                                           int steps, ForwardShared& shared) {
  const Seat seat;
  Cursor cursor;
  int turn = 0;
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x, turn ^= 1) {
    int m, n;
    tiles.place(tile, m, n);
    const int64_t row = (int64_t)m * kTileTokens + seat.row, begin = (int64_t)n * kTileColumns;
    const float inverse[2] = {p.inverse_temperature[row], p.inverse_temperature[row + 8]};
    const int64_t target[2] = {p.targets[row] - begin, p.targets[row + 8] - begin};
    const float* bias = shared.bias[turn][seat.half];
    if constexpr (kRich) load_bias(shared.bias[turn][seat.half], p.bias, p.bias_dtype, begin, p.V, seat);
    float acc[kAccumulators];
    multiply<T>(acc, seat, steps, shared.ring, cursor);
    float top[2][kSlots];
    Sums sums;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      transform<kRich>(acc, slot, inverse, bias, head, seat);
      mask(acc, slot, p.V - begin - slot * kSlotColumns, sums, seat);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = acc[at(slot, 0, r, 0)];
#pragma unroll
        for (int i = 1; i < 16; ++i) largest = larger(largest, acc[at(slot, i / 2, r, i % 2)]);
        top[r][slot] = quad_max(largest);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r < live) write_target(acc, r, target[r], p.target_logit + row + 8 * r, seat);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) fold<kStats>(acc, slot, r, top[r][slot], sums);
      const int64_t place = ((int64_t)n * kSlots + seat.quad) * p.T + row + 8 * r;
      write_slots<kStats>(p, top[r], sums, r, place, row + 8 * r < live, seat);
    }
  }
}

template <class T, bool kRich, bool kStats>
__global__ void __launch_bounds__(kThreads, 1)
    linear_logprob_forward_kernel(const __grid_constant__ Launched<LinearLogprobForwardHopper> launched) {
  ISDAA_DYNAMIC_SHARED(memory);
  ForwardShared& shared = *reinterpret_cast<ForwardShared*>(memory);
  const LinearLogprobForwardHopper& p = launched.params;
  const int64_t live = live_tokens(p.count, p.first, p.T);
  const Tiles tiles(live, p.V);
  const int steps = (int)((p.D + kTileStep - 1) / kTileStep);
  make_ring(shared.ring);
  if (threadIdx.x < kWarpGroup) {
    give_registers<kLoadRegisters>();
    if (threadIdx.x == 0) load_tiles(launched, tiles, 0, steps, shared.ring);
  } else {
    take_registers<kFoldRegisters>();
    fold_tiles<T, kRich, kStats>(p, launched.head, tiles, live, steps, shared);
  }
}

template <bool kRich>
void launch_forward(const Launched<LinearLogprobForwardHopper>& launched, dim3 grid, cudaStream_t stream) {
  const LinearLogprobForwardHopper& p = launched.params;
  const bool stats = p.partial_entropy || p.partial_total || p.partial_squares;
  const auto kernel = p.dtype == kBfloat16
                          ? (stats ? linear_logprob_forward_kernel<bf16, kRich, true> : linear_logprob_forward_kernel<bf16, kRich, false>)
                          : (stats ? linear_logprob_forward_kernel<half, kRich, true> : linear_logprob_forward_kernel<half, kRich, false>);
  launch(kernel, "linear_logprob_forward", grid, kThreads, sizeof(ForwardShared), stream, launched);
}

}  // namespace hopper
}  // namespace isdaa
