// Host side of linear_kl on the CPU: the rows of a tile, shared out over threads.
#pragma once
#include "linear_kl_params.h"

namespace isdaa {

// Products become final logits, which are folded into the log-sum-exps and, but for kKlJsd, into the sums of the divergence.
template <typename T>
void kl_fold_tile(const KlTile<T>& tile, int threads);
// Adds the tile to the two divergences from the mixture; the products stay as they are.
template <typename T>
void kl_mixture_tile(const KlTile<T>& tile, int threads);
// The policy's product becomes its gradient.
template <typename T>
void kl_gradient_tile(const KlTile<T>& tile, int threads);

}  // namespace isdaa
