// Hopper's own instructions (sm_90a): barriers that count bytes, the tensor memory accelerator, matrix products of a warp group, and the
// register file shared out among warp groups. tests/cuda_emulator/hopper.h has the same functions for the CPU.
#pragma once
#include "device.h"
#include "fields.h"
#include "host.h"

#ifdef ISDAA_EMULATED
#include "../cuda_emulator/hopper.h"
#else
#include <cuda.h>

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile with -gencode arch=compute_90a,code=sm_90a and for nothing else"
#endif

namespace isdaa {
namespace hopper {

constexpr int kWarpGroup = 128;
constexpr int kSwizzledRow = 128;         // bytes of a row of a tile in shared memory: 64 numbers of 16 bits
constexpr int kTileAlignment = 1024;      // of a tile in shared memory: its swizzle repeats every 8 rows
constexpr int kAccumulators = 64 * 256 / kWarpGroup;

// ---- Barriers in shared memory. A phase ends when all arrivals have come and all bytes that were announced.

using Barrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// By the thread that made the barriers, before the __syncthreads after which they are used: the accelerator must see them as well.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(Barrier* barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n"
      "}\n"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over;
}

// Until the phase of this parity is over: that before the first has parity 1 and is over from the start.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

// kThreads threads meet; names 1 to 15, 0 is __syncthreads.
template <int kThreads>
__device__ __forceinline__ void meet(int name) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(kThreads) : "memory");
}

// ---- Tiles of a matrix from memory to shared memory.

using TensorMap = CUtensorMap;

// By one thread. The tile whose upper left corner is (row, column), 0 outside the matrix; its bytes arrive at the barrier.
__device__ __forceinline__ void load_tile(void* to, const TensorMap* map, int row, int column, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// ---- Products of a warp group: 64 x 256 accumulators, number i of a thread in row 16 * (warp % 4) + lane / 4 + 8 * (i / 2 % 2) and
// column 8 * (i / 4) + 2 * (lane % 4) + i % 2.

// Of a tile that load_tile brought. Adding kStepOfProducts moves 16 numbers along its rows.
constexpr uint64_t kStepOfProducts = 16 * 2 >> 4;

__device__ __forceinline__ uint64_t matrix_descriptor(const void* tile) {
  constexpr uint64_t kEightRows = 8 * kSwizzledRow >> 4, kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffff) >> 4 | 1ull << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// The compiler moves no use of the accumulators over this line.
__device__ __forceinline__ void pin(float (&acc)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// Before the first of some products.
__device__ __forceinline__ void products_begin(float (&acc)[kAccumulators]) {
  pin(acc);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than kPending of the commits are under way.
template <int kPending>
__device__ __forceinline__ void products_wait(float (&acc)[kAccumulators]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(acc);
}

#define ISDAA_ACC4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define ISDAA_ACC16(i) ISDAA_ACC4(i), ISDAA_ACC4(i + 4), ISDAA_ACC4(i + 8), ISDAA_ACC4(i + 12)
#define ISDAA_ACC64(i) ISDAA_ACC16(i), ISDAA_ACC16(i + 16), ISDAA_ACC16(i + 32), ISDAA_ACC16(i + 48)
#define ISDAA_PRODUCT(type)                                                                                                   \
  asm volatile(                                                                                                               \
      "{\n"                                                                                                                   \
      ".reg .pred add;\n"                                                                                                     \
      "setp.ne.b32 add, %130, 0;\n"                                                                                           \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " "                                                        \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                      \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                      \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                                      \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                      \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                      \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                          \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "                     \
      "%128, %129, add, 1, 1, 0, 0;\n"                                                                                        \
      "}\n"                                                                                                                   \
      : ISDAA_ACC64(0), ISDAA_ACC64(64)                                                                                       \
      : "l"(a), "l"(b), "r"((int)add))

// acc = a [64, 16] times b [256, 16] transposed, plus acc where `add`; both factors in shared memory.
template <class T>
__device__ __forceinline__ void product_64x256x16(float (&acc)[kAccumulators], uint64_t a, uint64_t b, bool add);
template <>
__device__ __forceinline__ void product_64x256x16<bf16>(float (&acc)[kAccumulators], uint64_t a, uint64_t b, bool add) {
  ISDAA_PRODUCT("bf16");
}
template <>
__device__ __forceinline__ void product_64x256x16<half>(float (&acc)[kAccumulators], uint64_t a, uint64_t b, bool add) {
  ISDAA_PRODUCT("f16");
}

#undef ISDAA_PRODUCT
#undef ISDAA_ACC64
#undef ISDAA_ACC16
#undef ISDAA_ACC4

// ---- Registers: a warp group gives up some of those that it was launched with, others take them.

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Arithmetic.

// The same number in all lanes, and known to the compiler to be so.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

__device__ __forceinline__ float fast_exp(float x) {  // 0 where it is below 2^-126
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// Rounded by itself: the compiler makes no multiply-add of it and a sum that follows.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to 16 bits, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t narrow_pair<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- Host: what the accelerator must know of a matrix. The driver's function is looked up when it is first needed, so that a machine
// without a driver can load this code.

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const char* name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
#else
    check(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found), name);
#endif
    if (found != cudaDriverEntryPointSuccess || !function)
      throw LaunchFailure("cuTensorMapEncodeTiled: the CUDA driver is older than 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// Of a matrix [rows, columns] of 16-bit numbers in tiles of tile_rows x 64.
inline TensorMap tensor_map(const void* matrix, int32_t dtype, int64_t rows, int64_t columns, int64_t stride, int tile_rows) {
  const cuuint64_t shape[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)stride * 2};
  const cuuint32_t tile[2] = {kSwizzledRow / 2, (cuuint32_t)tile_rows}, steps[2] = {1, 1};
  const auto type = dtype == kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  TensorMap map;
  const CUresult result = tensor_map_encoder()(&map, type, 2, const_cast<void*>(matrix), shape, strides, tile, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw LaunchFailure("cuTensorMapEncodeTiled: CUresult " + std::to_string((int)result));
  return map;
}

}  // namespace hopper
}  // namespace isdaa
#endif
