// csrc/cuda/hopper.h on the CPU, after the PTX manual. What the hardware does on its own is done at the worst of times: a tile arrives at
// once, or when no thread can go on without it; products read their operands when somebody waits for them, and warps that wait go on after
// different times. So a stage that is given back too early shows as wrong numbers.
#pragma once
#include <map>
#include <utility>

#include "device.h"
#include "fields.h"
#include "host.h"

namespace isdaa {
namespace hopper {

constexpr int kWarpGroup = 128;
constexpr int kSwizzledRow = 128;
constexpr int kTileAlignment = 1024;
constexpr int kAccumulators = 64 * 256 / kWarpGroup;

namespace emulated {

inline void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("hopper: ") + what);
}

inline uint32_t shared_address(const void* pointer) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - emulator::block().shared;
  require(offset >= 0 && offset < (int64_t)emulator::kShared, "an address outside of shared memory");
  return (uint32_t)offset;
}

// What the hardware may choose, in each block the same in every run.
inline uint32_t& chance_state() {
  static uint32_t state = 0;
  return state;
}
inline uint32_t chance(uint32_t below) {
  uint32_t& state = chance_state();
  state = state * 1664525u + 1013904223u;
  return (state >> 16) % below;
}

// All other threads that can go on do so first, and now and then a tile arrives.
inline void pause() {
  emulator::wait_until([asked = false]() mutable { return std::exchange(asked, true); }, "its turn");
  auto& deferred = emulator::block().deferred;
  if (deferred.empty() || chance(16)) return;
  const auto work = std::move(deferred.front());
  deferred.pop_front();
  work();
}

// A stretch of time that some take: none, a little, or so much that others finish a tile and more.
inline void linger() {
  for (uint32_t pauses = chance(chance(4) ? 4 : 300); pauses; --pauses) pause();
}

// The 128-byte swizzle: parts of 16 bytes change places within 128 bytes, by the row of 128 bytes that they are in.
inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// The 8 bytes of a barrier.
struct BarrierState {
  int32_t bytes;  // announced and not yet there
  uint8_t expected, pending, phase, made;

  void end_phase_if_complete() {
    if (pending || bytes) return;
    phase ^= 1;
    pending = expected;
  }
  void arrive() {
    require(pending > 0, "more arrivals than a phase has");
    --pending;
    end_phase_if_complete();
  }
};
constexpr uint8_t kMade = 0x5a;

inline BarrierState& state(uint64_t* barrier) {
  shared_address(barrier);
  require(reinterpret_cast<uintptr_t>(barrier) % 8 == 0, "a barrier that is not at a multiple of 8 bytes");
  BarrierState& found = *reinterpret_cast<BarrierState*>(barrier);
  require(found.made == kMade, "no barrier where one is used");
  return found;
}

struct Product {
  void (*run)(float*, uint64_t, uint64_t, bool, int);
  float* acc;
  uint64_t a, b;
  bool add;
};

// What a thread has ordered.
struct Orders {
  bool begun = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  size_t issued = 0;  // products since the block began
};

// Of one block: threads of a warp group must order the same products.
struct BlockOrders {
  std::map<int, Orders> of_thread;
  std::map<int, std::vector<std::pair<uint64_t, uint64_t>>> of_group;
};
inline BlockOrders& block_orders() {
  static BlockOrders orders;
  return orders;
}

// Row `row` of a factor, 16 numbers: in groups of 8 rows of 128 bytes, swizzled by address.
template <class T>
void read_row(uint64_t descriptor, int row, float (&out)[16]) {
  const uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "a matrix whose swizzle is not of 128 bytes");
  for (int k = 0; k < 16; k += 8) {  // parts of 16 bytes
    const uint32_t address = start + row / 8 * eight_rows + row % 8 * kSwizzledRow + k * 2;
    const T* part = reinterpret_cast<const T*>(emulator::block().shared + swizzle(address));
    for (int i = 0; i < 8; ++i) out[k + i] = widen(part[i]);
  }
}

template <class T>
void run_product(float* acc, uint64_t a, uint64_t b, bool add, int thread) {
  float x[2][16], y[16];
  const int warp = thread / kWarp % 4, lane = thread % kWarp;
  for (int r = 0; r < 2; ++r) read_row<T>(a, 16 * warp + lane / 4 + 8 * r, x[r]);
  for (int i = 0; i < kAccumulators / 2; ++i) {
    read_row<T>(b, 8 * (i / 2) + 2 * (lane % 4) + i % 2, y);
    for (int r = 0; r < 2; ++r) {
      float& sum = acc[4 * (i / 2) + 2 * r + i % 2];
      if (!add) sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += x[r][k] * y[k];
    }
  }
}

template <class T>
void order_product(float* acc, uint64_t a, uint64_t b, bool add) {
  const int thread = emulator::linear_thread();
  Orders& orders = block_orders().of_thread[thread];
  require(orders.begun, "products without products_begin");
  auto& group = block_orders().of_group[thread / kWarpGroup];
  if (orders.issued == group.size()) group.emplace_back(a, b);
  require(group[orders.issued++] == std::make_pair(a, b), "threads of a warp group that order different products");
  orders.open.push_back({run_product<T>, acc, a, b, add});
}

}  // namespace emulated

using Barrier = uint64_t;

inline void barrier_init(Barrier* barrier, int arrivals) {
  emulated::block_orders() = {};
  emulated::chance_state() = emulator::block().index.x;
  emulated::shared_address(barrier);
  emulated::require(arrivals > 0 && arrivals < 256, "bad number of arrivals");
  *reinterpret_cast<emulated::BarrierState*>(barrier) = {0, (uint8_t)arrivals, (uint8_t)arrivals, 0, emulated::kMade};
}

inline void barrier_init_done() {}

inline void barrier_arrive(Barrier* barrier) { emulated::state(barrier).arrive(); }

inline void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  emulated::state(barrier).bytes += (int32_t)bytes;
  emulated::state(barrier).arrive();
}

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  emulator::wait_until([barrier, parity] { return emulated::state(barrier).phase != parity; }, "a barrier");
}

template <int kThreads>
inline void meet(int name) {
  static_assert(kThreads % kWarp == 0);
  emulated::require(name > 0 && name < 16, "bad name of a barrier");
  emulator::meet(emulator::block().named[name], kThreads, "a named barrier");
  if (emulated::chance(kWarp) == 0) emulated::linger();
}

struct alignas(64) TensorMap {
  const unsigned char* matrix;
  int64_t rows, row_bytes, stride_bytes;
  int tile_rows;
};

inline void load_tile(void* to, const TensorMap* map, int row, int column, Barrier* barrier) {
  emulated::require(reinterpret_cast<uintptr_t>(map) % 64 == 0, "a tensor map that is not at a multiple of 64 bytes");
  const uint32_t begin = emulated::shared_address(to);
  emulated::require(begin % kTileAlignment == 0, "a tile that does not begin where its swizzle does");
  const auto copy = [=, map = *map] {
    unsigned char* shared = emulator::block().shared;
    for (int i = 0; i < map.tile_rows; ++i)
      for (int byte = 0; byte < kSwizzledRow; byte += 2) {
        const int64_t y = row + i, x = 2 * (int64_t)column + byte;
        const bool inside = y >= 0 && y < map.rows && x >= 0 && x < map.row_bytes;
        const unsigned char* from = map.matrix + y * map.stride_bytes + x;
        unsigned char* cell = shared + emulated::swizzle(begin + i * kSwizzledRow + byte);
        for (int half = 0; half < 2; ++half) cell[half] = inside ? from[half] : 0;
      }
    emulated::BarrierState& state = emulated::state(barrier);
    state.bytes -= map.tile_rows * kSwizzledRow;
    state.end_phase_if_complete();
  };
  if (emulated::chance(2)) copy();
  else emulator::defer(copy);
}

constexpr uint64_t kStepOfProducts = 16 * 2 >> 4;

inline uint64_t matrix_descriptor(const void* tile) {
  constexpr uint64_t kEightRows = 8 * kSwizzledRow >> 4, kSwizzle128 = 1;
  return (emulated::shared_address(tile) & 0x3ffff) >> 4 | 1ull << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

inline void products_begin(float (&)[kAccumulators]) {
  emulated::block_orders().of_thread[emulator::linear_thread()].begun = true;
}

inline void products_commit() {
  emulated::Orders& orders = emulated::block_orders().of_thread[emulator::linear_thread()];
  orders.groups.push_back(std::move(orders.open));
  orders.open.clear();
}

// A warp waits as one.
template <int kPending>
inline void products_wait(float (&)[kAccumulators]) {
  const int thread = emulator::linear_thread();
  emulated::Orders& orders = emulated::block_orders().of_thread[thread];
  orders.begun = false;
  if (thread % kWarp == 0) emulated::linger();
  __syncwarp();
  for (; orders.groups.size() > kPending; orders.groups.pop_front())
    for (const emulated::Product& product : orders.groups.front())
      product.run(product.acc, product.a, product.b, product.add, thread);
  __syncwarp();
}

template <class T>
inline void product_64x256x16(float (&acc)[kAccumulators], uint64_t a, uint64_t b, bool add) {
  emulated::order_product<T>(acc, a, b, add);
}

template <int kRegisters>
inline void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline int uniform(int x) {
  emulated::require(__shfl_sync(kAllLanes, x, 0) == x, "lanes that differ");
  return x;
}

inline float fast_exp(float x) {
  const float y = expf(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float rounded_product(float a, float b) { return a * b; }

inline float fast_reciprocal(float x) { return 1.0f / x; }

template <class T>
inline uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | (uint32_t)narrow<T>(high).bits << 16;
}

inline TensorMap tensor_map(const void* matrix, int32_t, int64_t rows, int64_t columns, int64_t stride, int tile_rows) {
  emulated::require(reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride * 2 % 16 == 0, "a matrix off 16-byte borders");
  emulated::require(tile_rows > 0 && tile_rows <= 256, "a tile of more than 256 rows");
  return {static_cast<const unsigned char*>(matrix), rows, columns * 2, stride * 2, tile_rows};
}

}  // namespace hopper
}  // namespace isdaa
