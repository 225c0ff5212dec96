// What both fused kernels share: the walk over tiles, and the product of a tile. Three warp groups: one loads, two multiply 64 tokens each
// with the same 256 vocabulary rows. The loads run ahead of the products by kStages steps, over the borders of tiles too, so that they go
// on while the tile is finished.
#pragma once
#include "any.cuh"
#include "head.cuh"
#include "hopper.h"

namespace isdaa {
namespace hopper {

constexpr int kTileTokens = 128, kTileColumns = 256, kTileStep = 64, kStages = 4;
constexpr int kTileGroup = 16;  // rows of tiles that share each stretch of weight while it is in the cache
constexpr int kHalves = 2, kHalfTokens = kTileTokens / kHalves;
constexpr int kFoldThreads = kHalves * kWarpGroup, kThreads = kWarpGroup + kFoldThreads;  // of those that finish tiles; of all
constexpr int kSlots = 4, kSlotColumns = kTileColumns / kSlots;
constexpr int kLoadRegisters = 40, kFoldRegisters = 232, kLaunchRegisters = 65536 / kThreads / 8 * 8;
static_assert(kLoadRegisters + kHalves * kFoldRegisters <= (1 + kHalves) * kLaunchRegisters);
constexpr size_t kSharedLimit = 227 << 10;

struct alignas(kTileAlignment) Stage {
  unsigned char hidden[kTileTokens * kSwizzledRow];
  unsigned char weight[kTileColumns * kSwizzledRow];
};

struct Ring {
  Stage stage[kStages];
  Barrier full[kStages], empty[kStages];
};

// A thread's place in the ring.
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Tiles of the live tokens. Those with neighbouring numbers share hidden states or weight.
struct Tiles {
  int rows, columns, count;

  __device__ __forceinline__ Tiles(int64_t live, int64_t width)
      : rows((int)((live + kTileTokens - 1) / kTileTokens)),
        columns((int)((width + kTileColumns - 1) / kTileColumns)),
        count(rows * columns) {}

  __device__ __forceinline__ void place(int tile, int& m, int& n) const {
    const int group = tile / (kTileGroup * columns), within = tile % (kTileGroup * columns);
    const int below = rows - group * kTileGroup, height = below < kTileGroup ? below : kTileGroup;
    m = group * kTileGroup + within % height;
    n = within / height;
  }
};

struct Head {
  float logit_scale, softcap;  // softcap 0: none
  float scale_in_cap;          // logit_scale / softcap
};

// What a kernel is launched with.
template <class Params>
struct Launched {
  TensorMap hidden, weight;
  Params params;
  Head head;
};

// By all threads of the block.
__device__ __forceinline__ void make_ring(Ring& ring) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&ring.full[s], 1);
      barrier_init(&ring.empty[s], kFoldThreads / kWarp);
    }
    barrier_init_done();
  }
  __syncthreads();
}

// By one thread: all operands of all tiles of this block, in the order in which they are multiplied.
template <class Params>
__device__ __forceinline__ void load_tiles(const Launched<Params>& launched, const Tiles& tiles, int begin, int steps, Ring& ring) {
  Cursor cursor;
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    int m, n;
    tiles.place(tile, m, n);
    for (int k = 0; k < steps; ++k, cursor.advance()) {
      Stage& stage = ring.stage[cursor.stage];
      barrier_wait(&ring.empty[cursor.stage], cursor.parity ^ 1);
      barrier_arrive_expecting(&ring.full[cursor.stage], sizeof(Stage));
      load_tile(stage.hidden, &launched.hidden, m * kTileTokens, k * kTileStep, &ring.full[cursor.stage]);
      load_tile(stage.weight, &launched.weight, begin + n * kTileColumns, k * kTileStep, &ring.full[cursor.stage]);
    }
  }
}

// Where a thread of the second or third warp group stands in a tile: in two rows, `row` and row + 8.
struct Seat {
  int half, row, quad;

  __device__ __forceinline__ Seat()
      : half(uniform(threadIdx.x / kWarpGroup) - 1), row((warp_index() - 4) * 16 + lane_index() / 4), quad(lane_index() % 4) {}

  // Column within its slot of accumulators at(slot, j, ., c).
  __device__ __forceinline__ int column(int j, int c) const { return 8 * j + 2 * quad + c; }
};

// The accumulator of row 8 * r of a thread's two and column 8 * j + c of its slot's.
__device__ __forceinline__ constexpr int at(int slot, int j, int r, int c) { return 4 * (8 * slot + j) + 2 * r + c; }

// By a warp, which has no more use for a stage.
__device__ __forceinline__ void give_back(Ring& ring, int stage) {
  if (lane_index() == 0) barrier_arrive(&ring.empty[stage]);
}

// The products of a tile, in the accumulators of a warp group's threads. A step's operands are given back when the next step's products
// have been ordered.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[kAccumulators], const Seat& seat, int steps, Ring& ring, Cursor& cursor) {
  int before = -1;
  for (int k = 0; k < steps; ++k, cursor.advance()) {
    const Stage& stage = ring.stage[cursor.stage];
    barrier_wait(&ring.full[cursor.stage], cursor.parity);
    const uint64_t a = matrix_descriptor(stage.hidden + seat.half * kHalfTokens * kSwizzledRow), b = matrix_descriptor(stage.weight);
    products_begin(acc);
#pragma unroll
    for (int i = 0; i < kTileStep / 16; ++i)
      product_64x256x16<T>(acc, a + i * kStepOfProducts, b + i * kStepOfProducts, k + i > 0);
    products_commit();
    products_wait<1>(acc);
    if (before >= 0) give_back(ring, before);
    before = cursor.stage;
  }
  products_wait<0>(acc);
  give_back(ring, before);
}

// The tile's bias as fp32 for a warp group, 0 from `end` on and where there is none.
__device__ __forceinline__ void load_bias(float* to, const void* bias, int32_t dtype, int64_t begin, int64_t end, const Seat& seat) {
  for (int i = threadIdx.x % kWarpGroup; i < kTileColumns; i += kWarpGroup)
    to[i] = bias && begin + i < end ? load_any(bias, dtype, begin + i) : 0.0f;
  meet<kWarpGroup>(1 + seat.half);
}

// With the special functions of the hardware: it runs for every entry of the logits.
__device__ __forceinline__ float fast_tangent(float x) {
  return hyperbolic_tangent(x, [](float y) { return fast_reciprocal(fast_exp(y) + 1.0f); });
}

}  // namespace hopper
}  // namespace isdaa
