// The loss stage on the CPU. A sequence is summed by one thread, in one order whatever the number of threads.
#pragma once
#include "../pair_loss_params.h"

namespace isdaa {

// Both throw std::invalid_argument where cu_seqlens or pairs point outside; K is 1, no counter is needed.
void pair_loss_forward(const PairLossForward& params, int threads);
void pair_loss_backward(const PairLossBackward& params, int threads);

}  // namespace isdaa
