// Host side of the CPU backend's routed backward: work shared out over threads, each number summed in one order for a number of threads.
#pragma once
#include "params.h"

namespace isdaa {

template <typename T>
void route_blocks(const RouteBlocks<T>& blocks);
template <typename T>
void routed_tile(const RoutedTile<T>& tile);
template <typename T>
void finish_block(const RoutedBlock<T>& block);

// Tokens with route kWeightAndHidden, of which there are `hidden_count`, then those with kWeight.
void list_tokens(const uint8_t* route, int64_t tokens, int64_t hidden_count, int64_t* listed);

// out[i] = values[row of listed[i]] for i below `count`
template <typename T>
void gather_rows(const RoutedTokens<T>& token, const int64_t* listed, int64_t count, const T* values, int64_t stride, int64_t width,
                 T* out, int threads);

// out[row of listed[i]] += values[i]; no token stands twice in `listed`.
template <typename T>
void add_rows(const RoutedTokens<T>& token, const int64_t* listed, int64_t count, const T* values, int64_t width, T* out, int threads);

}  // namespace isdaa
