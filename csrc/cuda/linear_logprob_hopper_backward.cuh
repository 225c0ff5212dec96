// linear_logprob_backward: each tile of logits turned into the gradient of the product, a tile of a 16-bit chunk.
#pragma once
#include "linear_logprob_hopper.h"
#include "linear_logprob_hopper_tile.cuh"

namespace isdaa {
namespace hopper {

constexpr int kFoldWarps = kFoldThreads / kWarp, kWarpTokens = 16;
constexpr int kZeroThreads = kWarpGroup - kWarp;  // warps of the first group that load nothing

struct BackwardShared {
  Ring ring;
  uint32_t staged[kFoldWarps][kWarpTokens * kSlotColumns / 2];  // a slot of a warp's rows, in 16 bits
  float sums[kFoldWarps][kTileColumns];                         // of a warp's rows
  float bias[2][kHalves][kTileColumns];                         // of this tile and the next
};
static_assert(sizeof(BackwardShared) <= kSharedLimit);

// What the gradient of a row needs. Without bias and softcap z is x times a number of the row, and so is the gradient of x that of z:
// both are part of `scale` and of the coefficients.
struct Row {
  float unscale, scale, cap, lse_high, lse_low, plain, log_prob, flat, bias_weight;
  int64_t target;  // its column in the tile
  bool live;

  template <bool kRich, bool kStats>
  __device__ __forceinline__ void load(const LinearLogprobBackwardHopper& p, int64_t i, int64_t first_column, bool is_live) {
    const float* token = p.tokens + i;
    const float inverse = token[kInverseTemperature * p.T];
    live = is_live;
    target = p.targets[i] - first_column;
    scale = p.logit_scale * inverse;
    unscale = token[kUnscale * p.T];
    lse_high = token[kLseHigh * p.T];
    lse_low = token[kLseLow * p.T];
    plain = token[kPlain * p.T];
    if constexpr (kStats) {
      log_prob = token[kLogProb * p.T];
      flat = token[kFlat * p.T];
    }
    if constexpr (kRich) {
      cap = p.softcap * inverse;
      bias_weight = live ? token[kScale * p.T] : 0.0f;
    } else {
      plain *= scale;
      if constexpr (kStats) {
        log_prob *= scale;
        flat *= scale;
      }
      scale *= unscale;
    }
  }
};

// The gradient of z outside the target's column.
template <bool kStats>
__device__ __forceinline__ float gradient(float z, const Row& row) {
  const float log_p = (z - row.lse_high) - row.lse_low, p = fast_exp(log_p);
  if constexpr (kStats) return p * (row.plain + row.log_prob * fmaxf(log_p, -200.0f)) + row.flat;  // below -88 p is 0
  else return p * row.plain;
}

// The gradients of a slot in place of the products.
template <bool kRich, bool kStats>
__device__ __forceinline__ void differentiate(float (&acc)[kAccumulators], int slot, const Row (&row)[2], const float* bias,
                                              const Head& head, const Seat& seat) {
  const float* bias_of_thread = bias + slot * kSlotColumns + 2 * seat.quad;
  if (kRich && head.softcap > 0.0f) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& x = acc[at(slot, i / 4, i / 2 % 2, i % 2)];
      const Row& of = row[i / 2 % 2];
      const float t = fast_tangent((x * of.unscale + bias_of_thread[8 * (i / 4) + i % 2]) * head.scale_in_cap);
      x = gradient<kStats>(t * of.cap, of) * ((1.0f - t * t) * of.scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& x = acc[at(slot, i / 4, i / 2 % 2, i % 2)];
      const Row& of = row[i / 2 % 2];
      if constexpr (kRich) x = gradient<kStats>((x * of.unscale + bias_of_thread[8 * (i / 4) + i % 2]) * of.scale, of) * of.scale;
      else x = gradient<kStats>(x * of.scale, of);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t target = row[r].target - slot * kSlotColumns;
    const bool here = target >= 0 && target < kSlotColumns && target % 8 / 2 == seat.quad;
    if (!here && row[r].live) continue;
    const int column = (int)target - 2 * seat.quad;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& g = acc[at(slot, i / 2, r, i % 2)];
      g = !row[r].live || column == 8 * (i / 2) + i % 2 ? 0.0f : g;
    }
  }
}

// Half of x goes to the lane 2 * kKept away, which has as much for this one: both keep the sums of kKept numbers.
template <int kKept>
__device__ __forceinline__ void halve(float (&x)[16]) {
  const bool upper = lane_index() & 2 * kKept;
#pragma unroll
  for (int i = 0; i < kKept; ++i)
    x[i] = (upper ? x[i + kKept] : x[i]) + __shfl_xor_sync(kAllLanes, upper ? x[i] : x[i + kKept], 2 * kKept);
}

// Sums of a slot's columns over the 16 rows of a warp: a lane ends with two columns, 2 * lane and the next.
__device__ __forceinline__ void sum_rows(const float (&acc)[kAccumulators], int slot, const Row (&row)[2], float* to) {
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    x[i] = acc[at(slot, i / 2, 0, i % 2)] * row[0].bias_weight + acc[at(slot, i / 2, 1, i % 2)] * row[1].bias_weight;
  halve<8>(x);
  halve<4>(x);
  halve<2>(x);
  to[slot * kSlotColumns + 2 * lane_index()] = x[0];
  to[slot * kSlotColumns + 2 * lane_index() + 1] = x[1];
}

// A slot of a warp's rows, through shared memory so that neighbouring lanes write neighbouring bytes. The parts of 16 bytes of row i lie
// at their place XOR i % 8: no two lanes meet in a bank. Of the slot's columns `left` are there.
template <class T>
__device__ __forceinline__ void write_slot(const float (&acc)[kAccumulators], int slot, uint32_t* staged, T* to, int64_t stride,
                                           int64_t left, bool wide, const Seat& seat) {
  const int lane = lane_index();
  __syncwarp();  // the slot before this one has been read
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int j = i / 2, r = i % 2, row = lane / 4 + 8 * r;
    staged[row * 32 + (j ^ row % 8) * 4 + seat.quad] = narrow_pair<T>(acc[at(slot, j, r, 0)], acc[at(slot, j, r, 1)]);
  }
  __syncwarp();
  if (wide && left >= kSlotColumns) {
    const int part = lane % 8;
    T* place = to + lane / 8 * stride + 8 * part;
#pragma unroll
    for (int i = 0; i < kWarpTokens / 4; ++i, place += 4 * stride) {  // 16 bytes a lane, 4 rows at once
      const int row = 4 * i + lane / 8;
      *reinterpret_cast<Pack<4, uint32_t>*>(place) =
          *reinterpret_cast<const Pack<4, uint32_t>*>(staged + row * 32 + (part ^ row % 8) * 4);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < kWarpTokens * kSlotColumns; i += kWarp) {
      const int row = i / kSlotColumns, column = i % kSlotColumns;
      const T* part = reinterpret_cast<const T*>(staged + row * 32 + (column / 8 ^ row % 8) * 4);
      if (column < left) to[row * stride + column] = part[column % 8];
    }
  }
}

// The sums of a tile's columns, from those of the warps in their order.
__device__ __forceinline__ void write_bias_sums(const BackwardShared& shared, float* to, int64_t left) {
  const int column = threadIdx.x - kWarpGroup;
  meet<kFoldThreads>(1 + kHalves);
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kFoldWarps; ++w) total += shared.sums[w][column];
  if (column < left) to[column] = total;
  meet<kFoldThreads>(1 + kHalves);
}

template <class T, bool kRich, bool kStats>
__device__ __forceinline__ void differentiate_tiles(const LinearLogprobBackwardHopper& p, const Head& head, const Tiles& tiles,
                                                    int64_t live, int steps, bool wide, BackwardShared& shared) {
  const Seat seat;
  Cursor cursor;
  int turn = 0;
  const int warp = warp_index() - kWarpGroup / kWarp;
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x, turn ^= 1) {
    int m, n;
    tiles.place(tile, m, n);
    const int64_t row = (int64_t)m * kTileTokens + seat.row, place = (int64_t)n * kTileColumns, left = p.end - p.begin - place;
    Row rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) rows[r].load<kRich, kStats>(p, row + 8 * r, p.begin + place, row + 8 * r < live);
    const float* bias = shared.bias[turn][seat.half];
    if constexpr (kRich) load_bias(shared.bias[turn][seat.half], p.bias, p.bias_dtype, p.begin + place, p.end, seat);
    float acc[kAccumulators];
    multiply<T>(acc, seat, steps, shared.ring, cursor);
    T* to = static_cast<T*>(p.out) + ((int64_t)m * kTileTokens + warp * kWarpTokens) * p.stride_out + place;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      differentiate<kRich, kStats>(acc, slot, rows, bias, head, seat);
      if (kRich && p.bias_sums) sum_rows(acc, slot, rows, shared.sums[warp]);
      const int column = slot * kSlotColumns;
      write_slot(acc, slot, shared.staged[warp], to + column, p.stride_out, left - column, wide, seat);
    }
    if (kRich && p.bias_sums) write_bias_sums(shared, p.bias_sums + m * (p.end - p.begin) + place, left);
  }
}

// Rows [begin, T) of out: a library product reads them all.
template <class T>
__device__ __forceinline__ void zero_behind(const LinearLogprobBackwardHopper& p, int64_t begin, bool wide) {
  const int64_t columns = p.end - p.begin, in_parts = wide ? columns / 8 * 8 : 0;
  const int thread = threadIdx.x - kWarp;
  for (int64_t row = begin + blockIdx.x; row < p.T; row += gridDim.x) {
    T* to = static_cast<T*>(p.out) + row * p.stride_out;
#pragma unroll 1
    for (int64_t i = 8 * thread; i < in_parts; i += 8 * kZeroThreads) *reinterpret_cast<Pack<4, uint32_t>*>(to + i) = {};
#pragma unroll 1
    for (int64_t i = in_parts + thread; i < columns; i += kZeroThreads) to[i] = narrow<T>(0.0f);
  }
}

template <class T, bool kRich, bool kStats>
__global__ void __launch_bounds__(kThreads, 1)
    linear_logprob_backward_kernel(const __grid_constant__ Launched<LinearLogprobBackwardHopper> launched) {
  ISDAA_DYNAMIC_SHARED(memory);
  BackwardShared& shared = *reinterpret_cast<BackwardShared*>(memory);
  const LinearLogprobBackwardHopper& p = launched.params;
  const int64_t live = live_tokens(p.count, p.first, p.T);
  const Tiles tiles(live, p.end - p.begin);
  const int steps = (int)((p.D + kTileStep - 1) / kTileStep);
  const bool wide = p.stride_out % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  make_ring(shared.ring);
  if (threadIdx.x < kWarpGroup) {
    give_registers<kLoadRegisters>();
    if (threadIdx.x == 0) load_tiles(launched, tiles, (int)p.begin, steps, shared.ring);
    if (threadIdx.x >= kWarp) zero_behind<T>(p, (int64_t)tiles.rows * kTileTokens, wide);
  } else {
    take_registers<kFoldRegisters>();
    differentiate_tiles<T, kRich, kStats>(p, launched.head, tiles, live, steps, wide, shared);
  }
}

template <bool kRich>
void launch_backward(const Launched<LinearLogprobBackwardHopper>& launched, dim3 grid, cudaStream_t stream) {
  const LinearLogprobBackwardHopper& p = launched.params;
  const bool stats = p.log_prob || p.flat;
  const auto kernel = p.dtype == kBfloat16 ? (stats ? linear_logprob_backward_kernel<bf16, kRich, true>
                                                    : linear_logprob_backward_kernel<bf16, kRich, false>)
                                           : (stats ? linear_logprob_backward_kernel<half, kRich, true>
                                                    : linear_logprob_backward_kernel<half, kRich, false>);
  launch(kernel, "linear_logprob_backward", grid, kThreads, sizeof(BackwardShared), stream, launched);
}

}  // namespace hopper
}  // namespace isdaa
