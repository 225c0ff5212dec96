// What every kernel file includes: 16-bit numbers, warps and blocks, launches. Compiled by nvcc, or, for tests on machines without a GPU,
// by a C++ compiler against tests/cuda_emulator, which runs the same source on the CPU. No torch header.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef ISDAA_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace isdaa {

#if defined(__CUDACC__) || defined(ISDAA_EMULATED)  // not where bindings only fill params structs

#ifndef ISDAA_EMULATED
using bf16 = __nv_bfloat16;
using half = __half;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);  // to nearest, ties to even
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ half narrow<half>(float x) { return __float2half_rn(x); }

__device__ __forceinline__ unsigned bits_of(bf16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ unsigned bits_of(half x) { return __half_as_ushort(x); }

#define ISDAA_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr float kLowest = -__builtin_inff();

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }

// Results of all lanes combined in one fixed order, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// The larger; a NaN is passed over.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) x = larger(__shfl_xor_sync(kAllLanes, x, offset), x);
  return x;
}

// The same over a block of kThreads, in every thread. All threads must call it. `shared` holds one number a warp and may be used again
// after the call.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  x = warp_sum(x);
  if (lane_index() == 0) shared[warp_index()] = x;
  __syncthreads();
  T total = shared[0];
#pragma unroll
  for (int w = 1; w < kThreads / kWarp; ++w) total += shared[w];
  __syncthreads();
  return total;
}

template <int kThreads>
__device__ __forceinline__ float block_max(float x, float* shared) {
  x = warp_max(x);
  if (lane_index() == 0) shared[warp_index()] = x;
  __syncthreads();
  float top = shared[0];
#pragma unroll
  for (int w = 1; w < kThreads / kWarp; ++w) top = larger(shared[w], top);
  __syncthreads();
  return top;
}

// Live tokens of a slab: it may begin behind the last of the call.
__device__ __forceinline__ int64_t live_tokens(const int32_t* count, int64_t first, int64_t T) {
  const int64_t left = *count - first;
  return left < 0 ? 0 : left < T ? left : T;
}

// kCount neighbouring numbers in one load, whose address is a multiple of its size.
template <int kCount, class T>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ void load_wide(const T* from, float (&out)[kCount]) {
  const Pack<kCount, T> pack = *reinterpret_cast<const Pack<kCount, T>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = widen(pack.value[i]);
}

template <int kCount, class T>
__device__ __forceinline__ void store_wide(T* to, const float (&x)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    Pack<kCount / 2, unsigned> pack;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pack.value[i] = bits_of(narrow<T>(x[2 * i])) | bits_of(narrow<T>(x[2 * i + 1])) << 16;
    *reinterpret_cast<Pack<kCount / 2, unsigned>*>(to) = pack;
  } else {
    Pack<kCount, T> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.value[i] = x[i];
    *reinterpret_cast<Pack<kCount, T>*>(to) = pack;
  }
}

#endif

}  // namespace isdaa
