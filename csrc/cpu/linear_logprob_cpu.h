// Host side of the CPU backend: the rows of a tile, shared out over threads.
#pragma once
#include "params.h"

namespace isdaa {

const char* instruction_set();                // the one in use
bool use_instruction_set(const char* name);   // for tests; false: this processor does not have it

template <typename T>
void linear_logprob_forward_tile(const FoldTile<T>& tile);
template <typename T>
void linear_logprob_backward_tile(const GradientTile<T>& tile);

}  // namespace isdaa
