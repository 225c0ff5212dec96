#include "tokens.cuh"

#include <initializer_list>

#include "host.h"

namespace isdaa {
namespace {

dim3 row_grid(int64_t rows, int64_t D, const char* kernel) {
  return dim3(grid_x(rows, kernel), grid_y(ceil_div(D, kRowThreads * kRowCount), kernel));
}

struct Named {
  const void* pointer;
  const char* name;
};

void expect_tensors(const char* kernel, std::initializer_list<Named> tensors, int64_t numbers) {
  for (const Named& tensor : tensors)
    if (numbers) expect_pointer(tensor.pointer, kernel, tensor.name);  // an empty tensor has no address
}

void expect_dtype(int32_t dtype, const char* kernel, const char* argument) {
  expect(is_dtype(dtype), kernel, argument, "0, 1 or 2", dtype);
}

}  // namespace

void gather(const Gather& p, cudaStream_t stream) {
  expect_tensors("gather", {{p.source, "source"}, {p.rows, "rows"}, {p.count, "count"}, {p.out, "out"}}, p.T * p.D);
  expect_dtype(p.source_dtype, "gather", "source_dtype");
  expect_dtype(p.out_dtype, "gather", "out_dtype");
  launch(gather_kernel, "gather", row_grid(p.T, p.D, "gather"), kRowThreads, 0, stream, p);
}

void combine(const Combine& p, cudaStream_t stream) {
  expect_tensors("combine", {{p.partial_max, "partial_max"}, {p.partial_sum, "partial_sum"}, {p.target_logit, "target_logit"},
                             {p.targets, "targets"}, {p.rows, "rows"}, {p.count, "count"}, {p.logprob, "logprob"}, {p.lse, "lse"}}, p.T);
  expect(!p.entropy || p.partial_entropy, "combine", "partial_entropy", "a tensor where entropy is asked for", 0);
  expect(!p.mean_logit || p.partial_total, "combine", "partial_total", "a tensor where mean_logit is asked for", 0);
  expect(!p.log_sum_sq || p.partial_squares, "combine", "partial_squares", "a tensor where log_sum_sq is asked for", 0);
  const dim3 grid(grid_x(ceil_div(p.T, kCombineTokens), "combine"));
  launch(combine_kernel, "combine", grid, kCombineTokens * kCombineParts, 0, stream, p);
}

void token(const TokenNumbers& p, cudaStream_t stream) {
  expect_tensors("token", {{p.rows, "rows"}, {p.count, "count"}, {p.top, "top"}, {p.logprob_gradient, "logprob_gradient"},
                           {p.logprob, "logprob"}, {p.lse, "lse"}, {p.inverse_temperature, "inverse_temperature"}}, p.T);
  launch(token_kernel, "token", dim3(grid_x(ceil_div(p.T, kTokenThreads), "token")), kTokenThreads, 0, stream, p);
}

void finish_hidden(const FinishHidden& p, cudaStream_t stream) {
  expect_tensors("finish_hidden", {{p.sums, "sums"}, {p.tokens, "tokens"}, {p.targets, "targets"}, {p.weight, "weight"},
                                   {p.rows, "rows"}, {p.count, "count"}, {p.d_hidden, "d_hidden"}}, p.T * p.D);
  expect_dtype(p.weight_dtype, "finish_hidden", "weight_dtype");
  expect_dtype(p.d_hidden_dtype, "finish_hidden", "d_hidden_dtype");
  launch(finish_hidden_kernel, "finish_hidden", row_grid(p.T, p.D, "finish_hidden"), kRowThreads, 0, stream, p);
}

void finish_weight(const FinishWeight& p, cudaStream_t stream) {
  expect_tensors("finish_weight", {{p.sums, "sums"}, {p.starts, "starts"}, {p.top, "top"}, {p.d_weight, "d_weight"}}, p.C * p.D);
  expect_dtype(p.hidden_dtype, "finish_weight", "hidden_dtype");
  expect_dtype(p.d_weight_dtype, "finish_weight", "d_weight_dtype");
  expect(!p.mean == !p.rest, "finish_weight", "rest", "a tensor where mean is one", p.rest != nullptr);
  expect(p.block > 0, "finish_weight", "block", "a positive number", p.block);
  launch(finish_weight_kernel, "finish_weight", row_grid(p.C, p.D, "finish_weight"), kRowThreads, 0, stream, p);
}

}  // namespace isdaa
