// Heads without bias and softcap.
#include "linear_logprob_hopper_backward.cuh"

namespace isdaa {
namespace hopper {

template void launch_backward<false>(const Launched<LinearLogprobBackwardHopper>&, dim3, cudaStream_t);

}  // namespace hopper
}  // namespace isdaa
