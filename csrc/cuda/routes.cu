#include "routes.cuh"

#include "host.h"

namespace isdaa {

void block_mass(const BlockMass& p, cudaStream_t stream) {
  const char* name = "block_mass";
  expect_pointer(p.partial_max, name, "partial_max");
  expect_pointer(p.partial_sum, name, "partial_sum");
  expect_pointer(p.rows, name, "rows");
  expect_pointer(p.count, name, "count");
  expect_pointer(p.lse, name, "lse");
  expect_pointer(p.log_mass, name, "log_mass");
  expect(p.slots > 0, name, "slots", "at least 1", p.slots);
  expect(p.B <= ceil_div(p.S, p.slots), name, "B", "no more blocks than the slots make", p.B);
  launch(block_mass_kernel, name, dim3(grid_x(ceil_div(p.T, kMassThreads), name), grid_y(p.B, name)), kMassThreads, 0, stream, p);
}

void route(const Route& p, cudaStream_t stream) {
  const char* name = "route";
  expect_pointer(p.log_mass, name, "log_mass");
  expect_pointer(p.rows, name, "rows");
  expect_pointer(p.count, name, "count");
  expect_pointer(p.size, name, "size");
  expect_pointer(p.target_block, name, "target_block");
  expect_pointer(p.rules, name, "rules");
  expect_pointer(p.route, name, "route");
  expect(p.L <= 0x7fffffff - kRouteThreads, name, "L", "fewer than 2147483136 tokens", p.L);
  expect(p.bisections >= 0, name, "bisections", "no less than 0", p.bisections);
  const size_t kept = sizeof(float) * (size_t)(p.L < kKeptTokens ? p.L : kKeptTokens);
  launch(route_kernel, name, dim3(grid_x(p.B, name)), kRouteThreads, kept, stream, p);
}

void list_tokens(const ListTokens& p, cudaStream_t stream) {
  const char* name = "list_tokens";
  expect_pointer(p.route, name, "route");
  expect_pointer(p.lists, name, "lists");
  expect_pointer(p.places, name, "places");
  expect_pointer(p.starts, name, "starts");
  expect_pointer(p.counts, name, "counts");
  expect(p.step == kListStep, name, "step", "128", p.step);
  expect(p.first >= 0 && p.first < p.L, name, "first", "a live token's index", p.first);
  expect(p.T <= 0x7fffffff - kListThreads, name, "T", "fewer than 2147483136 tokens", p.T);
  launch(list_tokens_kernel, name, dim3(grid_x(p.blocks, name)), kListThreads, 0, stream, p);
}

}  // namespace isdaa
