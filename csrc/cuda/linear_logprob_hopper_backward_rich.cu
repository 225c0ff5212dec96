// Heads with bias or softcap.
#include "linear_logprob_hopper_backward.cuh"

namespace isdaa {
namespace hopper {

template void launch_backward<true>(const Launched<LinearLogprobBackwardHopper>&, dim3, cudaStream_t);

}  // namespace hopper
}  // namespace isdaa
