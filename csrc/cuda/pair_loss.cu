#include "pair_loss.cuh"

#include "host.h"

namespace isdaa {
namespace {

void expect_bytes(const void* pointer, int32_t bytes, const char* kernel, const char* argument) {
  expect(!pointer || bytes == 4 || bytes == 8, kernel, argument, "4 or 8", bytes);
}

// Arguments that both directions have.
template <class Params>
void expect_packing(const Params& p, const char* kernel) {
  expect_bytes(p.cu_seqlens, p.cu_seqlens_bytes, kernel, "cu_seqlens_bytes");
  expect_bytes(p.targets, p.targets_bytes, kernel, "targets_bytes");
  expect_bytes(p.pairs, p.pairs_bytes, kernel, "pairs_bytes");
  expect(p.K >= 1, kernel, "K", "at least 1", p.K);
  expect(p.cu_seqlens || (p.K == 1 && p.S == p.N), kernel, "S", "as many sequences as numbers where there is no cu_seqlens", p.S);
  expect(p.pairs || p.P == 0 || 2 * p.P == p.S, kernel, "P", "half as many pairs as sequences", p.P);
}

template <class Params>
dim3 piece_grid(const Params& p, const char* kernel) {
  expect(p.S * p.K <= 0x7fffffff, kernel, "S", "at most 2147483647 pieces of sequences", p.S * p.K);
  return dim3(grid_x(p.S ? p.S : 1, kernel), grid_y(p.K, kernel));
}

}  // namespace

void pair_loss_forward(const PairLossForward& p, cudaStream_t stream) {
  const char* name = "pair_loss_forward";
  expect_packing(p, name);
  expect_pointer(p.loss, name, "loss");
  expect_pointer(p.metrics, name, "metrics");
  expect(p.P == 0 || (p.slope && p.records), name, "slope, records", "tensors", 0);
  expect(p.N == 0 || p.policy, name, "policy", "a tensor", 0);
  expect(p.S == 0 || p.reference || (p.reference_per_token && p.N == 0), name, "reference", "a tensor", 0);
  expect_bytes(p.policy, p.policy_bytes, name, "policy_bytes");
  expect_bytes(p.reference, p.reference_bytes, name, "reference_bytes");
  expect_bytes(p.behaviour, p.behaviour_bytes, name, "behaviour_bytes");
  expect(p.base >= kDpo && p.base <= kSlic, name, "base", "0 to 3", p.base);
  expect(p.mode >= kJoint && p.mode <= kNoClip, name, "mode", "0 to 2", p.mode);
  if (!p.cu_seqlens || !p.S) return launch(pair_loss_forward_kernel, name, dim3(1), kPairThreads, 0, stream, p);
  expect_pointer(p.sums, name, "sums");
  expect_pointer(p.counter, name, "counter");
  set_to_zero(p.counter, stream, name);
  launch(pair_loss_forward_kernel, name, piece_grid(p, name), kPairThreads, 0, stream, p);
}

void pair_loss_backward(const PairLossBackward& p, cudaStream_t stream) {
  const char* name = "pair_loss_backward";
  expect_packing(p, name);
  if (!p.N) return;
  expect_pointer(p.grad, name, "grad");
  expect_pointer(p.out, name, "out");
  expect(p.P == 0 || p.slope, name, "slope", "a tensor", 0);
  expect_bytes(p.out, p.out_bytes, name, "out_bytes");
  launch(pair_loss_backward_kernel, name, piece_grid(p, name), kSpreadThreads, 0, stream, p);
}

}  // namespace isdaa
