// Host side of the CPU backend's routed backward: work shared out over threads, each number summed in one order for a number of threads.
#pragma once
#include "params.h"

namespace isdaa {

template <typename T>
void route_blocks(const RouteBlocks<T>& blocks);
template <typename T>
void routed_block(const RoutedBlock<T>& block, int threads);
template <typename T>
void finish_block(const RoutedBlockEnd<T>& block);

}  // namespace isdaa
