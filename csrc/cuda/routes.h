// The routing plan: each block's share of a token's probability, the rules of isdaa_kernels.routing, the lists they make.
// N tokens of the call, L live ones at most, T tokens of a slab, V vocabulary, B blocks of it, S slots of partial results.
#pragma once
#include "device.h"
#include "fields.h"

namespace isdaa {

constexpr int kListStep = 128;  // tokens that a column of `starts` stands for

// log_mass[b, n] = log-sum-exp of the slots of block b, minus lse[n]: small where the mass is large, so that fp32 keeps it exact there.
struct BlockMass {
  const float* partial_max;   // [S, T]
  const double* partial_sum;  // [S, T]
  const int64_t* rows;        // [L]
  const int32_t* count;       // [1] live tokens
  const double* lse;          // [N]
  float* log_mass;            // [B, N]
  int64_t first, T, S, N, B;
  int32_t slots;  // of a block

  ISDAA_FIELDS(partial_max, partial_sum, rows, count, lse, log_mass, first, T, S, N, B, slots)
};

// The rules. That of the row: the largest of a bisection's numbers above which its share of the block's sum lies.
struct Route {
  const float* log_mass;        // [B, N]
  const int64_t* rows;          // [L]
  const int32_t* count;         // [1]
  const float* size;            // [L] |coefficient| of each live token, 0 of those that are routed nowhere
  const int32_t* target_block;  // [L], -1 of those
  const double* rules;          // [2] the least |coefficient| * mass of a routed token, and the share of the row's rule
  uint8_t* route;               // [B, L]: 0 not routed, 1 in the gradients of weight and bias alone, 2 in that of hidden too
  int64_t N, L, B;
  int32_t bisections;
  bool by_row;

  ISDAA_FIELDS(log_mass, rows, count, size, target_block, rules, route, N, L, B, bisections, by_row)
};

// The lists of the blocks [begin, begin + blocks), for the slab of tokens from `first` on.
struct ListTokens {
  const uint8_t* route;  // [B, L]
  int32_t* lists;        // [blocks, T] routed tokens of the slab: those of hidden's gradient first, each kind in order
  int32_t* places;       // [blocks, T] where in its block's list a token of hidden's gradient stands, -1 for the others
  int32_t* starts;       // [blocks, ceil(T / kListStep) + 1] how many tokens of hidden's gradient come before each step, and in all
  int32_t* counts;       // [blocks] of both kinds
  int64_t begin, blocks, first, T, L;
  int32_t step;  // kListStep

  ISDAA_FIELDS(route, lists, places, starts, counts, begin, blocks, first, T, L, step)
};

void block_mass(const BlockMass& params, cudaStream_t stream);
void route(const Route& params, cudaStream_t stream);
void list_tokens(const ListTokens& params, cudaStream_t stream);

}  // namespace isdaa
