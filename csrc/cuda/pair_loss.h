// The loss stage: log-probs of tokens to the loss of preference pairs, its metrics and the slopes of the sums; and back to tokens.
#pragma once
#include "device.h"
#include "../pair_loss_params.h"

namespace isdaa {

// One kernel each; before the forward's of a packed batch, four bytes are set to 0.
void pair_loss_forward(const PairLossForward& params, cudaStream_t stream);
void pair_loss_backward(const PairLossBackward& params, cudaStream_t stream);

}  // namespace isdaa
