// pybind11 module isdaa_kernels._cuda. Tensors come as raw addresses: the module depends on no torch version.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/host.h"
#include "cuda/linear_kl.h"
#include "cuda/linear_logprob_hopper.h"
#include "cuda/pair_loss.h"
#include "cuda/rest.h"
#include "cuda/routed.h"
#include "cuda/routes.h"
#include "cuda/tokens.h"
#include "cuda/vocabulary.h"
#include "keywords.h"

namespace py = pybind11;

namespace isdaa {
namespace {

template <class Params>
Params named(const py::dict& arguments, const char* kernel) {
  try {
    return from_keywords<Params>(arguments);
  } catch (const std::invalid_argument& error) {
    throw BadArgument(kernel, error.what());
  }
}

template <class Params>
void bind(py::module_& m, const char* name, void (*function)(const Params&, cudaStream_t)) {
  m.def(
      name,
      [name, function](uintptr_t stream, const py::kwargs& arguments) {
        const Params params = named<Params>(arguments, name);
        py::gil_scoped_release release;
        function(params, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("stream"));
}

}  // namespace
}  // namespace isdaa

// As in 80_90a_100a: nvcc takes a comma in a definition for the end of it.
#ifndef ISDAA_CUDA_ARCHS
#define ISDAA_CUDA_ARCHS
#endif
#define ISDAA_TEXT(x) #x
#define ISDAA_TEXT_OF(x) ISDAA_TEXT(x)

PYBIND11_MODULE(_cuda, m) {
  using namespace isdaa;
  m.doc() = "Kernels of the CUDA backend. They run on the stream that is given, allocate nothing and wait for nothing.";
  std::string archs = ISDAA_TEXT_OF(ISDAA_CUDA_ARCHS);
  std::replace(archs.begin(), archs.end(), '_', ',');
  m.attr("archs") = archs;
#ifdef ISDAA_EMULATED
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  bind(m, "fold_logits", &fold_logits);
  bind(m, "gradient_logits", &gradient_logits);
  bind(m, "gather", &gather);
  bind(m, "combine", &combine);
  bind(m, "token", &token);
  bind(m, "finish_hidden", &finish_hidden);
  bind(m, "finish_weight", &finish_weight);
  bind(m, "linear_kl_fold", &linear_kl_fold);
  bind(m, "linear_kl_combine", &linear_kl_combine);
  bind(m, "linear_kl_mixture", &linear_kl_mixture);
  bind(m, "linear_kl_mixture_sum", &linear_kl_mixture_sum);
  bind(m, "linear_kl_gradient", &linear_kl_gradient);
  bind(m, "pair_loss_forward", &pair_loss_forward);
  bind(m, "pair_loss_backward", &pair_loss_backward);
  bind(m, "block_mass", &block_mass);
  bind(m, "route", &route);
  bind(m, "list_tokens", &list_tokens);
  bind(m, "routed_gradient", &routed_gradient);
  bind(m, "routed_weight", &routed_weight);
  bind(m, "routed_hidden", &routed_hidden);
  bind(m, "rest_weight", &rest_weight);
  bind(m, "rest_hidden", &rest_hidden);
  bind(m, "block_sums", &block_sums);
  bind(m, "block_mean", &block_mean);
#ifdef ISDAA_HOPPER
  bind(m, "linear_logprob_forward_hopper", &linear_logprob_forward_hopper);
  bind(m, "linear_logprob_backward_hopper", &linear_logprob_backward_hopper);
#endif
}
