// Places for what some threads of a block have to put down, in the order of the threads.
#pragma once
#include "device.h"

namespace isdaa {

// How many threads before this one say yes, and how many of all. All threads must call it; `shared` holds one number a warp.
template <int kThreads>
__device__ __forceinline__ int count_before(bool yes, int* shared, int& all) {
  const unsigned voters = __ballot_sync(kAllLanes, yes);
  if (lane_index() == 0) shared[warp_index()] = __popc(voters);
  __syncthreads();
  int before = __popc(voters & ((1u << lane_index()) - 1));
  all = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    before += w < warp_index() ? shared[w] : 0;
    all += shared[w];
  }
  __syncthreads();
  return before;
}

}  // namespace isdaa
