// Host side of every kernel file: errors that name kernel and argument, and launches on the caller's stream.
#pragma once
#include <stdexcept>
#include <string>

#include "device.h"

namespace isdaa {

// Reaches Python as ValueError.
struct BadArgument : std::invalid_argument {
  BadArgument(const char* kernel, const std::string& what) : std::invalid_argument(std::string(kernel) + ": " + what) {}
};

// Reaches Python as RuntimeError.
struct LaunchFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void expect(bool holds, const char* kernel, const char* argument, const char* expectation, int64_t found) {
  if (!holds)
    throw BadArgument(kernel, std::string(argument) + ": expected " + expectation + ", got " + std::to_string(found));
}

inline void expect_pointer(const void* pointer, const char* kernel, const char* argument) {
  if (!pointer) throw BadArgument(kernel, std::string(argument) + ": expected a tensor, got none");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of neighbouring numbers, `size` bytes each, begin on 16-byte borders.
inline bool rows_aligned(const void* first, int64_t stride_n, int64_t stride_v, size_t size) {
  return stride_v == 1 && stride_n * size % 16 == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0;
}

// A dimension of a grid; CUDA takes 2^31 - 1 in x and 65535 in y.
inline unsigned grid_x(int64_t blocks, const char* kernel) {
  expect(blocks >= 0 && blocks <= 0x7fffffff, kernel, "grid", "at most 2147483647 blocks", blocks);
  return (unsigned)blocks;
}

inline unsigned grid_y(int64_t blocks, const char* kernel) {
  expect(blocks >= 0 && blocks <= 65535, kernel, "grid", "at most 65535 rows of blocks", blocks);
  return (unsigned)blocks;
}

#ifndef ISDAA_EMULATED
inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw LaunchFailure(std::string(kernel) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// kernel(params) on `stream`; `shared` bytes of dynamic shared memory. Never waits for the device. Empty grids launch nothing.
template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, size_t shared, cudaStream_t stream,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared)  // beside static shared memory 48 KiB may be too much without it
    check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, params), name);
}
#endif

}  // namespace isdaa
