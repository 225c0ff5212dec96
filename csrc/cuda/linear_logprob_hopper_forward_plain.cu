// Heads without bias and softcap.
#include "linear_logprob_hopper_forward.cuh"

namespace isdaa {
namespace hopper {

template void launch_forward<false>(const Launched<LinearLogprobForwardHopper>&, dim3, cudaStream_t);

}  // namespace hopper
}  // namespace isdaa
