// Runs CUDA kernels on the CPU, one block at a time, so that tests can check the source that nvcc compiles. Threads of a block are fibers
// that give way only where they wait for each other; a block in which all of them wait for ever is an error that says who waits for what.
// Every second block runs its threads from the last to the first, so that a missing barrier shows. Shared memory begins as NaN.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __align__(n) alignas(n)
#define ISDAA_DYNAMIC_SHARED(name) unsigned char* name = ::isdaa::emulator::block().shared

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace isdaa {
namespace emulator {

constexpr size_t kStack = 256 << 10;
constexpr size_t kShared = 232 << 10;

struct Block;

struct Fiber {
  jmp_buf resume;
  std::unique_ptr<char[]> stack;  // empty: never ran, or was left in the midst of a block that failed
  Block* block = nullptr;
  dim3 thread;
  bool done = false;
  std::function<bool()> ready;  // empty: runs on
  const char* waits_for = "";
};

// Threads that meet: nobody passes before all have come.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Meeting meeting;
  unsigned char slot[2][32][64];  // what each lane shows the others; two, since a fast lane may be one exchange ahead
};

struct Block {
  dim3 index, grid, size;
  unsigned char* shared = nullptr;
  Fiber* fibers = nullptr;  // one a thread
  std::vector<Warp> warps;
  Meeting all;
  Meeting named[16];
  std::deque<std::function<void()>> deferred;  // asynchronous work that is under way
  int running = 0;                             // threads that have not returned
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  std::exception_ptr error;
};

inline Block*& block_pointer() {
  static thread_local Block* pointer = nullptr;
  return pointer;
}
inline Block& block() { return *block_pointer(); }

// The calling thread goes on when `ready` holds.
inline void wait_until(std::function<bool()> ready, const char* what) {
  if (ready()) return;
  Fiber& fiber = *block().current;
  fiber.ready = std::move(ready);
  fiber.waits_for = what;
  if (!_setjmp(fiber.resume)) _longjmp(block().scheduler, 1);
}

// Work that the hardware does on its own: done as late as can be, when no thread can go on without it.
inline void defer(std::function<void()> work) { block().deferred.push_back(std::move(work)); }

inline void meet(Meeting& meeting, int expected, const char* what) {
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  wait_until([&meeting, generation] { return meeting.generation != generation; }, what);
}

inline int linear_thread() { return (int)block().current->thread.x; }

struct Shown {
  const unsigned char (*slots)[64];

  template <class T>
  T of(int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof value);
    return value;
  }
};

// What each lane of the calling warp shows, until it shows something else twice.
template <class T>
inline Shown show(const T& own) {
  static_assert(sizeof(T) <= 64);
  const int thread = linear_thread();
  Warp& warp = block().warps[thread / 32];
  auto& slots = warp.slot[warp.meeting.generation % 2];
  std::memcpy(slots[thread % 32], &own, sizeof own);
  meet(warp.meeting, 32, "the lanes of its warp");
  return {slots};
}

template <class T>
inline T exchange(const T& value, int from_lane) {
  return show(value).template of<T>(from_lane);
}

// A thread of block after block: to begin a fiber anew costs more than most blocks.
inline void trampoline() {
  Fiber& fiber = *block().current;
  for (;;) {
    Block& b = *fiber.block;
    try {
      b.body();
    } catch (...) {
      b.error = std::current_exception();
    }
    fiber.done = true;
    --b.running;
    if (!_setjmp(fiber.resume)) _longjmp(b.scheduler, 1);
  }
}

inline void step(Block& b, Fiber& fiber) {
  b.current = &fiber;
  if (_setjmp(b.scheduler)) return;
  if (fiber.stack) _longjmp(fiber.resume, 1);
  fiber.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, trampoline, 0);
  setcontext(&context);
}

inline std::string describe_waiting(const Block& b, const char* name) {
  std::string text = std::string(name) + ": threads wait for ever:";
  for (unsigned t = 0; t < b.size.x; t += 32)
    if (!b.fibers[t].done) text += " thread " + std::to_string(t) + " for " + b.fibers[t].waits_for + ";";
  return text;
}

inline void run_block(Block& b, const char* name, bool backwards) {
  const int threads = (int)b.size.x;
  b.running = threads;
  while (b.running) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = b.fibers[backwards ? threads - 1 - i : i];
      if (fiber.done) continue;
      if (fiber.ready) {
        if (!fiber.ready()) continue;
        fiber.ready = nullptr;
      }
      moved = true;
      step(b, fiber);
      if (b.error) std::rethrow_exception(b.error);
    }
    if (!moved) {
      if (b.deferred.empty()) throw std::runtime_error(describe_waiting(b, name));
      auto work = std::move(b.deferred.front());
      b.deferred.pop_front();
      work();
    }
  }
}

inline void run(const char* name, dim3 grid, int threads, size_t shared_bytes, std::function<void()> body) {
  if (threads % 32 || threads > 1024) throw std::runtime_error(std::string(name) + ": bad number of threads");
  if (shared_bytes > kShared) throw std::runtime_error(std::string(name) + ": too much shared memory");
  static std::vector<Fiber> fibers(1024);  // their stacks are kept from launch to launch
  alignas(1024) static unsigned char shared[kShared];
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block b;
        b.index = dim3(x, y, z);
        b.grid = grid;
        b.size = dim3(threads, 1, 1);
        b.shared = shared;
        b.body = body;
        b.warps.resize(threads / 32);
        std::memset(shared, 0xff, sizeof shared);
        b.fibers = fibers.data();
        for (int t = 0; t < threads; ++t) {
          fibers[t].block = &b;
          fibers[t].thread = dim3(t, 0, 0);
          fibers[t].done = false;
          fibers[t].ready = nullptr;
        }
        block_pointer() = &b;
        std::exception_ptr error;
        try {
          run_block(b, name, (x + y + z) % 2);
          while (!b.deferred.empty()) {  // what is still under way when the last thread returns
            b.deferred.front()();
            b.deferred.pop_front();
          }
        } catch (...) {
          error = std::current_exception();
          for (int t = 0; t < threads; ++t)
            if (!fibers[t].done) fibers[t].stack.reset();
        }
        block_pointer() = nullptr;
        if (error) std::rethrow_exception(error);
      }
}

}  // namespace emulator

template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared, cudaStream_t, const Params& params) {
  emulator::run(name, grid, threads, shared, [kernel, &params] { kernel(params); });
}

// 16-bit numbers as the GPU rounds them.
struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return from_bits((uint32_t)x.bits << 16); }
inline float widen(half x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 0x1f, fraction = x.bits & 0x3ff;
  if (exponent == 0x1f) return from_bits(sign | 0x7f800000 | (fraction << 13));
  if (exponent) return from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float size = (float)fraction * 0x1p-24f;
  return sign ? -size : size;
}

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = to_bits(x);
  return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline half narrow<half>(float x) {
  const uint16_t sign = (to_bits(x) >> 16) & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};
  if (size < 0x1p-14f) return {(uint16_t)(sign | (uint16_t)std::nearbyint(size * 0x1p24f))};
  const uint32_t bits = to_bits(size);
  return {(uint16_t)(sign | ((bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13))};
}

inline unsigned bits_of(bf16 x) { return x.bits; }
inline unsigned bits_of(half x) { return x.bits; }

}  // namespace isdaa

#define threadIdx (::isdaa::emulator::block().current->thread)
#define blockIdx (::isdaa::emulator::block().index)
#define blockDim (::isdaa::emulator::block().size)
#define gridDim (::isdaa::emulator::block().grid)

inline void __syncthreads() {
  auto& b = ::isdaa::emulator::block();
  ::isdaa::emulator::meet(b.all, (int)b.size.x, "__syncthreads");
}
inline void __syncwarp(unsigned = 0xffffffffu) { ::isdaa::emulator::exchange(0, 0); }

template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return ::isdaa::emulator::exchange(value, lane & 31);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::isdaa::emulator::exchange(value, (::isdaa::emulator::linear_thread() % 32) ^ mask);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
  const int lane = ::isdaa::emulator::linear_thread() % 32;
  return ::isdaa::emulator::exchange(value, lane >= (int)distance ? lane - (int)distance : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned all = 0;
  const ::isdaa::emulator::Shown shown = ::isdaa::emulator::show(predicate);
  for (int lane = 0; lane < 32; ++lane) all |= (unsigned)(shown.of<int>(lane) != 0) << lane;
  return all;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned x) { return ::isdaa::from_bits(x); }
inline unsigned __float_as_uint(float x) { return ::isdaa::to_bits(x); }
inline int __float_as_int(float x) { return (int)::isdaa::to_bits(x); }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __longlong_as_double(long long x) {
  double y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
