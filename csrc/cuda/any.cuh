// Numbers whose type is known at run time only: for traffic that is little beside the matrix products.
#pragma once
#include "device.h"
#include "fields.h"

namespace isdaa {

__device__ __forceinline__ float load_any(const void* from, int32_t dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(from)[i];
  if (dtype == kBfloat16) return widen(static_cast<const bf16*>(from)[i]);
  return widen(static_cast<const half*>(from)[i]);
}

__device__ __forceinline__ void store_any(void* to, int32_t dtype, int64_t i, float x) {
  if (dtype == kFloat32) static_cast<float*>(to)[i] = x;
  else if (dtype == kBfloat16) static_cast<bf16*>(to)[i] = narrow<bf16>(x);
  else static_cast<half*>(to)[i] = narrow<half>(x);
}

inline bool is_dtype(int32_t dtype) { return dtype == kFloat32 || dtype == kFloat16 || dtype == kBfloat16; }

}  // namespace isdaa
