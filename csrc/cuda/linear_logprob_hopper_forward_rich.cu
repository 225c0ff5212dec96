// Heads with bias or softcap.
#include "linear_logprob_hopper_forward.cuh"

namespace isdaa {
namespace hopper {

template void launch_forward<true>(const Launched<LinearLogprobForwardHopper>&, dim3, cudaStream_t);

}  // namespace hopper
}  // namespace isdaa
