// Checks that the routed kernels share.
#pragma once
#include "any.cuh"
#include "host.h"
#include "routed.h"

namespace isdaa {

inline void check_block(const char* kernel, int64_t block) {
  expect(block == 64 || block == 128 || block == 256, kernel, "block", "64, 128 or 256", block);
}

// Rows of the packed gradient and of a chunk are counted with 32 bits, numbers with 64.
inline void check_chunk(const char* kernel, int64_t block, int64_t C, int64_t T) {
  check_block(kernel, block);
  expect(C > 0, kernel, "C", "at least 1", C);
  expect(T > 0, kernel, "T", "at least 1", T);
  expect((ceil_div(C, block) + 1) * block * T <= 0x7fffffffll * block, kernel, "T", "fewer than 2^31 rows of gradient in a chunk", T);
  expect(C + block <= 0x7fffffff, kernel, "C", "fewer than 2^31 rows", C);
}

// Two neighbouring rows, or columns, are less than 2^31 bytes apart.
inline void check_stride(const char* kernel, const char* argument, int64_t stride) {
  expect(stride >= 0 && stride < 1 << 29, kernel, argument, "0 up to 2^29 - 1", stride);
}

// run(a number of the type)
template <class Run>
void with_dtype(int32_t dtype, const char* kernel, const char* argument, const Run& run) {
  expect(is_dtype(dtype), kernel, argument, "0, 1 or 2", dtype);
  if (dtype == kFloat32) run(float());
  else if (dtype == kFloat16) run(half());
  else run(bf16());
}

}  // namespace isdaa
