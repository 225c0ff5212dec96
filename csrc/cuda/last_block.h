// Which block of a grid comes last: one launch can then go on with what all of its blocks have written.
#pragma once
#include "host.h"

namespace isdaa {

#ifdef ISDAA_EMULATED
// Blocks run one after the other there.
inline void set_to_zero(int32_t* counter, cudaStream_t, const char*) { *counter = 0; }
inline void device_fence() {}
inline int32_t add_one(int32_t* counter) { return (*counter)++; }
#else
inline void set_to_zero(int32_t* counter, cudaStream_t stream, const char* kernel) {
  check(cudaMemsetAsync(counter, 0, sizeof *counter, stream), kernel);
}
__device__ __forceinline__ void device_fence() { __threadfence(); }
__device__ __forceinline__ int32_t add_one(int32_t* counter) { return atomicAdd(counter, 1); }
#endif

// True in the block that is the last of `blocks` to call this, for all of its threads, which then see what the others wrote before. All
// threads of every block must call it. `counter` is 0 before the launch; `shared` is a number of the block's.
__device__ __forceinline__ bool comes_last(int32_t* counter, int32_t blocks, int32_t* shared) {
  device_fence();  // what this thread wrote is seen by whoever sees it counted
  __syncthreads();
  if (threadIdx.x == 0) *shared = add_one(counter);
  __syncthreads();
  device_fence();
  return *shared == blocks - 1;
}

}  // namespace isdaa
